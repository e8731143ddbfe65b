"""What recurrent cells compute beside their matrix products, for rows of several experts, in few passes over memory.

PyTorch's own cells know one set of weights. Here the products of all experts are one grouped product, and what follows
it is an autograd function that keeps the gates and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from more_megatron.blocks.rows import RowGroups


@dataclass(frozen=True)
class ExpertBias:
    """A bias for each group of rows.

    It reaches its rows by a product with zeros and ones, which adds in place to what is there; the gradient goes back
    by another, which sums the rows of each group in float32.
    """

    bias: torch.Tensor  # [groups, n]
    members: torch.Tensor  # 1 where a row is one of a group's, [rows, groups]

    @classmethod
    def of(cls, bias: torch.Tensor, groups: RowGroups, number: int) -> ExpertBias:
        """Return a bias, [groups * n] or [groups, n], laid out for so many rows."""
        return cls(bias.view(len(groups.ends), -1), groups.members(number).to(bias.dtype))

    def add_to(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` plus the bias of each row, [rows, n]."""
        return torch.addmm(x, self.members, self.bias)

    def of_rows(self) -> torch.Tensor:
        """Return the bias of each row, [rows, n]."""
        return self.members @ self.bias


# The functions below write over the products that they are given, which nobody else reads: large tensors are slow to
# allocate.


def _with_bias(products: torch.Tensor, bias: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    # Transformer Engine's products are views made in functions of its own, which autograd lets nobody write over.
    return products.detach().addmm_(members, bias)


class _GRUStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, products: torch.Tensor, bias: torch.Tensor, members: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        gates = _with_bias(products, bias, members)
        size = state.size(1)
        reset, update, new, hidden = gates.split(size, dim=1)
        gates[:, : 2 * size].sigmoid_()
        new.addcmul_(reset, hidden).tanh_()
        ctx.save_for_backward(gates, state, members)
        return torch.lerp(new, state, update)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, state, members = ctx.saved_tensors
        reset, update, new, hidden = gates.split(state.size(1), dim=1)
        grads = torch.empty_like(gates)
        grad_reset, grad_update, grad_new, grad_hidden = grads.split(state.size(1), dim=1)
        grad_state = grad * update
        # Through tanh: of what is under it.
        torch.sub(grad, grad_state, out=grad_new).mul_(torch.addcmul(_one(new), new, new, value=-1))
        torch.mul(grad_new, reset, out=grad_hidden)
        torch.mul(grad_hidden, hidden, out=grad_reset).mul_(1 - reset)
        torch.sub(state, new, out=grad_update).mul_(grad_state).mul_(1 - update)
        return grads, members.t() @ grads, None, grad_state


def _one(like: torch.Tensor) -> torch.Tensor:
    return torch.ones((), dtype=like.dtype, device=like.device)


def gru_step(products: torch.Tensor, bias: ExpertBias, state: torch.Tensor) -> torch.Tensor:
    """Return the next state of GRU cells whose input is their state, [rows, n].

    In PyTorch's convention, but that gates which see the sum of both products have one matrix:

        r = sigma(R u + b_r),  z = sigma(Z u + b_z),  c = tanh(N u + b_n + r * (H u + b_h)),  u <- (1 - z) c + z u

    Args:
        products: R u, Z u, N u and H u, [rows, 4n].
        bias: Their biases.
        state: u, [rows, n].
    """
    return _GRUStep.apply(products, bias.bias, bias.members, state)


class _LSTMStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, products: torch.Tensor, bias: torch.Tensor, members: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gates = _with_bias(products, bias, members)
        size = cell.size(1)
        write, keep, new, read = gates.split(size, dim=1)
        gates[:, : 2 * size].sigmoid_()
        new.tanh_()
        read.sigmoid_()
        next_cell = (keep * cell).addcmul_(write, new)
        shown = next_cell.tanh()
        ctx.save_for_backward(gates, cell, shown, members)
        return read * shown, next_cell

    @staticmethod
    def backward(ctx, grad: torch.Tensor, grad_next: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, cell, shown, members = ctx.saved_tensors
        write, keep, new, read = gates.split(cell.size(1), dim=1)
        grads = torch.empty_like(gates)
        grad_write, grad_keep, grad_new, grad_read = grads.split(cell.size(1), dim=1)
        grad_shown = grad * read
        torch.mul(grad_shown, shown, out=grad_read).mul_(1 - read)
        grad_next = torch.addcmul(grad_next, grad_shown, torch.addcmul(_one(shown), shown, shown, value=-1))
        through_new = grad_next * write
        torch.mul(through_new, new, out=grad_write).mul_(1 - write)
        torch.mul(through_new, torch.addcmul(_one(new), new, new, value=-1), out=grad_new)
        grad_cell = grad_next * keep
        torch.mul(grad_cell, cell, out=grad_keep).mul_(1 - keep)
        return grads, members.t() @ grads, None, grad_cell


def lstm_step(products: torch.Tensor, bias: ExpertBias, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next hidden and cell states of LSTM cells, [rows, n] each.

    i, f, o = sigma(..), g = tanh(..), c <- f c + i g, h = o tanh(c)

    Args:
        products: Of the matrices of i, f, g and o, [rows, 4n].
        bias: Their biases.
        cell: c, [rows, n].
    """
    return _LSTMStep.apply(products, bias.bias, bias.members, cell)
