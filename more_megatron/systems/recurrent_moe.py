"""Synthesis II, option C: the MoE sub-layer as the recurrent unit.

h <- h + scale * MoE(norm(h)), r times, the router seeing each new state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from more_megatron.blocks.refusals import recurrence_refusals, repetition_refusals
from more_megatron.systems.base import DEPTH, REPEATED_ROUTER, System

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack


class RecurrentMoE(System):
    """Megatron's experts in an iterated sub-layer. With one step and scale 1 it is Megatron's layer."""

    name = "recurrent_moe"
    summary = "the MoE sub-layer iterated: `h <- h + scale * MoE(norm(h))`, the router sees each state"
    is_default = True
    reads = DEPTH | REPEATED_ROUTER | {"recurrence_residual_scale"}

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        yield from recurrence_refusals(config)
        yield from repetition_refusals(config, ("moe",))

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.iterated_moe import IteratedMoELayer, RecurrentMoETransformerLayer
        from more_megatron.blocks.layers import decoder_stack, moe_layer
        from more_megatron.blocks.router import IteratedRouter

        layer = moe_layer(
            config,
            layer=RecurrentMoETransformerLayer,
            moe=IteratedMoELayer,
            parts={"router": IteratedRouter},
            repeated=True,
        )
        return decoder_stack(config, layer)


SYSTEM = RecurrentMoE()
