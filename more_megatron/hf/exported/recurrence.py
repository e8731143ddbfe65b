"""Runs the steps of a recurrence, whatever its state is and wherever it stands.

Tokens that stop leave: the rows of a step are those of the tokens that go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .attention import RowMask
from .cache import Memory
from .context import CallContext
from .exits import Criterion

State = tuple[Tensor, ...]
"""What a recurrence carries from step to step; the first tensor is what a call returns as its state."""


@dataclass(frozen=True)
class Rows:
    """The rows of a state."""

    context: CallContext  # what is known about the call
    memory: Memory  # where keys and values are kept
    index: int  # which of the model's recurrences this is: the number of its loop or of its layer, from 0
    # For criteria that read logits: returns what the last norm would be given if the recurrence ended with a state,
    # shaped as tokens, given the state and these rows; None: it is the state and what that is added to
    stream: Any = None
    # The `Routing` where rows are tokens that were sent to experts, [rows, h]; None where they are tokens themselves,
    # [b, s, h]
    routing: Any = None
    # Where rows that were sent to experts attend: the keys that each sees, [b, 1, k s, k T] or a `RowMask`
    visible: Tensor | RowMask | None = None
    chosen: Tensor | None = None  # where tokens have stopped: which of all rows these are

    @property
    def mask(self) -> Tensor | RowMask | None:
        """The keys that each row sees; None where the plain causal kernel does."""
        return self.context.mask if self.routing is None else self.visible

    def ending_with(self, state: Tensor) -> Tensor:
        """Return what the last norm would be given, shaped as tokens, if the recurrence ended with a state."""
        if self.stream is not None:
            return self.stream(state, self)
        return state if self.context.stream is None else self.context.stream + state

    def select(self, places: Tensor) -> Rows:
        """Return the rows of some tokens, [1, n, h] where they are tokens, given their places among all, b s."""
        context, memory = self.context.select(places), replace(self.memory, places=places)
        if self.routing is None:
            return replace(self, context=context, memory=memory, chosen=places)
        routing, chosen = self.routing.select(places)
        visible = self.visible
        if isinstance(visible, Tensor):
            topk = self.routing.shape[1]
            # [b, s, k, keys], then expert by expert as the rows of a sequence stand.
            visible = visible[:, 0].unflatten(1, (topk, -1)).transpose(1, 2).flatten(0, 1)[places]
            visible = RowMask(visible.transpose(0, 1).flatten(0, 1), (places // memory.shape[1]).repeat(topk))
        return replace(self, context=context, memory=memory, routing=routing, visible=visible, chosen=chosen)

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
        shape = self.memory.shape
        whole = rows.new_zeros(*shape, *rows.shape[2:]) if whole is None else whole
        return whole.flatten(0, 1).index_copy(0, self.chosen, rows.squeeze(0)).unflatten(0, shape)

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Return the state of each token, [b, s, h]; of a token with several experts the mean of theirs."""
        return rows if self.routing is None else self.routing.unsorted(rows).mean(1)

    def record(self, step: int, rows: Tensor) -> None:
        """Let the call keep the states behind a step, if it wants them."""
        if self.context.records.keep_states:
            self.context.records.states[self.index, step] = self.of_tokens(rows)

    def features(self, rows: Tensor) -> Tensor:
        """Return the states of each token side by side, [n, any]."""
        if self.routing is None:
            return rows.flatten(0, 1)
        return self.routing.unsorted(rows).transpose(1, 2).flatten(2).flatten(0, 1)


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
    if context.options.criterion is not None:
        state = _recur_until_exit(step, state, rows, context.options.criterion, result)
    else:
        for number in range(context.options.num_steps):
            state = step(number, rows, *state)
            rows.record(number, state[0])
    if context.options.warm_start:
        last = rows.of_tokens(state[0]).unsqueeze(1)
        context.memory.extend(f"states.{rows.index}", last, last[..., :0])
    return state


def _recur_until_exit(
    step: Callable[..., State], state: State, every: Rows, criterion: Criterion, result: int
) -> State:
    """Do the same, and let each token stop by itself. Padding takes no step."""
    context, options, whole, rows = every.context, every.context.options, state, every
    places, shape = context.real_tokens(), every.memory.shape
    steps = torch.zeros(shape, dtype=torch.long, device=places.device).flatten()
    if len(places) < len(steps):
        rows = every.select(places)
        state = tuple(map(rows.take, whole))

    def measure(former: Tensor | None) -> Tensor:
        seen = rows.features(state[result])
        if criterion.reads_logits:
            logits = context.read(rows.ending_with(state[result])).flatten(0, -2)  # type: ignore[misc]
            seen = torch.zeros_like(logits) if former is None else logits
        return criterion.measure(seen.to(torch.promote_types(seen.dtype, torch.float32)), former)

    former = measure(None)
    for number in range(options.num_steps):
        state = step(number, rows, *state)
        steps[places] += 1
        whole = tuple(rows.put(old, new) for old, new in zip_longest(whole, state))
        every.record(number, whole[0])
        if number + 1 == options.num_steps:
            break
        now = measure(former)
        stays = ~criterion.stops(former, now, options.exit_threshold) | (number + 1 < options.min_steps)
        if not bool(stays.any()):
            break
        if not bool(stays.all()):
            places, now = places[stays], now[stays]
            rows = every.select(places)
            state = tuple(map(rows.take, whole))
        former = now
    for later in range(number + 1, options.num_steps):
        every.record(later, whole[0])
    context.records.steps[every.index] = steps.unflatten(0, shape)
    return whole
