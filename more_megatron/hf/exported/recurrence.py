"""Runs the steps of a recurrence, whatever its state is and wherever it stands.

Tokens that stop leave: the rows of a step are those of the tokens that go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .context import CallContext
from .exits import Exits

__all__ = ["Rows", "State", "recur"]

State = tuple[Tensor, ...]
"""What a recurrence carries from step to step; the first tensor is what a call returns as its state."""


@dataclass(frozen=True)
class Rows:
    """The rows of a state.

    Attributes:
        context: What is known about the call.
        index: Which of the model's recurrences this is: the number of its loop or of its layer, from 0.
        routing: The `Routing` where rows are tokens that were sent to experts, [rows, h]; None where they are tokens,
            [b, s, h].
        stream: Returns what the last norm would be given if the recurrence ended with these rows, shaped as tokens.
        chosen: Where tokens have stopped: which of all rows these are.
    """

    context: CallContext
    index: int
    routing: Any = None
    stream: Callable[[Tensor, Any], Tensor] | None = None
    chosen: Tensor | None = None

    def select(self, places: Tensor) -> Any:
        """Return the rows of some tokens, [1, n, h] where they are tokens, given their places among all, b s."""
        context = self.context.select(places)
        if self.routing is None:
            return replace(self, context=context, chosen=places)
        routing, chosen = self.routing.select(places)
        return replace(self, context=context, routing=routing, chosen=chosen)

    def take(self, whole: Tensor) -> Tensor:
        """Return these of all rows."""
        if self.chosen is None:
            return whole
        return whole[self.chosen] if self.routing is not None else whole.flatten(0, 1)[self.chosen].unsqueeze(0)

    def put(self, whole: Tensor | None, rows: Tensor) -> Tensor:
        """Return all rows with these in their places; of new ones, whose `whole` is None, the others are 0."""
        if self.chosen is None:
            return rows
        if self.routing is not None:
            return whole.index_copy(0, self.chosen, rows)  # type: ignore[union-attr]
        batch, length = self.context.shape
        flat = rows.new_zeros(batch * length, *rows.shape[2:]) if whole is None else whole.flatten(0, 1)
        return flat.index_copy(0, self.chosen, rows.squeeze(0)).unflatten(0, (batch, length))

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Return the state of each token, [b, s, h]; of a token with several experts the mean of theirs."""
        return rows if self.routing is None else rows[self.routing.restore].unflatten(0, self.routing.shape).mean(1)

    def features(self, rows: Tensor) -> Tensor:
        """Return the states of each token side by side, [n, any]."""
        if self.routing is None:
            return rows.flatten(0, 1)
        return rows[self.routing.restore].unflatten(0, self.routing.shape).transpose(1, 2).flatten(2).flatten(0, 1)


def recur(step: Callable[..., State], state: State, rows: Rows, result: int = 0) -> State:
    """Return the last state of a recurrence.

    Args:
        step: Returns the next state, given the number of the step, from 0, the rows, and each tensor of the state. What
            else has a row for each of theirs, it takes from `rows.take`.
        state: The first state.
        rows: What the rows of its tensors are.
        result: Which tensor of the state goes on from here.
    """
    context = rows.context
    if context.exits is not None:
        state = _recur_until_exit(step, state, rows, context.exits, result)
    else:
        for number in range(context.num_steps):
            state = step(number, rows, *state)
            if context.records.keep_states:
                context.records.states[rows.index, number] = rows.of_tokens(state[0])
    if context.warm is not None:
        last = rows.of_tokens(state[0]).unsqueeze(1)
        context.warm.extend(f"states.{rows.index}", last, last[..., :0])
    return state


def _recur_until_exit(step: Callable[..., State], state: State, every: Rows, exits: Exits, result: int) -> State:
    """Do the same, and let each token stop by itself. Padding takes no step."""
    context, whole, rows, places = every.context, state, every, every.context.real_tokens()
    steps = torch.zeros(context.shape, dtype=torch.long, device=places.device).flatten()
    if len(places) < len(steps):
        rows = every.select(places)
        state = tuple(map(rows.take, whole))
    former = _measure(exits, rows, state[result], None)
    for number in range(context.num_steps):
        state = step(number, rows, *state)
        steps[places] += 1
        if number + 1 < context.num_steps:
            now = _measure(exits, rows, state[result], former)
            stays = ~exits.stops(former, now, number + 1)
        else:
            now, stays = former, torch.zeros_like(places, dtype=torch.bool)
        if context.records.keep_states or not bool(stays.all()):
            whole = tuple(rows.put(old, new) for old, new in zip_longest(whole, state))
        if context.records.keep_states:
            context.records.states[every.index, number] = every.of_tokens(whole[0])
        if not bool(stays.any()):
            break
        if not bool(stays.all()):
            places, now = places[stays], now[stays]
            rows = every.select(places)
            state = tuple(map(rows.take, whole))
        former = now
    context.records.steps[every.index] = steps.unflatten(0, context.shape)
    context.records.repeat_last(every.index, number, context.num_steps)
    return whole


def _measure(exits: Exits, rows: Rows, result: Tensor, former: Tensor | None) -> Tensor:
    """Return what a criterion measures of each token, [n, any]."""
    stream = None if rows.stream is None else partial(rows.stream, result, rows)
    return exits.measure(rows.features(result), stream, former)
