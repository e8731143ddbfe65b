"""Runs a stack: groups of layers, once or looped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from torch import Tensor

from .cache import Memory
from .context import CallContext
from .interface import Group
from .recurrence import Rows

__all__ = ["run_stack"]


def run_stack(model: Any, hidden_states: Tensor, context: CallContext, memory: Memory) -> Tensor:
    """Return what the last layer of a `MoREModel` makes of the embeddings, [b, s, h]."""
    groups, loops = model.system.groups(model.config), enumerate(model.loops)
    for number, group in enumerate(groups):
        if group.norm_first:
            hidden_states = model.norm(hidden_states)
        run_pass = partial(_run_pass, model.layers, group, {})
        if group.loop is None:
            hidden_states = run_pass(hidden_states, 0, Rows(context, memory, -1))
        else:
            index, loop = next(loops)
            # The cache must not have what the groups behind see of a loop that could end.
            aside = memory if context.exits is None else memory.copy()
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
        records.see_logits(logits, index, step, layer.routers)
    return hidden_states


def _run_behind(model: Any, groups: Sequence[Group], aside: Memory, state: Tensor, rows: Rows) -> Tensor:
    """Return what the final norm would be given if a loop ended with a state: the groups behind that run once."""
    rows = rows.on(aside)
    for group in groups:
        state = model.norm(state) if group.norm_first else state
        if group.loop is None:
            state = _run_pass(model.layers, group, {}, state, 0, rows)
    return state
