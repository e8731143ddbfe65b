"""Megatron's mixture of experts, the baseline: N routed gated MLPs and one shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from more_megatron.systems.base import System

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack


class MixtureOfExperts(System):
    """Megatron's own layers."""

    name = "moe"
    summary = "Megatron's MoE layer, the baseline: routed SwiGLU experts and one shared expert"

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.layers import decoder_stack, moe_layer

        return decoder_stack(config, moe_layer(config))


SYSTEM = MixtureOfExperts()
