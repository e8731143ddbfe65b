"""Balance figures for each step of a repeated router."""

from typing import Any

import pytest
import torch

from more_megatron.blocks.statistics import LossTracker, router_figures
from more_megatron.model.depth import Depth
from more_megatron.monitoring.figures import Figures, report_to
from tests.blocks.test_iterated_router import Calls
from tests.helpers.models import HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH = 12, 2


def _forward(depth: Depth, mode: str, training: bool = True) -> Calls:
    """Pass forward and backward and return what the router of the only layer did."""
    model = gpt_model(small_config("recurrent_moe", moe_router_topk=2, **RECOMPUTATION[mode]), _LENGTH, weight_std=0.3)
    model.train(training)
    calls = Calls.of(model.decoder.layers[0].mlp.router)
    embeddings = torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(5)).requires_grad_()
    logits(model, embeddings, depth, (0, 1)).sum().backward()
    return calls


def _expected(calls: Calls, steps: int) -> dict[str, float]:
    figures = {}
    for step in range(steps):
        distribution = calls.logits[step].flatten(0, 1).softmax(-1)
        entropy = -(distribution * distribution.log()).sum(-1).mean()
        load = calls.maps[step].sum(0).double()
        figures[f"router entropy/step {step + 1}"] = float(entropy)
        figures[f"expert load cv/step {step + 1}"] = float(load.std(correction=0) / load.mean())
    return figures


def _reported(figures: Figures) -> dict[str, float]:
    means = figures.means()
    figures.clear()
    return means


def _figures() -> None:
    start_ranks()
    for mode in RECOMPUTATION:
        figures = Figures(router_figures(6))
        report_to(figures)
        calls = _forward(Depth(2, 2), mode)
        assert _reported(figures) == pytest.approx(_expected(calls, 4), rel=1e-4), mode
        # Steps that nobody took are left out.
        _forward(Depth(0, 1), mode)
        assert len(_reported(figures)) == 2
        # Micro-batches of different depth: each step is averaged over those that took it.
        for depth in (Depth(0, 2), Depth(1, 2)):
            calls = _forward(depth, mode)
        assert _reported(figures) == pytest.approx(_expected(calls, 3), rel=1e-4), mode
        _forward(Depth(2, 2), mode, training=False)
        assert _reported(figures) == {}


def test_each_step_has_its_figures_once() -> None:
    run_ranks(1, _figures)


class _Writer:
    def __init__(self) -> None:
        self.written: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """Write as TensorBoard does."""
        assert iteration == 3
        self.written[name] = float(value)


def _losses() -> dict[str, float]:
    start_ranks()
    tracker = LossTracker(("entropy_loss",))
    tracker.record("entropy_loss", torch.tensor(0.5), layer_number=1, num_layers=1)
    tracker.record("other_loss", torch.tensor(0.5), layer_number=1, num_layers=1)
    writer = _Writer()
    tracker.report(1.0, 3, writer=writer, track_names=[], num_layers=1)
    return writer.written


def test_losses_of_a_system_are_reported_besides_those_of_megatron() -> None:
    assert run_ranks(1, _losses) == [{"entropy_loss": 0.5}]
