"""MoE sub-layers that are asked several times: iterated by themselves, or in a layer that is repeated."""

from __future__ import annotations

from typing import Any

import torch

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.layer import BaseMoELayer, LayerInputs, MicroBatchTransformerLayer
from more_megatron.blocks.router import IteratedRouter, RouterStep
from more_megatron.config import MoREConfig
from more_megatron.model.micro_batch import Pass
from more_megatron.model.truncation import iterate_residual
from more_megatron.monitoring.recurrence import watch_states

__all__ = [
    "IteratedMoELayer",
    "RecurrentMoETransformerLayer",
    "RepeatedTransformerLayer",
]

# Hidden states, [s, b, h], and logits that the next step averages with, [s, b, experts]; None if it does not.
_StateAndLogits = tuple[torch.Tensor, torch.Tensor | None]


class IteratedMoELayer(BaseMoELayer):
    """Megatron's MoE layer as one step of an iteration."""

    router: IteratedRouter

    def __init__(self, *, config: MoREConfig, **kwargs: Any) -> None:
        super().__init__(config=backend_of(config).looped(config), **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, step: RouterStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the increment of one step, [s, b, h], and its bias, given the normed state."""
        with self.router.at(step):
            return super().forward(hidden_states, padding_mask=inputs.padding_mask)


class RecurrentMoETransformerLayer(MicroBatchTransformerLayer):
    """A transformer layer whose MoE sub-layer is applied r times: `h <- h + scale * MoE(norm(h))`.

    The router sees each new state. With r = 1 and scale 1 this is Megatron's layer. Selective recomputation of the MoE
    part covers one step at a time.
    """

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        depth, in_graph = inputs.micro_batch.depth, torch.is_grad_enabled()

        def step(state: torch.Tensor, former_logits: torch.Tensor | None, index: int) -> _StateAndLogits:
            def sub_layer(state: torch.Tensor, former_logits: torch.Tensor | None) -> _StateAndLogits:
                # One with gradient may run twice, first without; one before them runs with the layer's own pass only.
                counted = torch.is_grad_enabled() if index >= depth.no_grad_steps else in_graph
                step = RouterStep(index, 1.0 / max(depth.grad_steps, 1), counted, former_logits)
                return self._moe_sub_layer(state, inputs, step), step.logits

            return self._recomputed(sub_layer, state, former_logits)

        return iterate_residual(step, hidden_states, depth, watch_states(f"layer {self.layer_number}", depth.steps))

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        output, bias = mlp_output_with_bias
        scale = self.config.recurrence_residual_scale
        if scale != 1.0:
            output = output * scale
            bias = None if bias is None else bias * scale
        return super()._forward_post_mlp((output, bias), residual)


class RepeatedTransformerLayer(MicroBatchTransformerLayer):
    """A layer in a group that is repeated, dense or with experts, whose router is asked once a pass.

    The losses of the router are averaged over the passes with gradient, and every pass is counted once.
    """

    def __init__(self, config: MoREConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(backend_of(config).looped(config), *args, **kwargs)

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        current = inputs.current_pass

        def sub_layer(hidden_states: torch.Tensor, former_logits: torch.Tensor | None) -> _StateAndLogits:
            step = self._router_step(current, former_logits)
            hidden_states = self._moe_sub_layer(hidden_states, inputs, step)
            current.leave((self.layer_number, "map"), step.routing_map)
            return hidden_states, step.logits

        former_logits = current.former.get(self.layer_number)
        hidden_states, logits = self._recomputed(sub_layer, hidden_states, former_logits)
        if logits is not None:
            current.leave(self.layer_number, logits)
        return hidden_states

    def _router_step(self, current: Pass, former_logits: torch.Tensor | None = None) -> RouterStep:
        """Return what the router is told in a pass. Called where it is asked: a recomputation is not counted again."""
        weight = 1.0 / max(current.micro_batch.depth.grad_steps, 1)
        former_map = current.former.get((self.layer_number, "map"))
        return RouterStep(current.index, weight, current.is_counted(), former_logits, former_map)
