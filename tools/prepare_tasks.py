#!/usr/bin/env python
"""Reasoning tasks as JSONL of prompts and answers and, given a tokenizer, as Megatron datasets with answer masks.

`P_train.jsonl`, `P_test.jsonl`, of sets that are generated also `P_beyond.jsonl`, problems harder than those of
training; for each of them `P_<split>_document.bin`, `.idx` and `.json`, and beside it the mask
`P_<split>_document_answers`. See docs/reasoning.md.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.answers import Exercise, write_answers
from more_megatron.data.tokenizers import TokenizerOptions, TokenizerType, load
from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.evaluation.tasks import GENERATED, Problem, Split, generate, read_problems, write_problems
from more_megatron.evaluation.tasks.babi import TASKS, fetch_babi, read_babi
from more_megatron.flags import flag


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="SET")
    babi = kinds.add_parser("babi", help="the twenty bAbI tasks")
    babi.add_argument(
        "--input", metavar="FOLDER", help="folder of qa1_*_train.txt to qa20_*_test.txt (default: the hub)"
    )
    babi.add_argument(
        "--tasks", type=int, nargs="+", choices=TASKS, default=list(TASKS), metavar="N", help="their numbers"
    )
    own = kinds.add_parser("jsonl", help="problems of your own")
    own.add_argument("--train", required=True, metavar="FILE", help="JSONL of problems to train on")
    own.add_argument("--test", metavar="FILE", help="JSONL of problems to test with")
    sets = [babi, own]
    for name in GENERATED:
        generated = kinds.add_parser(name, help="generated from a seed")
        generated.add_argument("--train", type=int, default=9000, metavar="N", help="problems to train on (9000)")
        generated.add_argument("--test", type=int, default=900, metavar="N", help="problems to test with (900)")
        generated.add_argument("--beyond", type=int, default=900, metavar="N", help="harder problems (900)")
        generated.add_argument("--seed", type=int, default=1234)
        sets.append(generated)
    for one in sets:
        one.add_argument("--output-prefix", required=True, metavar="P")
        group = one.add_argument_group("tokenizer (Megatron's flags); without it no datasets are written")
        group.add_argument("--tokenizer-type", choices=[kind.value for kind in TokenizerType], metavar="T")
        group.add_argument("--tokenizer-model", metavar="M", help="file, folder or hub name")
        group.add_argument("--vocab-file")
        group.add_argument("--merge-file")
        group.add_argument("--vocab-size", type=int)
    return parser.parse_args(arguments)


def _problems(args: argparse.Namespace) -> dict[Split, list[Problem]]:
    if args.kind == "babi":
        splits = (Split.TRAIN, Split.TEST)
        if args.input is None:
            return {split: fetch_babi(split, args.tasks) for split in splits}
        return {split: read_babi(args.input, split, args.tasks) for split in splits}
    counts = {Split.TRAIN: args.train, Split.TEST: args.test, Split.BEYOND: getattr(args, "beyond", None)}
    if args.kind != "jsonl" and (min(counts.values()) < 0 or not any(counts.values())):
        raise MoREError("--train, --test and --beyond must be at least 0, and one of them above 0")
    if args.kind == "jsonl":
        return {split: read_problems(path) for split, path in counts.items() if path}
    return {split: generate(GENERATED[args.kind], split, count, args.seed) for split, count in counts.items() if count}


def _run(args: argparse.Namespace) -> None:
    for name in ("tokenizer_model", "vocab_file", "merge_file", "vocab_size"):
        if args.tokenizer_type is None and getattr(args, name) is not None:
            raise MoREError(f"{flag(name)} without --tokenizer-type: give both to write datasets")
    tokenizer = None if args.tokenizer_type is None else load(TokenizerOptions.from_args(args))
    Path(args.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    for split, problems in _problems(args).items():
        prefix = f"{args.output_prefix}_{split}"
        write_problems(f"{prefix}.jsonl", problems)
        written = f"{prefix}.jsonl: {len(problems)} problems"
        if tokenizer is not None:
            exercises = [Exercise(problem.text, problem.prompt, problem.task) for problem in problems]
            tokens = write_answers(f"{prefix}_document", exercises, tokenizer)
            written += f"; {prefix}_document: {tokens} tokens"
        print(written, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parse_arguments(arguments)
    with one_line_errors(os.path.basename(__file__)):
        _run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
