"""Gradients that are reduced while the backward pass still runs, under a depth that varies."""

from __future__ import annotations

import itertools

import pytest

from more_megatron.systems import systems
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY, History

# Gradient steps vary from 1 to 3. Small buckets: several of them are reduced before the backward pass ends.
_DEPTH = (
    "--recurrence-sampling uniform --recurrence-min-steps 1 --recurrence-max-steps 4 --recurrence-backprop-steps 3 "
    "--recurrence-sampling-unit micro-batch"
)
_RUN = f"{TINY} --train-iters 4 --num-layers 2 --global-batch-size 8 --ddp-bucket-size 4000 {_DEPTH}"
_RECOMPUTATION = {
    "none": "",
    "selective": "--recompute-granularity selective --recompute-modules moe",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}
_RECURRENT = [name for name, variant in systems().items() if variant.recurrent]
# Recomputed one by one, the steps of an iterated router would each announce their gradients.
_SERVED = [
    (name, recomputation)
    for name, recomputation in itertools.product(_RECURRENT, _RECOMPUTATION)
    if not (systems()[name].repeats_router and recomputation == "selective")
]


@pytest.fixture(scope="module")
def histories() -> dict[tuple[str, str], History]:
    """Return what a run without overlap and runs with it reported, by system and recomputation."""
    lines = {(name, "apart"): f"{_RUN} --more-variant {name}" for name in _RECURRENT}
    for name, recomputation in _SERVED:
        overlap = f"--overlap-grad-reduce --overlap-param-gather {_RECOMPUTATION[recomputation]}"
        lines[name, recomputation] = f"{_RUN} --more-variant {name} {overlap}"
    return dict(zip(lines, run_ranks(2, train_all, list(lines.values()))[0], strict=True))


@pytest.mark.parametrize(("name", "recomputation"), _SERVED)
def test_overlapped_reduction_gives_the_same_gradients(
    histories: dict[tuple[str, str], History], name: str, recomputation: str
) -> None:
    apart, overlapped = histories[name, "apart"], histories[name, recomputation]
    assert len(set(apart.steps)) > 1
    assert overlapped.steps == apart.steps
    assert overlapped.losses == pytest.approx(apart.losses, rel=1e-6)
    assert overlapped.grad_norms == pytest.approx(apart.grad_norms, rel=1e-5)
