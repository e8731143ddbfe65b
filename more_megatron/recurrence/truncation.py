"""Truncated backpropagation through a residual recurrence."""

from __future__ import annotations

from collections.abc import Callable

import torch

from more_megatron.recurrence.depth import Depth

__all__ = ["detached_increments", "iterate_residual"]


class _DetachedIncrements(torch.autograd.Function):
    """Forward: the state after some steps. Backward: the gradient goes to the state before them, unchanged."""

    @staticmethod
    def forward(ctx, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return after.view_as(after)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def detached_increments(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return `after` as if it were `before` plus constants.

    The same as `before + (after - before).detach()`, without the rounding of the two operations.

    Args:
        before: State before the steps without gradient, of any shape.
        after: State after them, of the same shape, not part of the graph.
    """
    return _DetachedIncrements.apply(before, after)


def iterate_residual(
    step: Callable[[torch.Tensor, int], torch.Tensor], hidden_states: torch.Tensor, depth: Depth
) -> torch.Tensor:
    """Apply `step` as often as `depth` says, the first n times without gradient.

    Each step adds an increment to the residual stream. The increments of the first n steps are constants to the
    backward pass; the stream itself is not, so that what lies below keeps its gradient.

    Args:
        step: Maps the hidden states, [s, b, h], and the index of the step to new hidden states.
        hidden_states: Where the iteration starts, [s, b, h].
        depth: Number of steps.

    Returns:
        Hidden states after all steps, [s, b, h].
    """
    if depth.no_grad_steps > 0:
        with torch.no_grad():
            state = hidden_states
            for index in range(depth.no_grad_steps):
                state = step(state, index)
        hidden_states = detached_increments(hidden_states, state) if hidden_states.requires_grad else state
    for index in range(depth.no_grad_steps, depth.steps):
        hidden_states = step(hidden_states, index)
    return hidden_states
