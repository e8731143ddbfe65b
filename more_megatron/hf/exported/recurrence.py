"""Runs the steps of a recurrence, whatever its state is and wherever it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .context import CallContext

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
    """

    context: CallContext
    index: int
    routing: Any = None

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Return the state of each token, [b, s, h]; of a token with several experts the mean of theirs."""
        if self.routing is None:
            return rows
        return rows[self.routing.restore].unflatten(0, self.routing.shape).mean(1)


def recur(step: Callable[..., State], state: State, rows: Rows) -> State:
    """Return the last state of a recurrence.

    Args:
        step: Returns the next state, given the number of the step, from 0, the rows, and each tensor of the state.
        state: The first state.
        rows: What the rows of its tensors are.
    """
    records = rows.context.records
    for number in range(rows.context.num_steps):
        state = step(number, rows, *state)
        if records.keep_states:
            records.states[rows.index, number] = rows.of_tokens(state[0])
    return state
