"""Cells write over products, whatever autograd function these come from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable

from more_megatron.blocks.cells import ExpertBias, gru_step, lstm_step
from more_megatron.blocks.rows import RowGroups

_WIDTH, _SIZES = 4, [3, 0, 5]
_CELLS: dict[str, Callable[..., torch.Tensor]] = {
    "gru": gru_step,
    "lstm": lambda *args: torch.cat(lstm_step(*args), dim=1),
}


class _LikeTransformerEngine(torch.autograd.Function):
    """A linear map that returns two tensors, of which its result is a view, as its linear layers do."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rows, weight)
        return (rows @ weight.t()).flatten().view(len(rows), -1), torch.zeros(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ rows


@pytest.mark.parametrize("cell", _CELLS)
def test_products_of_transformer_engine_are_written_over(cell: str) -> None:
    def gradients(linear: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        state, weight, bias = (
            torch.randn(shape, generator=generator, requires_grad=True)
            for shape in ((sum(_SIZES), _WIDTH), (4 * _WIDTH, _WIDTH), (len(_SIZES), 4 * _WIDTH))
        )
        groups = RowGroups.of_sizes(_SIZES, state.device)
        output = _CELLS[cell](linear(state, weight), ExpertBias.of(bias, groups, len(state)), state)
        return [output, *torch.autograd.grad(output.square().sum(), (state, weight, bias))]

    found = gradients(lambda *args: _LikeTransformerEngine.apply(*args)[0])
    torch.testing.assert_close(found, gradients(torch.nn.functional.linear))
