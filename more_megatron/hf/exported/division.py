"""Stacks that divide into a prelude, groups of layers that are repeated, and a coda."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .experts import MoREMoE
from .fields import Config, Field
from .initialization import takase_normal
from .interface import Group, Loop
from .recurrence import Rows
from .routing import averaged_logits

__all__ = ["AROUND", "InjectedLoop", "RepeatedMoE", "check_division", "divided", "injection"]

AROUND = {
    "prelude_layers": Field(int, 0, "Layers in front of those that are repeated.", low=0),
    "coda_layers": Field(int, 0, "Layers behind those that are repeated.", low=0),
}


def injection(default: str) -> Field:
    """Return the field for how the input of a group enters its passes."""
    meaning = "How the input of a group enters its passes: through a matrix, as a summand or not."
    return Field(str, default, meaning, choices=("linear", "add", "none"))


def check_division(values: Mapping[str, Any]) -> None:
    """Check that the numbers of layers agree.

    Raises:
        ValueError: If they do not.
    """
    layers, prelude, coda = (values[name] for name in ("num_hidden_layers", "prelude_layers", "coda_layers"))
    if prelude + coda >= layers:
        raise ValueError(f"prelude_layers {prelude} and coda_layers {coda} leave none of num_hidden_layers {layers}")
    size = values.get("group_layers")
    if size is not None and (layers - prelude - coda) % size != 0:
        raise ValueError(f"group_layers {size} does not divide the {layers - prelude - coda} layers that are repeated")


def divided(
    config: Config, loop: type[Loop], group_layers: int | None = None, norm_first: bool = False
) -> tuple[Group, ...]:
    """Return the groups of a stack.

    Args:
        config: Model configuration.
        loop: What repeats a group.
        group_layers: Layers of a group. Default: one group has all that are repeated.
        norm_first: Whether the final norm stands in front of the coda, too, even if that has no layers.
    """
    layers = config.num_hidden_layers
    start, end = config.prelude_layers, layers - config.coda_layers
    size = group_layers or end - start
    prelude = (Group(range(start)),) if start > 0 else ()
    coda = (Group(range(end, layers), norm_first=norm_first),) if end < layers or norm_first else ()
    return (*prelude, *(Group(range(first, first + size), loop) for first in range(start, end, size)), *coda)


class _Adapter(nn.Linear):
    """Maps the state beside the input of a group, 2h -> h."""

    def __init__(self, config: Config) -> None:
        super().__init__(2 * config.hidden_size, config.hidden_size, bias=False)
        self.config = config

    def draw_weight(self, name: str, weight: Tensor) -> None:
        """Draw a new weight as the training code does."""
        takase_normal(self.config, weight, depth=None)


class InjectedLoop(Loop):
    """A loop whose input may enter every pass. Subclasses say where it starts and what they add."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapter = _Adapter(config) if config.injection == "linear" else None

    def enter(self, state: Tensor, hidden_states: Tensor, step: int, rows: Rows) -> Tensor:
        """Return what enters a pass, given the state and the input of the group, [b, s, h]."""
        hidden_states = rows.take(hidden_states)
        if self.adapter is None:
            return self.add(state, hidden_states, step)
        return self.adapter(torch.cat((state, hidden_states), dim=-1))

    def add(self, state: Tensor, hidden_states: Tensor, step: int) -> Tensor:
        """Return what enters a pass where no matrix injects, given the state and the input of the group."""
        return state


class RepeatedMoE(MoREMoE):
    """Experts in a layer that is repeated."""

    reads_former = True

    def decide(self, x: Tensor, *former: Tensor) -> Tensor:
        """Return the router logits, averaged over the passes."""
        return averaged_logits(self.config, self.gate(x), *former)
