"""Balance figures for each step of a repeated router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker

from more_megatron.blocks.statistics import IterationTracker
from more_megatron.model.depth import Depth
from tests.blocks.test_iterated_router import Calls
from tests.helpers.models import HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH = 12, 2


class _Writer:
    """A stand-in for the writers of TensorBoard and Weights & Biases."""

    def __init__(self) -> None:
        self.written: dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """Write as TensorBoard does."""
        assert iteration == 3
        self.written[name] = float(value)

    def log(self, values: dict[str, Any], iteration: int) -> None:
        """Write as Weights & Biases does."""
        for name, value in values.items():
            self.add_scalar(name, value, iteration)


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


def _reported(tracker: IterationTracker) -> dict[str, float]:
    writer, wandb = _Writer(), _Writer()
    tracker.report(1.0, 3, writer=writer, wandb_writer=wandb)
    assert wandb.written == writer.written
    return writer.written


def _figures() -> None:
    start_ranks()
    for mode in RECOMPUTATION:
        tracker = IterationTracker(max_steps=6)
        set_moe_metrics_tracker(tracker)
        calls = _forward(Depth(2, 2), mode)
        assert _reported(tracker) == pytest.approx(_expected(calls, 4), rel=1e-4), mode
        # A report ends what was recorded; steps that nobody took are left out.
        assert _reported(tracker) == {}
        _forward(Depth(0, 1), mode)
        assert len(_reported(tracker)) == 2
        # Micro-batches of different depth: each step is averaged over those that took it.
        for depth in (Depth(0, 2), Depth(1, 2)):
            calls = _forward(depth, mode)
        assert _reported(tracker) == pytest.approx(_expected(calls, 3), rel=1e-4), mode
        _forward(Depth(2, 2), mode, training=False)
        assert _reported(tracker) == {}


def test_each_step_has_its_figures_once() -> None:
    run_ranks(1, _figures)


def _average_over_ranks() -> dict[str, float]:
    start_ranks()
    tracker = IterationTracker(max_steps=2, losses=("entropy_loss",))
    rank = torch.distributed.get_rank()
    # The second rank took the first step only.
    for step in range(2 - rank):
        tracker.record_step(step, torch.tensor([1.0 + rank, 3.0 * rank]))
    tracker.record("entropy_loss", torch.tensor(0.5), layer_number=1, num_layers=1)
    writer = _Writer()
    tracker.report(1.0, 3, writer=writer, track_names=[], num_layers=1)
    return writer.written


def test_figures_are_averaged_over_ranks() -> None:
    for written in run_ranks(2, _average_over_ranks):
        assert written == pytest.approx(
            {
                "router entropy/step 1": 1.5,
                "router entropy/step 2": 1.0,
                "expert load cv/step 1": 1.5,
                "expert load cv/step 2": 0.0,
                "entropy_loss": 0.5,
            }
        )
