"""Gradients that are reduced while the backward pass still runs, under a depth that varies."""

import itertools

import pytest

from more_megatron.systems import get_system, systems
from tests.helpers.models import small_config
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of
from tests.helpers.training import TINY, History

# Gradient steps vary from 1 to 3. Small buckets: several of them are reduced before the backward pass ends.
_DEPTH = (
    "--recurrence-sampling uniform --recurrence-min-steps 1 --recurrence-max-steps 4 --recurrence-backprop-steps 3 "
    "--recurrence-sampling-unit micro-batch --halting none"
)
_RUN = f"{TINY} --train-iters 4 --num-layers 2 --global-batch-size 8 --ddp-bucket-size 4000"
_RECOMPUTATION = {
    "none": "",
    "selective": "--recompute-granularity selective --recompute-modules moe",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}
_VARYING = [name for name, system in systems().items() if "recurrence_sampling" in system.reads]
# Recomputed one by one, the steps of an iterated router would each announce their gradients.
_SERVED = [
    (name, recomputation)
    for name, recomputation in itertools.product(_VARYING, _RECOMPUTATION)
    if not (systems()[name].repeats_router and recomputation == "selective")
]


def _gather(name: str) -> str:
    """Return the flag that overlaps the gathering of parameters, where a system serves it."""
    refused = list(get_system(name).refusals(small_config(name, num_layers=3, overlap_param_gather=True)))
    return "" if refused else "--overlap-param-gather"


# Recomputation of whole layers always, of parts of them with one system; the rest is in the whole matrix.
_ALWAYS = [case for case in _SERVED if case[1] != "selective"]
_ALWAYS += [case for case in _SERVED if case[1] == "selective"][:1]


@pytest.fixture(scope="module")
def histories(whole_matrix: bool) -> dict[tuple[str, str], History]:
    """Return what runs without overlap and runs with it report, by system and recomputation, in one world."""
    lines = {}
    for name, recomputation in _SERVED if whole_matrix else _ALWAYS:
        lines[name, "apart"] = apart = f"{_RUN} {flags_of(name, _DEPTH)}"
        overlap = f"--overlap-grad-reduce {_gather(name)} {_RECOMPUTATION[recomputation]}"
        lines[name, recomputation] = f"{apart} {overlap}"
    return dict(zip(lines, run_ranks(2, train_all, list(lines.values()), timeout=900.0)[0], strict=True))


@pytest.mark.parametrize(
    ("name", "recomputation"),
    [pytest.param(*case, marks=[] if case in _ALWAYS else pytest.mark.matrix) for case in _SERVED],
)
def test_overlapped_reduction_gives_the_same_gradients(
    histories: dict[tuple[str, str], History], name: str, recomputation: str
) -> None:
    apart, overlapped = histories[name, "apart"], histories[name, recomputation]
    assert len(set(apart.steps)) > 1
    assert overlapped.steps == apart.steps
    assert overlapped.losses == pytest.approx(apart.losses, rel=1e-6)
    assert overlapped.grad_norms == pytest.approx(apart.grad_norms, rel=1e-5)
