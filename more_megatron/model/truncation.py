"""Truncated backpropagation through a residual recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from more_megatron.model.depth import Depth

__all__ = ["detached_increments", "iterate_residual", "iterate_state", "unseen"]


class _DetachedIncrements(torch.autograd.Function):
    """Forward: the state after some steps. Backward: the gradient goes to the state before them, unchanged."""

    @staticmethod
    def forward(ctx, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return after.view_as(after)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def detached_increments(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return `after`, which is not part of the graph, as if it were `before` plus constants.

    The same as `before + (after - before).detach()`, without the rounding of the two operations.
    """
    return _DetachedIncrements.apply(before, after)


def iterate_residual(
    step: Callable[[torch.Tensor, Any, int], tuple[torch.Tensor, Any]],
    hidden_states: torch.Tensor,
    depth: Depth,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Apply `step` as often as `depth` says, the first n times without gradient.

    Each step adds an increment to the residual stream. The increments of the first n steps are constants to the
    backward pass; the stream itself is not, so that what lies below keeps its gradient.

    Args:
        step: Maps the hidden states, [s, b, h], what the step before carried over (None at first), and the index of the
            step to new hidden states and what is carried over.
        hidden_states: Where the iteration starts, [s, b, h].
        depth: Number of steps.
        see: Called with the hidden states in front of the first step and after each; None if nobody watches.

    Returns:
        Hidden states after all steps, [s, b, h].
    """
    carried = None
    see = see or unseen
    see(hidden_states)
    if depth.no_grad_steps > 0:
        with torch.no_grad():
            state = hidden_states.detach()
            for index in range(depth.no_grad_steps):
                state, carried = step(state, carried, index)
                # Megatron adds residuals with gradient whatever the mode.
                state = state.detach()
                see(state)
        hidden_states = detached_increments(hidden_states, state)
        carried = None if carried is None else carried.detach()
    for index in range(depth.no_grad_steps, depth.steps):
        hidden_states, carried = step(hidden_states, carried, index)
        see(hidden_states)
    return hidden_states


def iterate_state(
    step: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    depth: Depth,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Apply `step` to a state as often as `depth` says, the first n times without gradient.

    For recurrences that inject their input in every step: the input keeps its gradient through the last b steps.

    Args:
        step: Maps a state to the next.
        state: Initial state, without gradient.
        depth: Number of steps.
        see: Called with the initial state and the state after each step; None if nobody watches.
    """
    see = see or unseen
    see(state)
    with torch.no_grad():
        for _ in range(depth.no_grad_steps):
            state = step(state).detach()
            see(state)
    for _ in range(depth.grad_steps):
        state = step(state)
        see(state)
    return state


def unseen(state: torch.Tensor) -> None:
    """See nothing."""
