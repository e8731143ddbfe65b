"""Stacks that divide into a prelude, groups of layers that are repeated, and a coda."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fields import LOGIT_EMA, Config, Field
from .interface import Group, Loop, System
from .parts import takase_normal
from .recurrence import Rows

__all__ = ["DividedSystem", "InjectedLoop", "division_fields"]


class _Adapter(nn.Linear):
    """Maps the state beside the input of a group, 2h -> h."""

    def __init__(self, config: Config) -> None:
        super().__init__(2 * config.hidden_size, config.hidden_size, bias=False)
        self.config = config

    def draw_weight(self, name: str, weight: Tensor) -> None:
        takase_normal(self.config, weight, depth=None)


class InjectedLoop(Loop):
    """A loop whose input may enter every pass: through a matrix, or as a summand."""

    adds_at_first = False  # whether the summand enters the first pass, too

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapter = _Adapter(config) if config.injection == "linear" else None

    def enter(self, state: Tensor, hidden_states: Tensor, step: int, rows: Rows) -> Tensor:
        if self.adapter is not None:
            return self.adapter(torch.cat((state, rows.take(hidden_states)), dim=-1))
        adds = self.config.injection == "add" and (step > 0 or self.adds_at_first)
        return state + rows.take(hidden_states) if adds else state


def division_fields(injection: str) -> dict[str, Field]:
    """Return the fields of a divided stack, given the default of how the input of a group enters its passes."""
    meaning = "How the input of a group enters its passes: through a matrix, as a summand or not."
    return {
        "prelude_layers": Field(int, 0, "Layers in front of those that are repeated.", low=0),
        "coda_layers": Field(int, 0, "Layers behind those that are repeated.", low=0),
        "injection": Field(str, injection, meaning, choices=("linear", "add", "none")),
        "router_logit_ema": LOGIT_EMA,
    }


class DividedSystem(System):
    """A stack with a prelude, groups of layers that are repeated, and a coda."""

    loop_class: type[Loop] = InjectedLoop  # what repeats a group
    # Whether the final norm stands in front of the coda, too, even if that has no layers
    norms_coda_input: bool = False

    def check(self, values: Mapping[str, Any]) -> None:
        layers, prelude, coda = (values[name] for name in ("num_hidden_layers", "prelude_layers", "coda_layers"))
        core, size = layers - prelude - coda, values.get("group_layers")
        if core <= 0:
            raise ValueError(
                f"prelude_layers {prelude} and coda_layers {coda} leave none of num_hidden_layers {layers}"
            )
        if size is not None and core % size != 0:
            raise ValueError(f"group_layers {size} does not divide the {core} layers that are repeated")

    def groups(self, config: Config) -> Sequence[Group]:
        layers, norms = config.num_hidden_layers, self.norms_coda_input
        start, end = config.prelude_layers, layers - config.coda_layers
        size = getattr(config, "group_layers", None) or end - start
        prelude = (Group(range(start)),) if start > 0 else ()
        coda = (Group(range(end, layers), norm_first=norms),) if end < layers or norms else ()
        core = (Group(range(first, first + size), self.loop_class) for first in range(start, end, size))
        return (*prelude, *core, *coda)
