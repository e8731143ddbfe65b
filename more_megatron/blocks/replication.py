"""The border of a region in which the ranks of a group hold the same activations.

Megatron's dispatchers treat the ranks that split an expert as holding parts of a sum: inputs are gathered, outputs are
summed, and so are the gradients of inputs. Experts that need the whole activation in between, as norms do, hold it on
every rank; these two maps keep sums over the ranks what they would be on one.
"""

from __future__ import annotations

import torch

__all__ = ["enter_replicated", "leave_replicated"]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad / ctx.ranks, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, ranks: int) -> torch.Tensor:
        return x / ranks

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def enter_replicated(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return `x`, which every rank holds; the gradients that the ranks send back add up to its gradient."""
    return x if ranks == 1 else _Enter.apply(x, ranks)


def leave_replicated(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return this rank's part of a sum over the ranks that gives `x`; the gradient is that of the sum."""
    return x if ranks == 1 else _Leave.apply(x, ranks)
