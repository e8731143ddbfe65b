"""What experts with recurrent cells report: of gates and refinements."""

import itertools
import math

import pytest
import torch

from more_megatron.monitoring.figures import Figures, report_to
from more_megatron.monitoring.recurrence import REFINEMENT_FIGURES, Refinement
from more_megatron.systems import get_system
from tests.helpers.models import small_config
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of
from tests.helpers.training import TINY

_SYSTEMS = ("parallel_experts", "sequential_experts")


def test_each_step_reports_them_and_gates_start_undecided() -> None:
    # That they do not depend on the layout is looked at with the losses (tests/training/test_parity.py).
    depth = "--recurrence-steps 3 --recurrence-backprop-steps 2"
    lines = [f"{TINY} --num-layers 2 --train-iters 2 {flags_of(name, depth)}" for name in _SYSTEMS]
    for name, history in zip(_SYSTEMS, run_ranks(1, train_all, lines)[0], strict=True):
        assert [set(step) for step in history.figures] == [set(get_system(name).figures(small_config(name)))] * 2
        gate, entropy = history.figures[0].get("lstm gate"), history.figures[0].get("lstm gate entropy")
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
