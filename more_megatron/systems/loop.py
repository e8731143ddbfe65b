"""Looped transformer: Megatron's own layers in groups that are repeated.

A group runs r times before the next one begins; prelude and coda run once. With experts it is looped MoE, whose routers
are asked in every pass (arXiv 2605.09165); with groups of one layer it is Loopie (arXiv 2607.16051).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.systems.base import DEPTH, DIVISION, REPEATED_ROUTER
from more_megatron.systems.divided import DividedSystem

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Loop, Stack


class LoopedTransformer(DividedSystem):
    """Groups of ordinary layers. With r = 1 it is Megatron's model."""

    name = "loop"
    summary = "groups of ordinary layers repeated, with or without prelude, coda and injection"
    reads = DEPTH | DIVISION | REPEATED_ROUTER | {"recurrence_injection"}
    defaults: ClassVar[Mapping[str, Any]] = {"num_experts": None}
    injection = "none"
    fields: ClassVar[Mapping[str, str]] = {**DividedSystem.fields, "group_layers": "recurrence_group_layers"}
    plain: ClassVar[Mapping[str, Any]] = {"recurrence_steps": 1}

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.backends import backend_of
        from more_megatron.blocks.layers import plain_layers, repeated_layers
        from more_megatron.model.stack import Stack

        groups = self.arrange(config, plain_layers(config), repeated_layers(config), _loop(config))
        return Stack(config, groups, backend_of(config).norm())


def _loop(config: MoREConfig) -> Loop:
    """Return how a group is repeated: on its own output, with its input added or mixed in."""
    from more_megatron.model.loops import ResidualLoop, injected_loop
    from more_megatron.model.stack import Loop

    if config.recurrence_injection == "linear":
        return injected_loop(config, "linear", random_state=False)
    return Loop(functools.partial(ResidualLoop, adds_input=config.recurrence_injection == "add"))


SYSTEM = LoopedTransformer()
