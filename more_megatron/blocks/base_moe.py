"""Megatron's MoE layer: no token is dropped in evaluation, and experts of ours draw their own weights."""

from __future__ import annotations

import copy
from typing import Any, Self

from megatron.core.transformer.moe.moe_layer import MoELayer

from more_megatron.blocks.experts import Experts

__all__ = ["BaseMoELayer"]


class BaseMoELayer(MoELayer):
    """Megatron's MoE layer, which keeps all tokens in evaluation and lets experts of ours draw their weights.

    Which tokens exceed the capacity of an expert depends on tokens that come later: a model that drops is not causal,
    and its losses in evaluation would be those of no model that generates.
    """

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, on which the weights of experts of ours depend."""
        super().set_layer_number(layer_number)
        if isinstance(self.experts, Experts):
            self.experts.initialize(layer_number)

    def train(self, mode: bool = True) -> Self:
        """Drop tokens above capacity, as the configuration says, or in evaluation not."""
        super().train(mode)
        if self.config.moe_expert_capacity_factor is None:
            return self
        config = self.config
        if not mode:
            config = copy.copy(config)
            config.moe_expert_capacity_factor, config.moe_pad_expert_input_to_capacity = None, False
        self.router.config = config
        # The dispatcher expects the inputs of experts padded to capacity, or as they come.
        parts: list[Any] = [self.token_dispatcher, getattr(self.token_dispatcher, "_comm_manager", None)]
        for part in parts:
            if hasattr(part, "drop_and_pad"):
                part.drop_and_pad = config.moe_pad_expert_input_to_capacity
        return self
