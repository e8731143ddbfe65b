#!/usr/bin/env python
"""Megatron checkpoints to Hugging Face models and back. See docs/conversion.md."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.systems.forms import OURS, forms

_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a torch_dist checkpoint of any layout to a Hugging Face folder")
    to_hf.add_argument("--load", type=Path, required=True, metavar="CKPT", help="folder that the run saved to")
    to_hf.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder of the Hugging Face model")
    to_hf.add_argument(
        "--ckpt-step", dest="step", type=int, metavar="N", help="iteration of the checkpoint (default: the newest)"
    )
    to_hf.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest weights file (default: 5GB)"
    )
    known = f"form of the model: {', '.join(forms())} (default: {OURS.name})"
    to_hf.add_argument("--format", dest="form", default=OURS.name, metavar="F", help=known)
    tokenizer = to_hf.add_mutually_exclusive_group()
    tokenizer.add_argument("--tokenizer-model", metavar="M", help="where the tokenizer is, if it has moved")
    tokenizer.add_argument("--no-tokenizer", dest="tokenizer", action="store_false", help="leave the tokenizer out")
    to_hf.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer run code of its own")
    from_hf = commands.add_parser("from-hf", help="a Hugging Face folder to a checkpoint that runs begin from")
    from_hf.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of the Hugging Face model")
    from_hf.add_argument("--save", type=Path, required=True, metavar="CKPT", help="folder that --load will name")
    for command in (to_hf, from_hf):
        command.add_argument("--dtype", choices=_DTYPES, help="dtype of the weights (default: as they are)")
        command.add_argument("--verify", action="store_true", help="read the result again and compare")
        command.add_argument("--no-progress", dest="progress", action="store_false", help="draw no progress bar")
    return parser.parse_args(arguments)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a size: write one as 5GB or 500MB")
    return int(float(found[1]) * _UNITS[found[2]])


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    options = vars(parse_arguments(arguments))
    with one_line_errors(Path(__file__).name):
        try:
            for line in _run(options.pop("command"), options):
                print(line)
        except KeyboardInterrupt:
            raise MoREError("interrupted; nothing was written") from None
    return 0


def _run(command: str, options: dict[str, Any]) -> list[str]:
    """Convert; the flags of a command, by their `dest`, are the arguments of its function."""
    # The libraries take seconds to import, and --help needs none of them.
    if command == "from-hf":
        from more_megatron.hf.conversion.importer import from_hf

        return from_hf(**options)
    from more_megatron.hf.conversion.export import to_hf

    return to_hf(**options)


if __name__ == "__main__":
    sys.exit(main())
