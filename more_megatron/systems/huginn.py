"""Huginn: a prelude, a core with its input injected that is repeated from a random state, and a coda.

Geiping et al., arXiv 2502.05171. Sandwich layers; one norm behind the core and behind the coda; embeddings scaled by
sqrt(h) and tied to the head; initial weights by the unrolled depth. With experts it is a looped MoE.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.base import DEPTH, DIVISION, MEGATRONS_INITIALIZATION, REPEATED_ROUTER, System
from more_megatron.systems.export import MODEL, SANDWICH, STATES_OF_SANDWICH, Row, adapter_rows

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.flags import MoREFlags
    from more_megatron.model.stack import Loop, Stack

__all__ = ["SYSTEM"]


class Huginn(System):
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

    def without_effect(self, flags: MoREFlags, given: Set[str]) -> Iterator[str]:
        """Yield what is wrong with flags that were given and that the system, under these settings, never reads."""
        yield from super().without_effect(flags, given)
        if flags.recurrence_injection == "none" and "recurrence_state_std" in given:
            yield "--recurrence-state-std has no effect while --recurrence-injection is none: leave one of them out"

    def unread(self, args: Any) -> Set[str]:
        """Return the flags of Megatron's that it never reads, given a run's arguments."""
        return MEGATRONS_INITIALIZATION

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        """Yield what the system cannot do of what `config` asks for."""
        from more_megatron.blocks.refusals import loop_refusals
        from more_megatron.model.division import division_refusals

        yield from division_refusals(config, _around(config))
        yield from loop_refusals(config)

    def stack(self, config: MoREConfig) -> Stack:
        """Return the layers of the whole model."""
        from more_megatron.blocks import layers, sandwich
        from more_megatron.blocks.backends import final_norm
        from more_megatron.model.division import Division
        from more_megatron.model.initialization import takase
        from more_megatron.model.stack import Stack

        additions = sandwich.sandwich_additions(config)
        division = Division.of(config, _around(config))
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

    def config_fields(self, args: Any) -> dict[str, Any]:
        """Return the fields of config.json that it alone has, given a run's arguments."""
        prelude, coda = args.recurrence_prelude_layers, args.recurrence_coda_layers
        return {
            "prelude_layers": _around(args) if prelude is None else prelude,
            "coda_layers": _around(args) if coda is None else coda,
            "injection": args.recurrence_injection or "linear",
        }

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that `config_fields` were made from."""
        return {
            "recurrence_prelude_layers": config["prelude_layers"],
            "recurrence_coda_layers": config["coda_layers"],
            "recurrence_injection": config["injection"],
        }

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows outside of layers."""
        return (*MODEL, *adapter_rows(config))

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        """Return the rows of a layer, numbered from 0."""
        return (*super().layer_rows(config, layer), *SANDWICH)

    def layer_states(self, config: Mapping[str, Any], layer: int) -> tuple[str, ...]:
        """Return the modules of a layer that ask a checkpoint for a state beside their parameters."""
        return (*super().layer_states(config, layer), *STATES_OF_SANDWICH)


def _loop(config: MoREConfig) -> Loop:
    """Return how the core is repeated: from a random state, or from its input where nothing is injected."""
    from more_megatron.model.loops import InjectedLoop, ResidualLoop

    injection = config.recurrence_injection or "linear"
    return ResidualLoop() if injection == "none" else InjectedLoop(injection)


def _around(config: Any) -> int:
    """Return the default of the layers of prelude and coda: a quarter each, at least one if three are there."""
    return min(max(config.num_layers // 4, 1), (config.num_layers - 1) // 2)


SYSTEM = Huginn()
