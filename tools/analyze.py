#!/usr/bin/env python
"""What goes on inside a model as it reads a text. See docs/evaluation.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.evaluation.exported_model import add_model_arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    experts = commands.add_parser("experts", help="which expert takes which kinds of tokens, by layer and step")
    _add_common(experts)
    experts.set_defaults(analyze=_experts)
    recurrence = commands.add_parser(
        "recurrence",
        help="how states move over the steps of a recurrence; or with --run how healthy a training run was",
    )
    _add_common(recurrence, max_tokens=128, steps="64, or as many as the model can take", required=False)
    recurrence.add_argument(
        "--initial-states", type=int, default=4, metavar="K", help="random ones to start from (default: 4)"
    )
    recurrence.add_argument(
        "--run", type=Path, metavar="FOLDER", help="draw the health.jsonl of a run's --save folder; no model is needed"
    )
    recurrence.set_defaults(analyze=_recurrence)
    return parser.parse_args(arguments)


def _add_common(
    parser: argparse.ArgumentParser, max_tokens: int = 20_000, steps: str = "the model's own", required: bool = True
) -> None:
    """Add what every analysis reads and writes."""
    add_model_arguments(parser, required)
    parser.add_argument("--text", type=Path, required=required, metavar="FILE", help="text to read, of any kind")
    parser.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"of the text (default: {max_tokens})"
    )
    parser.add_argument("--num-steps", type=int, metavar="R", help=f"recurrence steps (default: {steps})")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of JSON and figures")


def _experts(args: argparse.Namespace) -> list[str]:
    # The libraries take seconds to import, and --help needs none of them.
    from more_megatron.evaluation.analysis.experts import analyze_experts

    return analyze_experts(args)


def _recurrence(args: argparse.Namespace) -> list[str]:
    if args.run is not None:
        from more_megatron.evaluation.analysis.health_page import draw_health

        return draw_health(args.run, args.output)
    if args.text is None or (args.model is None and args.load is None):
        raise MoREError("give --text and one of --model and --load; or --run for the health of a training run")
    from more_megatron.evaluation.analysis.recurrence import analyze_recurrence

    return analyze_recurrence(args)


def main(arguments: list[str] | None = None) -> int:
    """Run the analysis and return the exit code."""
    args = parse_arguments(arguments)
    with one_line_errors(Path(__file__).name, lambda: "; nothing was written"):
        for line in args.analyze(args):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
