"""A stack: groups of layers that stand next to each other, each run once or repeated by a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from .cache import Memory
from .context import CallContext
from .fields import LOGIT_EMA, Config, Field
from .recurrence import Rows, State, recur

RunPass = Callable[[Tensor, int, Rows], Tensor]
"""Runs the layers of a group once: hidden states, [b, s, h], the number of the pass, from 0, and what rows they are."""


class Loop(nn.Module):
    """Repeats a group of layers, without injection or halting. Subclasses add what the repetition has beside them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: Tensor, run_pass: RunPass, rows: Rows) -> Tensor:
        """Return what the group makes of its input, [b, s, h]."""

        def step(number: int, rows: Rows, state: Tensor) -> State:
            return (run_pass(self.enter(state, hidden_states, number, rows), number, rows),)

        return recur(step, (self.first_state(hidden_states, rows.context),), rows)[0]

    def first_state(self, hidden_states: Tensor, context: CallContext) -> Tensor:
        """Return the state in front of the first pass, given the input of the group, [b, s, h]."""
        return hidden_states

    def enter(self, state: Tensor, hidden_states: Tensor, step: int, rows: Rows) -> Tensor:
        """Return what enters a pass, given the state and the input of the group, [b, s, h]."""
        return state


class InjectedLoop(Loop):
    """A loop whose input may enter every pass: through a matrix, or as a summand."""

    adds_at_first = False  # whether the summand enters the first pass, too

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapter = None
        if config.injection == "linear":
            self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def enter(self, state: Tensor, hidden_states: Tensor, step: int, rows: Rows) -> Tensor:
        if self.adapter is not None:
            return self.adapter(torch.cat((state, rows.take(hidden_states)), dim=-1))
        adds = self.config.injection == "add" and (step > 0 or self.adds_at_first)
        return state + rows.take(hidden_states) if adds else state


def division_fields(injection: str) -> dict[str, Field]:
    """Return the fields of a stack with prelude and coda, given the default of how inputs of groups enter passes."""
    meaning = "How the input of a group enters its passes: through a matrix, as a summand or not."
    return {
        "prelude_layers": Field(int, 0, "Layers in front of those that are repeated.", low=0),
        "coda_layers": Field(int, 0, "Layers behind those that are repeated.", low=0),
        "injection": Field(str, injection, meaning, choices=("linear", "add", "none")),
        "router_logit_ema": LOGIT_EMA,
    }


@dataclass(frozen=True)
class Group:
    """Layers that stand next to each other."""

    layers: range  # their indices
    loop: type[Loop] | None = None  # what repeats them; None if they run once
    norm_first: bool = False  # whether the model's final norm stands before them, too


def run_stack(model: Any, hidden_states: Tensor, context: CallContext) -> Tensor:
    """Return what the last layer of a `MoREModel` makes of the embeddings, [b, s, h]."""
    groups, loops, memory = model.system.groups(model.config), enumerate(model.loops), context.memory
    for number, group in enumerate(groups):
        if group.norm_first:
            hidden_states = model.norm(hidden_states)
        run_pass = partial(_run_pass, model.layers, group, {})
        if group.loop is None:
            hidden_states = run_pass(hidden_states, 0, Rows(context, memory, -1))
        else:
            index, loop = next(loops)
            # The cache must not have what the groups behind see of a loop that could end.
            aside = memory if context.options.criterion is None else memory.copy()
            behind = partial(_run_behind, model, groups[number + 1 :], aside)
            hidden_states = loop(hidden_states, run_pass, Rows(context, memory, index, behind))
    return hidden_states


def _run_pass(
    layers: Any, group: Group, former: dict[int, Sequence[Tensor]], hidden_states: Tensor, step: int, rows: Rows
) -> Tensor:
    """Run the layers of a group once on [b, s, h] or, where tokens have stopped, [1, n, h].

    `former` holds the router logits of each layer in the pass before, of all tokens; those of this pass are put there.
    """
    records = rows.context.records
    for index in group.layers:
        records.see_states(hidden_states)
        layer, place = layers[index], rows.memory.at(f"layers.{index}")
        place = place if group.loop is None else place.at_step(step)
        whole = former.get(index, ())
        hidden_states, *logits = layer(hidden_states, rows.context, place, *map(rows.take, whole))
        if group.loop is not None and getattr(layer.config, "router_logit_ema", 0.0) > 0.0:
            former[index] = [rows.put(old, new) for old, new in zip_longest(whole, logits)]
        if records.decisions is not None:
            for number, part in enumerate(logits):
                further, router = divmod(number, len(layer.routers))
                records.decisions.append((part.flatten(0, 1), index, step + further, layer.routers[router]))
    return hidden_states


def _run_behind(model: Any, groups: Sequence[Group], aside: Memory, state: Tensor, rows: Rows) -> Tensor:
    """Return what the final norm would be given if a loop ended with a state: the groups behind that run once."""
    rows = replace(rows, memory=replace(aside, places=rows.memory.places))
    for group in groups:
        state = model.norm(state) if group.norm_first else state
        if group.loop is None:
            state = _run_pass(model.layers, group, {}, state, 0, rows)
    return state
