"""Stands in for `pretrain_more.py` and its launcher, and for `tools/evaluate.py`: says what they would, in a moment.

The loss is a function of system and seed. Seed 13 fails; with STUCK set a run says so and waits. What has recurrence
steps was watched, the rest not.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    """Run."""
    words = sys.argv[1:]
    if "--tasks" in words:
        return _answer(words)
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
    print(*words)
    for step in (1, steps):
        print(f" iteration {step:8d}/{steps:8d} | elapsed time per iteration (ms): 10.0 | global batch size: 4 | "
              f"lm loss: {loss + 1 / step:.6E} |")  # fmt: skip
    where = f"at iteration {steps} on validation set"
    print(f" validation loss {where} | lm loss value: {loss:.6E} | lm loss PPL: 1.0E+00 | ")
    if "--recurrence-eval-depths" in values:
        for depth in (1, 2):
            # At one depth one seed has lost itself, and says so as Megatron does.
            shown = "NAN" if (depth, seed) == (1, 2) else f"{loss + depth:.6E}"
            print(f" evaluation {where} with {depth} recurrence steps | lm loss: {shown} | "
                  f"chains exact match: 0.{depth}000 |")  # fmt: skip
        (checkpoint / "health.jsonl").write_text("".join(_health(step, seed) for step in (1, steps)))


def _answer(words: list[str]) -> None:
    """Answer problems of difficulties 2 and 3: the more steps, the better."""
    print(*words)
    depths = [int(word) for word in words[words.index("--num-steps") + 1 :][:2]] if "--num-steps" in words else [None]
    results = [
        {
            "name": "chains",
            "num_steps": depth,
            "measures": {"chains": {"exact_match": (depth or 0) / 10}},
            "by_difficulty": {"chains": {str(k): {"exact_match": (depth or 0) / k} for k in (2, 3)}},
        }
        for depth in depths
    ]
    folder = Path(words[words.index("--output") + 1])
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"results": results}))


def _health(iteration: int, seed: int) -> str:
    """Return what was watched in a training step: two layers whose experts are loaded alike, but not the same ones."""
    tags = [(layer, step) for layer in (1, 2) for step in (1, 2)]
    figures = {f"routing/layer {layer}/entropy/step {step}": layer + step + seed / 10 for layer, step in tags}
    figures |= {f"routing/layer {layer}/dead experts/step {step}": 1.0 for layer, step in tags}
    figures |= {f"routing/layer {layer}/load cv/step {step}": None for layer, step in tags}
    loads = {layer: [0.0, 0.25, 0.75][:: layer * 2 - 3] for layer in (1, 2)}
    experts = {f"routing/layer {layer}/load/step {step}": {"load": loads[layer]} for layer, step in tags}
    warnings = ["routing/dead experts is 1 in layer 1, step 1: raise it"] if iteration > 1 else []
    return json.dumps({"iteration": iteration, "figures": figures, "experts": experts, "warnings": warnings}) + "\n"


if __name__ == "__main__":
    main()
