#!/usr/bin/env python
"""What goes on inside a model as it reads a text. See docs/evaluation.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, one_line_errors
from more_megatron.evaluation.exported_model import add_model_arguments


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    experts = commands.add_parser("experts", help="which expert takes which kinds of tokens, by layer and step")
    _add_common(experts)
    experts.set_defaults(run=_experts)
    return parser.parse_args(arguments)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every analysis reads and writes."""
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text to read, of any kind")
    parser.add_argument("--max-tokens", type=int, default=20_000, metavar="N", help="of the text (default: 20000)")
    parser.add_argument("--num-steps", type=int, metavar="R", help="recurrence steps (default: the model's own)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of JSON and figures")


def _experts(args: argparse.Namespace) -> list[str]:
    # The libraries take seconds to import, and --help needs none of them.
    from more_megatron.evaluation.analysis.experts import analyze_experts

    return analyze_experts(args)


def main(arguments: list[str] | None = None) -> int:
    """Run the analysis and return the exit code."""
    args = parse_arguments(arguments)
    with one_line_errors(Path(__file__).name, OSError):
        try:
            for line in args.run(args):
                print(line)
        except KeyboardInterrupt:
            raise MoREError("interrupted; nothing was written") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
