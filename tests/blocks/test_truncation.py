"""Backpropagation through the last steps only: the gradients of a detached loop, and memory that n leaves flat."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from more_megatron.blocks.layer import LayerInputs
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch, Pass
from more_megatron.systems import get_system, systems
from tests.helpers.models import HIDDEN, RECOMPUTATION, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_RECURRENT = tuple(name for name, system in systems().items() if system.recurrent)
_LENGTH, _BATCH = 16, 2
_SAMPLES = (4, 9)


def _gradients(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]


def _model(variant: str, **fields: Any) -> GPTModel:
    # One layer: what reaches its experts does not depend on the depth of a layer below.
    config = small_config(variant, moe_router_topk=2, moe_shared_expert_intermediate_size=HIDDEN, **fields)
    return gpt_model(config, _LENGTH, weight_std=0.2).train()


def _embeddings() -> torch.Tensor:
    return torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _iterated_layer() -> None:
    start_ranks()
    for depth in (Depth(0, 1), Depth(0, 3), Depth(3, 2), Depth(2, 0)):
        for fields in ({}, {"recurrence_residual_scale": 0.5}, {"router_logit_ema": 0.7}):
            model = _model("recurrent_moe", **fields)
            layer, hidden = model.decoder.layers[0], _embeddings()
            inputs = LayerInputs(MicroBatch(depth, _SAMPLES))
            leaves = [hidden, *layer.mlp.parameters(), *layer.pre_mlp_layernorm.parameters()]
            ours, plain = layer._apply_moe(hidden, inputs), _detached_layer(layer, hidden, depth, inputs)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
            for one, other in zip(_gradients(ours, leaves), _gradients(plain, leaves), strict=True):
                scale = max(float(other.abs().max()), 1.0)
                assert float((one - other).abs().max()) <= 1e-5 * scale, (depth, fields)


def _detached_layer(layer: torch.nn.Module, hidden: torch.Tensor, depth: Depth, inputs: LayerInputs) -> torch.Tensor:
    """Apply the layer's norm and MoE part r times, each increment of the first n steps a constant."""
    former = None
    for index in range(depth.steps):
        current = Pass(inputs.micro_batch, index, former={}, left={}, in_graph=True)
        with layer.mlp.router.at(current, former) as call:
            increment, _ = layer.mlp(layer.pre_mlp_layernorm(hidden), inputs)
        former, has_grad = call.carried, index >= depth.no_grad_steps
        former = former if former is None or has_grad else former.detach()
        increment = increment * layer.config.recurrence_residual_scale
        hidden = hidden + (increment if has_grad else increment.detach())
    return hidden


def test_an_iterated_layer_has_the_gradient_of_a_detached_loop() -> None:
    # Layers that iterate a state are compared with a detached loop in tests/blocks/test_reference.py.
    run_ranks(1, _iterated_layer)


def _saved_bytes(variant: str, fields: dict[str, Any], depth: Depth) -> tuple[int, int]:
    """Return bytes and number of the tensors that a model keeps for its backward pass, parameters left out."""
    # A learned table has no time signal for so many steps.
    if "universal_time_signal" in get_system(variant).own_flags():
        fields = {**fields, "universal_time_signal": "sinusoid"}
    model, embeddings = _model(variant, **fields), _embeddings()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits(model, embeddings, depth, _SAMPLES)
    return sum(saved), len(saved)


def _saved_by_depth(variant: str) -> dict[str, dict[tuple[int, int], tuple[int, int]]]:
    start_ranks()
    depths = [(1, 2), (9, 2), (0, 4)]
    return {
        mode: {depth: _saved_bytes(variant, fields, Depth(*depth)) for depth in depths}
        for mode, fields in RECOMPUTATION.items()
    }


@pytest.mark.parametrize("variant", _RECURRENT)
def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_steps_without_gradient(variant: str) -> None:
    (modes,) = run_ranks(1, _saved_by_depth, variant)
    for mode, kept in modes.items():
        few, many, more_gradient = kept[1, 2], kept[9, 2], kept[0, 4]
        assert many[1] == few[1], mode
        assert many[0] == few[0], mode
        if mode == "off":
            assert more_gradient[0] > few[0]
