"""The MoE sub-layer as the recurrent unit (Synthesis II, option C)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from more_megatron.moe.iterated_router import IteratedRouter
from more_megatron.recurrence.micro_batch import MicroBatch
from more_megatron.recurrence.truncation import iterate_residual

__all__ = ["RecurrentMoETransformerLayer"]


class RecurrentMoETransformerLayer(TransformerLayer):
    """A transformer layer whose MoE sub-layer is applied r times: `h <- h + scale * MoE(norm(h))`.

    The router sees each new state. With r = 1 and scale 1 this is Megatron's layer. The layer takes Megatron's
    arguments; the depth comes with them (see `MicroBatch`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Selective recomputation of the MoE layer covers a whole step here: norm, MoE and residual. Its arguments must
        # say what the step depends on, which Megatron's own checkpoint inside the MoE layer has no room for.
        self._recompute_step = self.mlp.moe_layer_recompute
        self.mlp.moe_layer_recompute = False

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention once, then the MoE sub-layer r times.

        Returns:
            Hidden states, [s, b, h], and the context, which a decoder-only model does not have.
        """
        hidden_states, context = self._forward_attention(*args, **kwargs)
        depth = MicroBatch.of_layer(kwargs, self.config, self.training).depth
        step = functools.partial(
            self._step,
            loss_weight=1.0 / max(depth.grad_steps, 1),
            packed_seq_params=kwargs.get("packed_seq_params"),
            padding_mask=kwargs.get("padding_mask"),
        )
        return iterate_residual(step, hidden_states, depth), context

    def _step(
        self,
        hidden_states: torch.Tensor,
        index: int,
        *,
        loss_weight: float,
        packed_seq_params: Any,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        def moe_sub_layer(hidden_states: torch.Tensor) -> torch.Tensor:
            with self._router.weighted_losses(loss_weight):
                return self._forward_mlp(hidden_states, padding_mask=padding_mask, packed_seq_params=packed_seq_params)

        if self._recompute_step and self.training and torch.is_grad_enabled():
            return tensor_parallel.checkpoint(moe_sub_layer, False, hidden_states)
        return moe_sub_layer(hidden_states)

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        output, bias = mlp_output_with_bias
        scale = self.config.recurrence_residual_scale
        if scale != 1.0:
            output = output * scale
            bias = None if bias is None else bias * scale
        return super()._forward_post_mlp((output, bias), residual)

    @property
    def _router(self) -> IteratedRouter:
        return self.mlp.router
