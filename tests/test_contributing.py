"""The system that CONTRIBUTING.md adds as an example, added and trained."""

from __future__ import annotations

import re

from tests.helpers.ranks import run_ranks
from tests.helpers.shell import PROJECT
from tests.helpers.training import TINY, train


def test_example_system_trains() -> None:
    new_file, row = re.findall(r"^```python\n(.*?)^```", (PROJECT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    (losses,) = run_ranks(1, _train_with, new_file, row)
    (baseline,) = run_ranks(1, _train_with, new_file, row, "moe")
    assert len(losses) == len(baseline) == 6
    assert losses != baseline, "the example's router changes nothing"


def _train_with(new_file: str, row: str, variant: str | None = None) -> list[float]:
    from more_megatron import variants

    names = dict(vars(variants))
    exec(new_file, names)
    added = eval("{" + row + "}", names)
    variants.VARIANTS.update(added)
    return train(f"{TINY} --more-variant {variant or next(iter(added))}").losses
