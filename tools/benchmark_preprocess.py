#!/usr/bin/env python
"""Speed of preprocessing for each kind of tokenizer, against a pool that encodes documents one by one.

Both sides run as fresh processes in turn and must write the same files. Steady MB/s is taken over the second half of
the input.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.data.benchmark import Kind, Side, compare, make_corpus, make_tokenizer, run_side
from more_megatron.data.sample_text import write_sample_text
from more_megatron.data.tokenizers import TokenizerOptions
from more_megatron.errors import one_line_errors

_ROW = "{:<12} {:<11} {:>9} {:>12} {:>14} {:>8} {:>8}"


def main(arguments: list[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="FILE", help="WikiText or other text (default: Python's documentation)")
    parser.add_argument("--megabytes", type=float, default=100.0, help="JSON lines to make of it (default: 100)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="paired runs (default: 5)")
    kinds = [kind.value for kind in Kind]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--run-side", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    with one_line_errors(Path(__file__).name, OSError):
        if args.run_side:
            side, corpus, kind, model, prefix, workers = args.run_side
            print(json.dumps(run_side(Side(side), corpus, TokenizerOptions(kind, model), prefix, int(workers))))
        else:
            with tempfile.TemporaryDirectory() as folder:
                _measure(args, Path(folder))
    return 0


def _measure(args: argparse.Namespace, folder: Path) -> None:
    source = args.input
    if source is None:
        source = str(folder / "text.txt")
        print(write_sample_text(source))
    corpus = folder / "corpus.jsonl"
    make_corpus(source, corpus, args.megabytes)
    size = corpus.stat().st_size / 1e6
    print(f"{size:.0f} MB of JSON lines, {args.workers} workers, medians of {args.runs} paired runs")
    print(_ROW.format("tokenizer", "side", "seconds", "steady MB/s", "steady Mtok/s", "whole x", "steady x"))
    for kind in args.kinds:
        options = make_tokenizer(Kind(kind), source, folder)
        timings = compare(__file__, corpus, options, folder, args.workers, args.runs)
        ours, theirs = timings[Side.OURS], timings[Side.ONE_BY_ONE]
        for side, timing in timings.items():
            is_ours = side is Side.OURS
            print(
                _ROW.format(
                    kind,
                    side,
                    f"{timing.seconds:.2f}",
                    f"{timing.steady:.1f}",
                    f"{timing.steady * timing.tokens / size / 1e6:.2f}",
                    f"{theirs.seconds / ours.seconds:.1f}" if is_ours else "",
                    f"{ours.steady / theirs.steady:.1f}" if is_ours and theirs.steady else "",
                ),
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
