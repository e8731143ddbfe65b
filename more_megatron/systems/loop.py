"""Looped transformer: Megatron's own layers in groups that are repeated.

A group runs r times before the next one begins; prelude and coda run once. With experts it is looped MoE, whose routers
are asked in every pass (arXiv 2605.09165); with groups of one layer it is Loopie (arXiv 2607.16051).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.base import DEPTH, DIVISION, REPEATED_ROUTER, System
from more_megatron.systems.export import MODEL, Row, adapter_rows

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Loop, Stack

__all__ = ["SYSTEM"]


class LoopedTransformer(System):
    """Groups of ordinary layers. With r = 1 it is Megatron's model."""

    name = "loop"
    summary = "groups of ordinary layers repeated, with or without prelude, coda and injection"
    reads = DEPTH | DIVISION | REPEATED_ROUTER | {"recurrence_injection"}
    defaults: ClassVar[Mapping[str, Any]] = {"num_experts": None}
    plain: ClassVar[Mapping[str, Any]] = {"recurrence_steps": 1}

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        """Yield what the system cannot do of what `config` asks for."""
        from more_megatron.blocks.refusals import loop_refusals
        from more_megatron.model.division import division_refusals

        yield from division_refusals(config)
        yield from loop_refusals(config)

    def stack(self, config: MoREConfig) -> Stack:
        """Return the layers of the whole model."""
        from more_megatron.blocks.backends import final_norm
        from more_megatron.blocks.layers import plain_layers, repeated_layers
        from more_megatron.model.division import Division
        from more_megatron.model.stack import Stack

        groups = Division.of(config).arrange(plain_layers(config), repeated_layers(config), _loop(config))
        return Stack(config, groups, final_norm(config))

    def config_fields(self, args: Any) -> dict[str, Any]:
        """Return the fields of config.json that it alone has, given a run's arguments."""
        return {
            "prelude_layers": args.recurrence_prelude_layers or 0,
            "coda_layers": args.recurrence_coda_layers or 0,
            "group_layers": args.recurrence_group_layers,
            "injection": args.recurrence_injection or "none",
        }

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that `config_fields` were made from."""
        return {
            "recurrence_prelude_layers": config["prelude_layers"],
            "recurrence_coda_layers": config["coda_layers"],
            "recurrence_group_layers": config["group_layers"],
            "recurrence_injection": config["injection"],
        }

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows outside of layers."""
        return (*MODEL, *adapter_rows(config))


def _loop(config: MoREConfig) -> Loop:
    """Return how a group is repeated: on its own output, with its input added or mixed in."""
    from more_megatron.model.loops import InjectedLoop, ResidualLoop

    if config.recurrence_injection == "linear":
        return InjectedLoop("linear", random_state=False)
    return ResidualLoop(adds_input=config.recurrence_injection == "add")


SYSTEM = LoopedTransformer()
