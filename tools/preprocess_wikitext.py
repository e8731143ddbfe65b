#!/usr/bin/env python
"""Text files to a Megatron dataset: `P_text_document.bin`, `.idx` and a manifest `.json`. See docs/data.md."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.detokenize import Detokenize
from more_megatron.data.documents import Layout
from more_megatron.data.output import Output
from more_megatron.data.preprocess import Job, preprocess, verify
from more_megatron.data.sources import Source, expand_inputs, open_source
from more_megatron.data.tokenizers import SENTENCEPIECE_TYPES, TokenizerOptions, TokenizerType, load
from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.flags import check_ranges


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__)
    _add_data(parser.add_argument_group("input and output"))
    _add_tokenizer(parser.add_argument_group("tokenizer (Megatron's flags)"))
    group = parser.add_argument_group("run")
    group.add_argument("--workers", type=int, default=_cores(), help="processes (default: the cores there are)")
    group.add_argument("--resume", action="store_true", help="use the finished parts of an interrupted run")
    group.add_argument("--verify", action="store_true", help="read the result back with Megatron and compare samples")
    group.add_argument(
        "--encoder",
        choices=["auto", "reference"],
        default="auto",
        help="auto: gigatoken where it is installed and gives the same ids (default); reference: never",
    )
    group.add_argument("--no-progress", action="store_true", help="draw no progress bar")
    args = parser.parse_args(arguments)
    if args.train_tokenizer and not args.vocab_size:
        parser.error("--train-tokenizer needs --vocab-size")
    return args


def _add_data(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help="files and globs, also .jsonl, .parquet, .gz, .zst")
    source.add_argument("--dataset", metavar="NAME", help="wikitext-103-raw-v1, or OWNER/REPOSITORY/FOLDER")
    group.add_argument("--dataset-split", default="train", help="split of --dataset (default: train)")
    group.add_argument("--output-prefix", required=True, metavar="P", help="writes P_<key>_document.bin, .idx, .json")
    group.add_argument("--json-key", default="text", help="field or column that holds the text (default: text)")
    group.add_argument("--skip-bad-lines", action="store_true", help="leave out and count JSON lines that hold no text")
    group.add_argument(
        "--layout",
        choices=["auto", Layout.WIKITEXT.value, Layout.PLAIN.value],
        default="auto",
        help="documents of text files: an article for each ` = Title = `, or pieces cut at paragraphs",
    )
    group.add_argument(
        "--detokenize",
        choices=[mode.value for mode in Detokenize],
        default="none",
        help="undo WikiText's ` @-@ ` and spacing",
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents with the tokenizer's end-of-document token",
    )


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    types = [kind.value for kind in TokenizerType]
    group.add_argument(
        "--tokenizer-type", choices=types, default=types[0], metavar="T", help=f"one of {', '.join(types)}"
    )
    group.add_argument("--tokenizer-model", metavar="M", help="file, folder or hub name")
    group.add_argument("--train-tokenizer", action="store_true", help="train SentencePiece BPE on the inputs first")
    group.add_argument("--vocab-size", type=_positive, help="size to train; also for TikTokenizer and NullTokenizer")
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file")
    group.add_argument("--tokenizer-special-tokens", nargs="+", dest="special_tokens")
    group.add_argument("--tokenizer-metadata", dest="metadata_path")
    group.add_argument("--tiktoken-pattern", choices=["v1", "v2"])
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tokenizer-sentencepiece-legacy", action="store_true")
    group.add_argument(
        "--tokenizer-sentencepiece-ignore-extra-whitespaces", action=argparse.BooleanOptionalAction, default=True
    )
    group.add_argument("--tokenizer-hf-no-use-fast", action="store_true")
    group.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true")
    group.add_argument("--trust-remote-code", action="store_true")
    group.add_argument("--null-tokenizer-eod-id", type=int)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sources(args: argparse.Namespace) -> list[Source]:
    if args.dataset:
        from more_megatron.data.hub import download

        paths = download(args.dataset, args.dataset_split)
    else:
        paths = expand_inputs(args.input)
    layout = None if args.layout == "auto" else Layout(args.layout)
    mode = Detokenize(args.detokenize)
    sources = [open_source(path, args.json_key, layout, mode, args.skip_bad_lines) for path in paths]
    for source in sources:
        if source.is_guessed:
            note = f"{source.path} holds JSON lines and is read as such; --layout plain takes it for text"
            print(note, file=sys.stderr)
    return sources


def _train(args: argparse.Namespace, sources: list[Source]) -> str:
    from more_megatron.data.train_tokenizer import train_sentencepiece

    model = args.tokenizer_model or f"{args.output_prefix}_tokenizer.model"
    if args.tokenizer_type not in SENTENCEPIECE_TYPES:
        raise MoREError(f"--train-tokenizer trains SentencePiece; it cannot make a {args.tokenizer_type}")
    if not (args.resume and os.path.exists(model)):
        print(f"training a tokenizer of {args.vocab_size} pieces: {model}", file=sys.stderr)
        train_sentencepiece(sources, args.vocab_size, model)
    return str(model)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = parse_arguments(arguments)
    with one_line_errors(Path(__file__).name):
        check_ranges(args, {"workers": "[1, 1000]"})
        try:
            _run(args)
        except KeyboardInterrupt:
            raise MoREError("interrupted; run the same command with --resume to go on") from None
    return 0


def _run(args: argparse.Namespace) -> None:
    from more_megatron.progress import progress_bar

    with Output(f"{args.output_prefix}_{args.json_key}_document") as output:
        sources = _sources(args)
        if args.train_tokenizer:
            args.tokenizer_model = _train(args, sources)
        job = Job(
            sources=sources,
            tokenizer=load(TokenizerOptions.from_args(args)),
            append_eod=args.append_eod,
            workers=args.workers,
            resume=args.resume,
            allow_fast=args.encoder == "auto",
        )
        sizes = [source.text_size for source in sources]
        total = None if None in sizes else sum(size for size in sizes if size)
        with progress_bar(total, "B", "", not args.no_progress) as bar:

            def report(size: int, tokens: int) -> None:
                bar.set_postfix_str(f"{tokens / 1e6:.2f}M tokens", refresh=False)
                bar.update(size)

            manifest = preprocess(job, output, lambda text: bar.write(text, sys.stderr), report)
    skipped = f", {manifest['skipped']} bad lines left out" if manifest["skipped"] else ""
    counts = f"{manifest['documents']} documents, {manifest['tokens']} tokens{skipped}"
    print(f"{output.prefix}: {counts}", file=sys.stderr)
    if args.verify:
        print(f"{output.prefix}: {verify(job, output.prefix, manifest)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
