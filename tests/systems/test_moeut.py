"""`moeut`: the stack against a slow reference, its entropy balance, its sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from more_megatron.config import MoREConfig
from more_megatron.model.depth import Depth
from tests.helpers.models import (
    HIDDEN,
    RECOMPUTATION,
    VOCABULARY,
    build_model,
    logits,
    redraw,
    small_config,
    start_ranks,
)
from tests.helpers.ranks import run_ranks
from tests.systems.moeut_reference import ReferenceMoEUT, Sizes

_LENGTH, _BATCH, _LAYERS, _TOPK, _WIDTH = 9, 3, 2, 3, 24
_COEFFICIENTS = {"expert": 0.3, "value": 0.2, "output": 0.2}
_KINDS = {1: ("expert",), 4: ("expert", "value", "output")}


def _config(head_experts: int, **fields: Any) -> MoREConfig:
    return small_config(
        "moeut",
        num_layers=_LAYERS,
        moe_router_topk=_TOPK,
        num_moe_experts=6,
        moe_ffn_hidden_size=_WIDTH,
        normalization="LayerNorm",
        switchhead_num_experts=head_experts,
        moeut_balance_coeff=_COEFFICIENTS["expert"],
        switchhead_balance_coeff=_COEFFICIENTS["value"],
        **fields,
    )


def _model(config: MoREConfig, std: float = 0.3) -> Any:
    model = build_model(config, _LENGTH, VOCABULARY, rotary_percent=0.5)
    redraw(model, std)
    return model


def _embeddings() -> torch.Tensor:
    return torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(3)).requires_grad_()


def _weighed(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).sum()


def _reference(config: MoREConfig, model: Any) -> ReferenceMoEUT:
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    sizes = Sizes(
        layers=_LAYERS,
        heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        rotary=config.kv_channels // 2,
        head_experts=config.switchhead_num_experts,
        head_topk=min(config.switchhead_topk, config.switchhead_num_experts),
        topk=_TOPK,
    )
    return ReferenceMoEUT(sizes, weights)


def _equals_the_reference(head_experts: int, depth: Depth, recomputation: dict[str, Any]) -> None:
    start_ranks()
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    config = _config(head_experts, **recomputation)
    model, ours, theirs = _model(config), _embeddings(), _embeddings()
    reference = _reference(config, model)
    output = logits(model, ours, depth, (1, 2, 3))
    _weighed(output).backward()
    expected, losses = reference.forward(theirs, depth.no_grad_steps, depth.grad_steps)
    (_weighed(expected) + sum(_COEFFICIENTS[kind] * loss for kind, loss in losses.items())).backward()

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    recorded = get_moe_metrics_tracker().metrics
    assert set(recorded) == {f"{kind}_balance_loss" for kind in _KINDS[head_experts]}
    for kind, loss in losses.items():
        torch.testing.assert_close(recorded[f"{kind}_balance_loss"].values.sum(), loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=2e-5)
    for name, parameter in model.named_parameters():
        if "word_embeddings" not in name:
            scale = float(reference.weights[name].grad.abs().max())
            assert scale > 1e-3, name
            torch.testing.assert_close(
                parameter.grad, reference.weights[name].grad, rtol=1e-5, atol=1e-5 * max(scale, 1.0), msg=name
            )


@pytest.mark.parametrize("recomputation", RECOMPUTATION)
@pytest.mark.parametrize("depth", [Depth(0, 1), Depth(2, 2)])
@pytest.mark.parametrize("head_experts", _KINDS)
def test_logits_losses_and_gradients_equal_a_slow_reference(
    head_experts: int, depth: Depth, recomputation: str
) -> None:
    run_ranks(1, _equals_the_reference, head_experts, depth, RECOMPUTATION[recomputation])
