"""`moeut`: the stack against a slow reference, its entropy balance, its sizes."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.depth import Depth
from more_megatron.systems import get_system
from more_megatron.training.model import check_system
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
    sizes = {
        "num_layers": _LAYERS,
        "moe_router_topk": _TOPK,
        "num_moe_experts": 6,
        "moe_ffn_hidden_size": _WIDTH,
        "normalization": "LayerNorm",
        "switchhead_num_experts": head_experts,
        "moeut_balance_coeff": _COEFFICIENTS["expert"],
        "switchhead_balance_coeff": _COEFFICIENTS["value"],
    }
    return small_config("moeut", **{**sizes, **fields})


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


def _costs_what_it_holds() -> None:
    start_ranks()
    for head_experts in _KINDS:
        config = _config(head_experts, kv_channels=6, moe_shared_expert_intermediate_size=8)
        model = build_model(config, _LENGTH, VOCABULARY, rotary_percent=0.5)
        held = sum(parameter.numel() for parameter in model.decoder.layers.parameters())
        cost = get_system("moeut").cost(config, _LENGTH)
        assert cost.parameters == held
        heads, hidden = config.num_attention_heads, config.hidden_size
        chosen = min(config.switchhead_topk, head_experts)
        per_token = (
            2 * hidden * heads * 6 + (2 - (head_experts == 1)) * heads * head_experts * hidden  # queries, keys, routers
            + 2 * chosen * heads * 6 * hidden + 6 * hidden + 2 * _TOPK * hidden * _WIDTH + 3 * hidden * 8
        )  # fmt: skip
        assert cost.once + 2 * cost.per_step == 2 * _LAYERS * (2 * per_token + 4 * heads * 6 * _LENGTH / 2)
        assert cost.once == 0.0


def test_cost_is_that_of_what_is_there_in_every_pass() -> None:
    run_ranks(1, _costs_what_it_holds)


def _starts_as_the_paper_does() -> None:
    start_ranks()
    config = _config(4, hidden_size=128, num_moe_experts=32, recurrence_steps=5)
    model = build_model(config, _LENGTH, 512)
    scale = (2 / (_LAYERS * 5)) ** 0.5
    inputs = {
        "query_key": 128, "value_router": 128, "output_router": 128, "attention.value.": 128, "attention.output.": 128,
        "mlp.router": 128, "keys": 128, "values": 32 * _WIDTH,
    }  # fmt: skip
    for name, weight in model.decoder.layers.named_parameters():
        kinds = [kind for kind in inputs if kind in name]
        if "layernorm" not in name:
            assert float(weight.detach().std()) == pytest.approx(scale * inputs[kinds[0]] ** -0.5, rel=0.05), name
        if "mlp.router" in name:
            torch.testing.assert_close(weight.norm(dim=1), weight.norm(dim=1).mean().expand(32), rtol=1e-5, atol=0)
    bound = 128**-0.5
    assert float(model.embedding.word_embeddings.weight.detach().std()) == pytest.approx(bound, rel=0.02)
    for part in (model.output_layer.weight, model.output_layer.bias):
        assert 0.95 * bound < float(part.detach().abs().max()) <= bound
        assert float(part.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_initial_weights() -> None:
    run_ranks(1, _starts_as_the_paper_does)


def _drops_whole_experts() -> None:
    start_ranks()
    sizes = {"moe_router_topk": 6, "switchhead_topk": 4}
    whole, dropped = (
        _config(4, moeut_expert_dropout=rate, switchhead_expert_dropout=rate, **sizes) for rate in (0.0, 0.5)
    )
    model, other = _model(whole), _model(dropped)
    embeddings = _embeddings()
    with torch.no_grad():
        expected = logits(model, embeddings, Depth(0, 2), (1, 2, 3))
        assert not torch.allclose(logits(other, embeddings, Depth(0, 2), (1, 2, 3)), expected, atol=0.1)
        torch.testing.assert_close(logits(other.eval(), embeddings, Depth(2, 0)), expected, rtol=1e-5, atol=1e-5)
    router = other.decoder.layers[0].mlp.router.train()
    scores = torch.randn(50, 2, 6)
    probs, chosen = router.routing(scores)
    kept = probs > 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    torch.testing.assert_close(probs[kept], scores.view(100, 6).sigmoid()[kept])
    assert chosen.all()


def test_experts_drop_out_in_training() -> None:
    run_ranks(1, _drops_whole_experts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"switchhead_num_experts": 0}, "--switchhead-num-experts 0 must be at least 1"),
        ({"switchhead_topk": 5}, "--switchhead-topk 5 must be from 1 to --switchhead-num-experts 4"),
        ({"moeut_balance_coeff": -1.0}, "--moeut-balance-coeff -1 must be at least 0"),
        ({"switchhead_expert_dropout": 1.0}, "--switchhead-expert-dropout 1 must be at least 0 and below 1"),
        ({"num_query_groups": 2}, "leave out --group-query-attention"),
        ({"moe_layer_freq": 2}, "leave out --moe-layer-freq"),
        ({"qk_layernorm": True}, "does not know --qk-layernorm: leave it out"),
        ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, "leave layernorm out"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(MoREError) as refusal:
        check_system(small_config("moeut", **{"num_layers": 2, "switchhead_num_experts": 4, **fields}))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_flags_of_experts_mean_nothing_to_dense_heads() -> None:
    system = get_system("moeut")
    flags = system.flags(Namespace(switchhead_num_experts=1))
    (fault,) = system.without_effect(flags, {"switchhead_num_experts", "switchhead_topk", "moeut_balance_coeff"})
    assert fault == "--switchhead-topk has no effect while --switchhead-num-experts is 1: leave it out"
