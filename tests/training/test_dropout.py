"""With dropout on, recomputation draws the masks of the first pass again: losses and gradients stay as they were."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from more_megatron.systems import systems
from tests.helpers.corpus import write_corpus
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of
from tests.helpers.training import TINY_ON_FILES, History

_RUN = f"{TINY_ON_FILES} --num-layers 2 --train-iters 2 --split 90,10,0 --attention-dropout 0.2 --hidden-dropout 0.2"
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a dataset."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@functools.cache
def _histories(layout: str, system: str, corpus: Path) -> dict[str, History]:
    """Return what runs of a system under a layout report, by recomputation."""
    ranks, flags = _LAYOUTS[layout]
    run = f"{_RUN} --data-path {corpus} {flags_of(system, _DEPTH)} {flags}"
    lines = [f"{run} {recomputation}" for recomputation in _RECOMPUTATION.values()]
    return dict(zip(_RECOMPUTATION, run_ranks(ranks, train_all, lines)[0], strict=True))


@pytest.mark.parametrize("system", systems())
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "TP2+SP" else pytest.mark.matrix) for name in _LAYOUTS]
)
def test_recomputation_changes_nothing(corpus: Path, layout: str, system: str) -> None:
    histories = _histories(layout, system, corpus)
    for recomputation, recomputed in histories.items():
        assert recomputed.losses == pytest.approx(histories["off"].losses, rel=1e-5), recomputation
        assert recomputed.grad_norms == pytest.approx(histories["off"].grad_norms, rel=1e-5), recomputation
