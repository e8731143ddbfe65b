#!/usr/bin/env python
"""A model on language modelling and reasoning tasks, at several depths. See docs/evaluation.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.detokenize import Detokenize
from more_megatron.errors import OneLineParser, one_line_errors
from more_megatron.evaluation.exported_model import add_model_arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__)
    add_model_arguments(parser)
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="wikitext, babi, arithmetic, chains, algebra, paths, hellaswag, or any task of lm-evaluation-harness",
    )
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TASK=FILE",
        help="text of wikitext, problems of tools/prepare_tasks.py, HellaSwag's JSON lines; several files of one task "
        "are evaluated each by itself",
    )
    group.add_argument("--num-steps", nargs="+", type=int, metavar="R", help="recurrence steps (default: the model's)")
    group.add_argument(
        "--exit-criterion",
        metavar="NAME",
        help="let each token stop by itself by kl, entropy-diff, latent-diff, argmax-stability or cosine",
    )
    group.add_argument("--exit-threshold", type=float, metavar="T", help="when it does (default: the criterion's)")
    group.add_argument("--limit", type=int, metavar="N", help="only N of each task, to try things")
    group.add_argument(
        "--seq-length", type=int, metavar="S", help="tokens of a window (default: the model's positions)"
    )
    group.add_argument(
        "--detokenize",
        choices=[mode.value for mode in Detokenize],
        default=Detokenize.NONE.value,
        help="undo WikiText's spelling, as it was for training",
    )
    group.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of results; a task and depth that has one there is not evaluated again",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluation and return the exit code."""
    args = parse_arguments(arguments)
    with one_line_errors(Path(__file__).name, lambda: "; the same command goes on where it stopped"):
        # The libraries take seconds to import, and --help needs none of them.
        from more_megatron.evaluation.harness.evaluation import evaluate

        for line in evaluate(args):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
