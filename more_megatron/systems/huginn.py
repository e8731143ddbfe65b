"""Huginn: a prelude, a core with its input injected that is repeated from a random state, and a coda.

Geiping et al., arXiv 2502.05171. Sandwich layers; one norm behind the core and behind the coda; embeddings scaled by
sqrt(h) and tied to the head; initial weights by the unrolled depth. With experts it is a looped MoE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.base import DEPTH, DIVISION, MEGATRONS_INITIALIZATION, REPEATED_ROUTER
from more_megatron.systems.divided import DividedSystem
from more_megatron.systems.export import SANDWICH, STATES_OF_SANDWICH, Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.flags import MoREFlags
    from more_megatron.model.stack import Loop, Stack


class Huginn(DividedSystem):
    """Recurrent depth: a core whose state takes in the output of the prelude in each step."""

    name = "huginn"
    summary = "prelude, core with input injection repeated from a random state, coda"
    reads = DEPTH | DIVISION - {"recurrence_group_layers"} | REPEATED_ROUTER
    reads |= {"recurrence_injection", "recurrence_state_std"}
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_experts": None,
        "untie_embeddings_and_output_weights": False,
        "recurrence_state_std": 0.632,
        "norm_epsilon": 1e-6,
        "rotary_base": 50000,
        "rotary_interleaved": True,
        "add_qkv_bias": True,
    }

    injection = "linear"

    def around(self, config: Any) -> int:
        """Return a quarter of the layers, at least one if three are there."""
        return min(max(config.num_layers // 4, 1), (config.num_layers - 1) // 2)

    def without_effect(self, flags: MoREFlags, given: Set[str]) -> Iterator[str]:
        yield from super().without_effect(flags, given)
        if flags.recurrence_injection == "none" and "recurrence_state_std" in given:
            yield "--recurrence-state-std has no effect while --recurrence-injection is none: leave one of them out"

    def unread(self, args: Any) -> Set[str]:
        return MEGATRONS_INITIALIZATION

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks import layers, sandwich
        from more_megatron.blocks.backends import final_norm
        from more_megatron.model.division import Division
        from more_megatron.model.initialization import takase
        from more_megatron.model.stack import Stack

        additions = sandwich.sandwich_additions(config)
        division = Division.of(config, self.around(config))
        groups = division.arrange(
            layers.plain_layers(config, sandwich.SandwichLayer, additions),
            layers.repeated_layers(
                config, sandwich.RepeatedSandwichLayer, sandwich.RepeatedMoESandwichLayer, additions
            ),
            _loop(config),
        )
        return Stack(
            config,
            groups,
            final_norm(config),
            norms_core_output=True,
            embedding_scale=math.sqrt(config.hidden_size),
            initialization=takase(config, division.unrolled(config.mean_steps)),
        )

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        return (*super().layer_rows(config, layer), *SANDWICH)

    def layer_states(self, config: Mapping[str, Any], layer: int) -> tuple[str, ...]:
        return (*super().layer_states(config, layer), *STATES_OF_SANDWICH)


def _loop(config: MoREConfig) -> Loop:
    """Return how the core is repeated: from a random state, or from its input where nothing is injected."""
    from more_megatron.model.loops import InjectedLoop, ResidualLoop

    injection = config.recurrence_injection or Huginn.injection
    return ResidualLoop() if injection == "none" else InjectedLoop(injection)


SYSTEM = Huginn()
