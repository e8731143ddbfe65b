"""Truncated backpropagation through a recurrence: its first steps carry no gradient."""

from collections.abc import Callable
from typing import Any

import torch

from more_megatron.model.depth import Depth

# Hidden states, and what a step carries over to the next.
_Carrying = tuple[torch.Tensor, Any]


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


def iterate[State](
    step: Callable[[State, int], State],
    start: State,
    depth: Depth,
    *,
    detach: Callable[[State], State],
    rejoin: Callable[[State, State], State],
    see: Callable[[State], None] | None,
) -> State:
    """Apply `step` as often as `depth` says, the first n times without gradient, and return the last state.

    Args:
        step: Maps a state and the index of the step to the next state.
        start: Where the iteration starts.
        depth: Number of steps.
        detach: Returns a state as a constant.
        rejoin: Returns the state after the steps without gradient as what the others go on from, given the state in
            front of them and it.
        see: Called with the state in front of the first step and after each; None if nobody watches.
    """
    see = see or _unseen
    state = start
    see(state)
    if depth.no_grad_steps > 0:
        with torch.no_grad():
            state = detach(state)
            for index in range(depth.no_grad_steps):
                # Megatron adds residuals with gradient whatever the mode.
                state = detach(step(state, index))
                see(state)
        state = rejoin(start, state)
    for index in range(depth.no_grad_steps, depth.steps):
        state = step(state, index)
        see(state)
    return state


def iterate_residual(
    step: Callable[[torch.Tensor, Any, int], tuple[torch.Tensor, Any]],
    hidden_states: torch.Tensor,
    depth: Depth,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Iterate on a residual stream, and return it.

    Each step adds an increment to the stream. The increments of the first n steps are constants to the backward pass;
    the stream itself is not, so that what lies below keeps its gradient.

    Args:
        step: Maps the hidden states, [s, b, h], what the step before carried over (None at first), and the index of the
            step to new hidden states and what is carried over.
        hidden_states: Where the iteration starts, [s, b, h].
        depth: Number of steps.
        see: Called with the hidden states, as by `iterate`.
    """

    def detach(state: _Carrying) -> _Carrying:
        hidden_states, carried = state
        return hidden_states.detach(), None if carried is None else carried.detach()

    def rejoin(before: _Carrying, after: _Carrying) -> _Carrying:
        return detached_increments(before[0], after[0]), after[1]

    start: _Carrying = (hidden_states, None)
    last, _ = iterate(
        lambda state, index: step(*state, index),
        start,
        depth,
        detach=detach,
        rejoin=rejoin,
        see=None if see is None else lambda state: see(state[0]),
    )
    return last


def iterate_state(
    step: Callable[[torch.Tensor, int], torch.Tensor],
    state: torch.Tensor,
    depth: Depth,
    see: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Iterate on a state without gradient into which `step` injects its input, and return the last one.

    The input keeps its gradient through the last b steps. Arguments as of `iterate`.
    """
    return iterate(step, state, depth, detach=torch.Tensor.detach, rejoin=lambda before, after: after, see=see)


def _unseen(state: Any) -> None:
    """See nothing."""
