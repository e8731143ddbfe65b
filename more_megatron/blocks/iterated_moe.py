"""The MoE sub-layer as the recurrent unit (Synthesis II, option C)."""

from __future__ import annotations

import functools

import torch

from more_megatron.blocks.capacity import CapacityInTrainingMoELayer
from more_megatron.blocks.layer import LayerInputs, MicroBatchTransformerLayer
from more_megatron.blocks.router import IteratedRouter, RouterStep
from more_megatron.model.truncation import iterate_residual

__all__ = ["IteratedMoELayer", "RecurrentMoETransformerLayer"]


class IteratedMoELayer(CapacityInTrainingMoELayer):
    """Megatron's MoE layer as one step of an iteration."""

    router: IteratedRouter

    def forward(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, step: RouterStep
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the increment of one step.

        Args:
            hidden_states: Normed state, [s, b, h].
            inputs: What the layer knows about the micro-batch.
            step: Which step it is.

        Returns:
            The increment, [s, b, h], and its bias.
        """
        with self.router.at(step):
            return super().forward(hidden_states, padding_mask=inputs.padding_mask)


class RecurrentMoETransformerLayer(MicroBatchTransformerLayer):
    """A transformer layer whose MoE sub-layer is applied r times: `h <- h + scale * MoE(norm(h))`.

    The router sees each new state. With r = 1 and scale 1 this is Megatron's layer. Selective recomputation of the MoE
    part covers one step at a time.
    """

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        step = functools.partial(self._step, inputs=inputs, in_graph=torch.is_grad_enabled())
        return iterate_residual(step, hidden_states, inputs.micro_batch.depth)

    def _step(
        self,
        hidden_states: torch.Tensor,
        former_logits: torch.Tensor | None,
        index: int,
        *,
        inputs: LayerInputs,
        in_graph: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        depth = inputs.micro_batch.depth
        has_grad = index >= depth.no_grad_steps

        def sub_layer(
            hidden_states: torch.Tensor, former_logits: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            # A step with gradient may run twice, first without; a step before them runs with the layer's own pass only.
            counted = torch.is_grad_enabled() if has_grad else in_graph
            step = RouterStep(index, 1.0 / max(depth.grad_steps, 1), counted, former_logits)
            return self._moe_sub_layer(hidden_states, inputs, step), self.mlp.router.take_logits()

        return self._recomputed(sub_layer, hidden_states, former_logits)

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        output, bias = mlp_output_with_bias
        scale = self.config.recurrence_residual_scale
        if scale != 1.0:
            output = output * scale
            bias = None if bias is None else bias * scale
        return super()._forward_post_mlp((output, bias), residual)
