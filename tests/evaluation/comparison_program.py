"""Stands in for `pretrain_more.py` and its launcher: says what a run would, in a moment.

The loss is a function of system and seed. Seed 13 fails; with STUCK set a run says so and waits.
"""

import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Run."""
    words = sys.argv[1:]
    values = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
    seed, steps = int(values["--seed"]), int(values["--train-iters"])
    checkpoint = Path(values["--save"])
    checkpoint.mkdir(parents=True, exist_ok=True)
    if "STUCK" in os.environ:
        (checkpoint / "stuck").write_text(str(os.getpid()))
        time.sleep(600)
    if seed == 13:
        sys.exit("pretrain_more.py: error: --lr 0 is no rate: raise it")
    loss = len(values["--more-variant"]) / 10 + seed / 1000
    print("  seq_length ........ 16")
    for step in (1, steps):
        print(f" iteration {step:8d}/{steps:8d} | elapsed time per iteration (ms): 10.0 | global batch size: 4 | "
              f"lm loss: {loss + 1 / step:.6E} |")  # fmt: skip
    where = f"at iteration {steps} on validation set"
    print(f" validation loss {where} | lm loss value: {loss:.6E} | lm loss PPL: 1.0E+00 | ")
    if "--recurrence-eval-depths" in values:
        for depth in (1, 2):
            print(f" evaluation {where} with {depth} recurrence steps | lm loss: {loss + depth:.6E} | "
                  f"chains exact match: 0.{depth}000 |")  # fmt: skip


if __name__ == "__main__":
    main()
