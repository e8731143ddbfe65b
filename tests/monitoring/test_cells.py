"""What experts with recurrent cells report: of gates and refinements, the same under every layout."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from more_megatron.monitoring.figures import Figures, report_to
from more_megatron.monitoring.refinement import REFINEMENT_FIGURES, Refinement
from more_megatron.systems import get_system
from tests.helpers.models import small_config
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY

_SYSTEMS = ("parallel_experts", "sequential_experts")
_SELECTIVE = "--recompute-granularity selective --recompute-modules moe"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


@pytest.mark.parametrize("name", _SYSTEMS)
def test_figures_do_not_depend_on_the_layout(name: str, tmp_path: Path) -> None:
    depth = "--recurrence-steps 3 --recurrence-backprop-steps 2" if get_system(name).recurrent else ""
    run = f"{TINY} --num-layers 2 --train-iters 3 --more-variant {name} {depth}"
    first, *rest = (f"{run} --load {tmp_path} {layout}" for layout in ("", _SELECTIVE, _FULL))
    saving = f"{run} --save {tmp_path} --save-interval 1 --exit-interval 1"
    _, *alone = run_ranks(1, train_all, [saving, first, *rest])[0]
    split = run_ranks(2, train_all, [f"{first} --tensor-model-parallel-size 2"])[0]
    expected = alone[0].figures
    assert [set(step) for step in expected] == [set(get_system(name).figures(small_config(name)))] * 2
    for history in (*alone[1:], *split):
        for ours, theirs in zip(history.figures, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    # Gates start undecided.
    gate, entropy = expected[0].get("lstm gate"), expected[0].get("lstm gate entropy")
    assert gate is None or gate == pytest.approx(0.5, abs=0.05)
    assert entropy is None or math.log(2) - 0.01 < entropy < math.log(2) + 1e-6


def _refinements() -> dict[str, float]:
    figures = Figures(REFINEMENT_FIGURES)
    report_to(figures)
    states = [
        torch.tensor(state) for state in ([[3.0, 4.0], [1.0, 0.0]], [[3.0, 5.0], [1.0, 2.0]], [[3.0, 7.0], [1.0, 0.0]])
    ]
    refinement = Refinement()
    for before, after in itertools.pairwise(states):
        refinement.add(before, after, gate=torch.tensor([[0.25], [0.75]]))
    refinement.record(lambda rows: rows, group=None)
    report_to(None)
    return figures.means()


def test_a_refinement_is_measured_by_its_size_and_by_its_agreement_with_the_one_before() -> None:
    (means,) = run_ranks(1, _refinements)
    sizes = (1 / 5, 2 / 1, 2 / math.sqrt(34), 2 / math.sqrt(5))
    assert means == pytest.approx(
        {"refinement gate": 0.5, "refinement size": sum(sizes) / 4, "refinement consistency": (1 - 1) / 2}, abs=1e-6
    )
