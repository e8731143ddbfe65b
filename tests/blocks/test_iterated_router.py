"""The router of an iterated layer: averaged logits, averaged losses, the entropy floor, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

from more_megatron.blocks.router import IteratedRouter
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch, Pass
from tests.helpers.models import EXPERTS, HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH = 12, 2
_TOKENS = _LENGTH * _BATCH
_SAMPLES = (0, 1)


def _model(**fields: Any) -> GPTModel:
    config = small_config("recurrent_moe", **{"moe_router_topk": 2, **fields})
    return gpt_model(config, _LENGTH, weight_std=0.3).train()


def _router(model: GPTModel) -> IteratedRouter:
    return model.decoder.layers[0].mlp.router


def _pass(index: int, depth: Depth) -> Pass:
    return Pass(MicroBatch(depth), index, former={}, left={}, in_graph=True)


def _embeddings() -> torch.Tensor:
    return torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(5)).requires_grad_()


@dataclass
class Calls:
    """What a router saw and decided, call by call."""

    states: list[torch.Tensor] = field(default_factory=list)  # its inputs, [s, b, h]
    logits: list[torch.Tensor] = field(default_factory=list)  # logits that it routed by, [s, b, experts]
    maps: list[torch.Tensor] = field(default_factory=list)  # routing maps, [tokens, experts]

    @classmethod
    def of(cls, router: IteratedRouter) -> Calls:
        """Watch a router from now on."""
        calls, gating, routing = cls(), router.gating, router.routing

        def watched_gating(state: torch.Tensor) -> torch.Tensor:
            calls.states.append(state.detach().clone())
            return gating(state)

        def watched_routing(logits: torch.Tensor, **kwargs: Any) -> tuple:
            probs, routing_map = routing(logits, **kwargs)
            calls.logits.append(logits.detach().clone())
            calls.maps.append(routing_map.clone())
            return probs, routing_map

        router.gating, router.routing = watched_gating, watched_routing
        return calls


def _averaged_logits() -> None:
    start_ranks()
    for depth in (Depth(0, 4), Depth(3, 2), Depth(4, 0)):
        former = {}
        for beta in (0.0, 0.9):
            for training in (True, False):
                model = _model(router_logit_ema=beta).train(training)
                calls = Calls.of(_router(model))
                logits(model, _embeddings(), depth, _SAMPLES if training else ())
                _check_average(calls, _router(model).weight.detach(), beta, depth.steps)
                former[beta] = calls
        # The average has its say: what follows the first step is routed differently, the first step is not.
        assert torch.equal(former[0.9].maps[0], former[0.0].maps[0])
        assert not torch.equal(former[0.9].maps[1], former[0.0].maps[1])


def _check_average(calls: Calls, weight: torch.Tensor, beta: float, steps: int) -> None:
    assert len(calls.states) == len(calls.maps) == steps
    average = None
    for state, used, routing_map in zip(calls.states, calls.logits, calls.maps, strict=True):
        new = state @ weight.T
        average = new if average is None else beta * average + (1.0 - beta) * new
        torch.testing.assert_close(used, average, rtol=1e-5, atol=1e-5)
        chosen = used.flatten(0, 1).topk(2, dim=1).indices
        assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, chosen, True))


def _a_flip_of_the_average() -> None:
    """A state whose own logits choose one expert, while those of the step before outweigh them."""
    start_ranks()
    for beta, expected in ((0.0, 1), (0.4, 1), (0.6, 0)):
        router = _router(_model(moe_router_topk=1, router_logit_ema=beta))
        with torch.no_grad():
            router.weight.zero_()
            router.weight[0, 0] = router.weight[1, 1] = 1.0
        first, second = torch.eye(HIDDEN)[:2].view(2, 1, 1, HIDDEN)
        with router.at(_pass(0, Depth(0, 2))) as call:
            router(first)
        assert (call.carried is None) == (beta == 0.0)
        with router.at(_pass(1, Depth(0, 2)), call.carried):
            probs, routing_map = router(second)
        assert routing_map.flatten().nonzero().item() == expected
        share = torch.zeros(EXPERTS)
        share[0], share[1] = beta, 1.0 - beta
        assert float(probs.max()) == pytest.approx(float(share.softmax(0)[expected]), rel=1e-5)


def test_routing_follows_the_average_of_the_logits() -> None:
    run_ranks(1, _averaged_logits)
    run_ranks(1, _a_flip_of_the_average)


def _entropy_floor() -> None:
    start_ranks()
    floor, coefficient = 1.0, 0.3
    generator = torch.Generator().manual_seed(2)
    values = 2.0 * torch.randn(_LENGTH, _BATCH, EXPERTS, generator=generator)
    values[0, 0] = torch.tensor([40.0, 0.0, 0.0, 0.0])  # as sure of itself as can be
    values[1, 0] = 0.0  # as unsure as can be
    for grad_steps in (1, 4):
        weight = 1.0 / grad_steps
        for padding in (None, torch.rand(_LENGTH, _BATCH, generator=generator) < 0.3):
            destroy_moe_metrics_tracker()
            router = _router(_model(router_min_entropy=floor, router_min_entropy_coeff=coefficient))
            leaf = values.clone().requires_grad_()
            with router.at(_pass(0, Depth(0, grad_steps))):
                probs, _ = router.routing(leaf, padding_mask=padding)
            (gradient,) = torch.autograd.grad((probs * 0.0).sum(), leaf)
            plain = values.clone().requires_grad_()
            distribution = plain.softmax(-1)
            entropy = -(distribution * distribution.clamp(min=1e-30).log()).sum(-1)
            shortfall = (floor - entropy).clamp(min=0.0)
            penalty = shortfall.mean() if padding is None else shortfall[~padding].mean()
            (expected,) = torch.autograd.grad(coefficient * weight * penalty, plain)
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
            assert torch.count_nonzero(gradient[1, 0]) == 0
            recorded = float(get_moe_metrics_tracker().metrics["entropy_loss"].values.sum())
            assert recorded == pytest.approx(float(weight * penalty), rel=1e-5)
    _no_floor_where_there_is_none(values)


def _no_floor_where_there_is_none(values: torch.Tensor) -> None:
    """Neither without a floor, nor in evaluation, nor without gradient."""
    destroy_moe_metrics_tracker()
    for fields, training, grad in (({}, True, True), ({"router_min_entropy": 1.0}, False, True)):
        router = _router(_model(**fields).train(training))
        leaf = values.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            probs, _ = router.routing(leaf)
        (gradient,) = torch.autograd.grad((probs * 0.0).sum(), leaf)
        assert torch.count_nonzero(gradient) == 0
    with torch.no_grad():
        _router(_model(router_min_entropy=1.0)).routing(values)
    assert "entropy_loss" not in get_moe_metrics_tracker().metrics


def test_the_entropy_floor_has_the_value_and_gradient_of_its_formula() -> None:
    run_ranks(1, _entropy_floor)


_LOSSES = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.2,
    "moe_z_loss_coeff": 0.1,
    "router_min_entropy": 1.3,
    "router_min_entropy_coeff": 0.5,
}


def _losses_of(depth: Depth, **fields: Any) -> tuple[dict[str, float], torch.Tensor]:
    """Return each recorded loss, and the router's gradient from the losses alone."""
    destroy_moe_metrics_tracker()
    # A scale of zero makes every step see the same state, and leaves the losses as the router's only gradient.
    model = _model(recurrence_residual_scale=0.0, **_LOSSES, **fields)
    output = logits(model, _embeddings(), depth, _SAMPLES)
    output.sum().backward()
    metrics = get_moe_metrics_tracker().metrics
    return {name: float(entry.values.sum()) for name, entry in metrics.items()}, _router(model).weight.grad


def _averaged_losses() -> None:
    start_ranks()
    expected, gradient = _losses_of(Depth(0, 1))
    assert set(expected) == {"load_balancing_loss", "z_loss", "entropy_loss"}
    assert min(expected.values()) > 0.0
    assert float(gradient.abs().max()) > 1e-3
    for depth in (Depth(0, 4), Depth(3, 2), Depth(5, 1)):
        for fields in RECOMPUTATION.values():
            losses, of_losses = _losses_of(depth, **fields)
            assert losses == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}, fields
            torch.testing.assert_close(of_losses, gradient, rtol=1e-4, atol=1e-6)
    # Evaluation-like passes carry no loss.
    losses, of_losses = _losses_of(Depth(3, 0))
    assert losses == {}
    assert of_losses is None


def test_losses_are_averaged_over_the_steps_with_gradient() -> None:
    run_ranks(1, _averaged_losses)


def _counted_tokens(depth: Depth, training: bool = True, **fields: Any) -> torch.Tensor:
    """Return how often each expert was counted in a forward and backward pass, [experts]."""
    model = _model(
        moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid", moe_router_pre_softmax=False, **fields
    ).train(training)
    router = _router(model)
    calls = Calls.of(router)
    output = logits(model, _embeddings(), depth, _SAMPLES if training else ())
    if depth.grad_steps > 0:
        output.sum().backward()
    by_hand = torch.stack([routing_map.sum(0) for routing_map in calls.maps[: depth.steps]]).sum(0)
    counts = router.local_tokens_per_expert
    if training:
        assert torch.equal(counts, by_hand.to(counts)), (depth, fields)
    return counts


def _counts() -> None:
    start_ranks()
    for depth in (Depth(0, 1), Depth(0, 3), Depth(2, 2)):
        for fields in RECOMPUTATION.values():
            counts = _counted_tokens(depth, **fields)
            assert float(counts.sum()) == depth.steps * 2 * _TOKENS, (depth, fields)
    assert float(_counted_tokens(Depth(2, 2), training=False).sum()) == 0.0


def test_the_tokens_of_an_expert_are_counted_in_every_step_once() -> None:
    run_ranks(1, _counts)
