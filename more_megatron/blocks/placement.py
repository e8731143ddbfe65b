"""Which part of the experts' weights a rank holds, and what passes between the ranks that split an expert.

Megatron's dispatchers treat these ranks as holding parts of a sum: inputs are gathered, outputs are summed, and so are
the gradients of inputs. What needs the whole activation in between, as norms do, holds it on every rank, between
`enter` and `leave`, which keep sums over the ranks what they would be on one. Between parts of an expert, tensors pass
as in tensor parallelism: `copied`, `summed`, `gathered`. On one rank all of them return what they are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_pg_rank, get_pg_size


@dataclass(frozen=True)
class Placement:
    """Which part of the groups' weights this rank holds.

    A group is an expert, or the one block that experts share.
    """

    groups: Sequence[int]  # global numbers of the groups on this rank, consecutive
    num_groups: int  # number of groups in the layer
    # Process group over whose ranks the weights of one group are split
    split_group: torch.distributed.ProcessGroup | None
    replica_rank: int  # rank among those that hold the same part

    @property
    def split_size(self) -> int:
        """Number of parts that the weights of one group are split into."""
        return get_pg_size(self.split_group)

    @property
    def split_rank(self) -> int:
        """Which of these parts is here."""
        return get_pg_rank(self.split_group)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, which every rank holds; the gradients that the ranks send back add up to its gradient."""
        return x if self.split_size == 1 else _Enter.apply(x, self.split_size)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a sum over the ranks that gives `x`; the gradient is that of the sum."""
        return x if self.split_size == 1 else _Leave.apply(x, self.split_size)

    def copied(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, which every rank holds; its gradient is the sum of the ranks'."""
        return x if self.split_size == 1 else copy_to_tensor_model_parallel_region(x, group=self.split_group)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks; its gradient is the same on each."""
        return x if self.split_size == 1 else reduce_from_tensor_model_parallel_region(x, group=self.split_group)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Return the columns of all ranks, [rows, n], given those of this rank, [rows, n / ranks]."""
        return x if self.split_size == 1 else all_gather_last_dim_from_tensor_parallel_region(x, group=self.split_group)


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
