"""With dropout on, recomputation draws the masks of the first pass again: losses and gradients stay as they were."""

import functools
import itertools
from collections.abc import Callable

import pytest

from more_megatron.systems import systems
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of
from tests.helpers.training import TINY, History

_RUN = f"{TINY} --num-layers 2 --train-iters 2 --attention-dropout 0.2 --hidden-dropout 0.2"
_DEPTH = (
    "--recurrence-steps 3 --recurrence-backprop-steps 2 "
    "--recurrence-prelude-layers 1 --recurrence-coda-layers 0 --recurrence-group-layers 1"
)
_RECOMPUTATION = {
    "off": "",
    "attention": "--recompute-granularity selective",
    "moe": "--recompute-granularity selective --recompute-modules moe",
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
}
_LAYOUTS = {
    "one process": (1, ""),
    "TP2+SP": (2, "--tensor-model-parallel-size 2"),
    "TP2+SP x EP2": (
        2,
        "--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1",
    ),
}


_SYSTEMS = tuple(systems())
_LAYOUT_ALWAYS = "TP2+SP"
_KINDS = tuple(kind for kind in _RECOMPUTATION if kind not in ("off", "full"))


def _is_always(layout: str, system: str, recomputation: str) -> bool:
    """Return whether this is not left to the whole matrix: full recomputation, and another kind in turn."""
    own = _KINDS[_SYSTEMS.index(system) % len(_KINDS)]
    return layout == _LAYOUT_ALWAYS and recomputation in ("full", own)


@pytest.fixture(scope="module")
def histories(whole_matrix: bool) -> Callable[[str], dict]:
    """Return what gives the runs under a layout, by system and recomputation; they share a world."""

    @functools.cache
    def of(layout: str) -> dict[tuple[str, str], History]:
        ranks, flags = _LAYOUTS[layout]
        lines = {
            (system, kind): f"{_RUN} {flags_of(system, _DEPTH)} {flags} {recomputation}"
            for system in _SYSTEMS
            for kind, recomputation in _RECOMPUTATION.items()
            if whole_matrix or kind == "off" or _is_always(layout, system, kind)
        }
        return dict(zip(lines, run_ranks(ranks, train_all, list(lines.values()), timeout=900.0)[0], strict=True))

    return of


@pytest.mark.parametrize(
    ("layout", "system", "recomputation"),
    [
        pytest.param(*case, marks=[] if _is_always(*case) else pytest.mark.matrix)
        for case in itertools.product(_LAYOUTS, _SYSTEMS, _RECOMPUTATION)
        if case[-1] != "off"
    ],
)
def test_recomputation_changes_nothing(
    histories: Callable[[str], dict], layout: str, system: str, recomputation: str
) -> None:
    apart, recomputed = histories(layout)[system, "off"], histories(layout)[system, recomputation]
    assert recomputed.losses == pytest.approx(apart.losses, rel=1e-5)
    assert recomputed.grad_norms == pytest.approx(apart.grad_norms, rel=1e-5)
