"""MoE sub-layers that are asked several times: iterated by themselves, or in a layer that is repeated."""

from typing import Any

import torch

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.layer import BaseMoELayer, LayerInputs, MicroBatchTransformerLayer
from more_megatron.config import MoREConfig
from more_megatron.model.micro_batch import Pass
from more_megatron.model.truncation import iterate_residual
from more_megatron.monitoring.recurrence import watch_states

# Hidden states, [s, b, h], and what a router leaves for later passes; see `RouterCall`.
_StateAndCarried = tuple[torch.Tensor, torch.Tensor | None]


class IteratedMoELayer(BaseMoELayer):
    """Megatron's MoE layer as one step of an iteration."""

    def __init__(self, *, config: MoREConfig, **kwargs: Any) -> None:
        super().__init__(config=backend_of(config).looped(config), **kwargs)

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the increment of one step, [s, b, h], and its bias, given the normed state."""
        return super().forward(hidden_states, padding_mask=inputs.padding_mask)


class _IteratedTransformerLayer(MicroBatchTransformerLayer):
    """A layer whose router is asked in every pass through its MoE part.

    The losses of the router are averaged over the passes with gradient, and every pass is counted once. Selective
    recomputation of the MoE part covers one pass at a time.
    """

    def _moe_pass(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, current: Pass, former: torch.Tensor | None = None
    ) -> _StateAndCarried:
        """Return the hidden states behind the MoE part, and what the router leaves, given what it left before."""

        def sub_layer(hidden_states: torch.Tensor, former: torch.Tensor | None) -> _StateAndCarried:
            with self.mlp.router.at(current, former) as call:
                return self._moe_sub_layer(hidden_states, inputs), call.carried

        return self._recomputed(sub_layer, hidden_states, former)


class RecurrentMoETransformerLayer(_IteratedTransformerLayer):
    """A transformer layer whose MoE sub-layer is applied r times: `h <- h + scale * MoE(norm(h))`.

    The router sees each new state. With r = 1 and scale 1 this is Megatron's layer.
    """

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        micro_batch, in_graph = inputs.micro_batch, torch.is_grad_enabled()

        def step(state: torch.Tensor, former: torch.Tensor | None, index: int) -> _StateAndCarried:
            return self._moe_pass(state, inputs, Pass(micro_batch, index, {}, {}, in_graph), former)

        see = watch_states(f"layer {self.layer_number}", micro_batch.depth.steps)
        return iterate_residual(step, hidden_states, micro_batch.depth, see)

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        output, bias = mlp_output_with_bias
        scale = self.config.recurrence_residual_scale
        if scale != 1.0:
            output = output * scale
            bias = None if bias is None else bias * scale
        return super()._forward_post_mlp((output, bias), residual)


class RepeatedTransformerLayer(_IteratedTransformerLayer):
    """A layer in a group that is repeated, dense or with experts, whose router is asked once a pass."""

    def __init__(self, config: MoREConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(backend_of(config).looped(config), *args, **kwargs)

    def _apply_moe(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        current: Pass = inputs.current_pass
        former_logits = current.former.get(self.layer_number)
        hidden_states, logits = self._moe_pass(hidden_states, inputs, current, former_logits)
        if logits is not None:
            current.leave(self.layer_number, logits)
        return hidden_states
