#!/usr/bin/env python
"""Check that this installation computes on its GPUs what a CPU computes, and how fast. See docs/gpu.md.

    python tools/check_gpu.py --output gpu-check

Every stage is printed as its answers come, and written to report.json and report.md in the output folder; why a case
failed is in failures.log. A case that fails ends no other. Exit code 1 if one did.

    a  environment        versions, what the defaults choose, peak of matrix products, bandwidth of memory
    b  parity             every system against the CPU in float32 and bf16, forward and gradients; noise of states
    c  training           loss falls under both backends; resume under the other one; export, and its logits
    d  FP8                losses of each recipe against bf16
    e  speed              tokens/s, TFLOP/s, memory, waits, step time against r; kernels of the slowest system
    f  layouts            over several GPUs: losses of each layout against one rank
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import OneLineParser, one_line_errors
from more_megatron.evaluation.gpu_check.stages import LETTERS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), metavar="DIR", help="default: gpu-check")
    parser.add_argument("--stages", default=LETTERS, metavar="LETTERS", help="default: all")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="default: all of the registry")
    parser.add_argument(
        "--budget", type=float, default=3600.0, metavar="SECONDS", help="what does not fit is skipped (default: 3600)"
    )
    parser.add_argument("--dry-run", action="store_true", help="every stage in miniature on the CPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the check and return its exit code."""
    args = parse_arguments(arguments)
    command = shlex.join(["python", "tools/check_gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    with one_line_errors(Path(__file__).name):
        from more_megatron.evaluation.gpu_check.runner import check

        report = check(args, command)
    print(f"\n{report.summary()}; see {args.output}/report.md")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
