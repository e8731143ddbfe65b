"""Huginn: a prelude, a core with its input injected that is repeated from a random state, and a coda.

Geiping et al., arXiv 2502.05171. Sandwich layers; one norm behind the core and behind the coda; embeddings scaled by
sqrt(h) and tied to the head; initial weights by the unrolled depth. With experts it is a looped MoE.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.base import DEPTH, DIVISION, MEGATRONS_INITIALIZATION, REPEATED_ROUTER
from more_megatron.systems.divided import DividedSystem
from more_megatron.systems.export import SANDWICH, Row

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
        from more_megatron.blocks.backends import backend_of
        from more_megatron.blocks.sandwich import sandwich_layers
        from more_megatron.model.initialization import draw_as_takase
        from more_megatron.model.stack import Stack

        return Stack(
            config,
            self.arrange(config, *sandwich_layers(config), _loop(config)),
            backend_of(config).norm(),
            norms_core_output=True,
            embedding_scale=math.sqrt(config.hidden_size),
            initialize=functools.partial(draw_as_takase, unrolled_depth=self.unrolled(config, config.mean_steps)),
        )

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        return (*super().layer_rows(config, layer), *SANDWICH)


def _loop(config: MoREConfig) -> Loop:
    """Return how the core is repeated: from a random state, or from its input where nothing is injected."""
    from more_megatron.model.loops import ResidualLoop, injected_loop
    from more_megatron.model.stack import Loop

    injection = config.recurrence_injection or Huginn.injection
    return Loop(ResidualLoop) if injection == "none" else injected_loop(config, injection)


SYSTEM = Huginn()
