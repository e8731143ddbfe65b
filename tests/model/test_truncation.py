"""Truncated backpropagation against plain autograd on a loop that is detached explicitly."""

import pytest
import torch

from more_megatron.model.depth import Depth
from more_megatron.model.truncation import detached_increments, iterate_residual, iterate_state

_DEPTHS = [Depth(0, 1), Depth(0, 3), Depth(1, 1), Depth(3, 2), Depth(4, 0), Depth(0, 0)]


def _leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _gradients(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 2.0, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]


@pytest.mark.parametrize("depth", _DEPTHS, ids=str)
def test_a_state_has_the_gradient_of_a_detached_loop(depth: Depth) -> None:
    inputs, start, mix, inject = leaves = _leaves((3, 4), (3, 4), (4, 4), (4, 4))

    def step(state: torch.Tensor, index: int) -> torch.Tensor:
        return torch.tanh(state @ mix + (index + 1) * inputs @ inject)

    state = start.detach()
    for index in range(depth.no_grad_steps):
        state = step(state, index).detach()
    for index in range(depth.no_grad_steps, depth.steps):
        state = step(state, index)
    output = iterate_state(step, start.detach(), depth)
    assert torch.equal(output, state)
    assert output.requires_grad == (depth.grad_steps > 0)
    if depth.grad_steps > 0:
        for ours, plain in zip(_gradients(output, leaves), _gradients(state, leaves), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.parametrize("depth", _DEPTHS, ids=str)
def test_a_residual_stream_has_the_gradient_of_detached_increments(depth: Depth) -> None:
    start, mix, memory = leaves = _leaves((3, 4), (4, 4), (4, 4))
    indices = []

    def step(hidden: torch.Tensor, carried: torch.Tensor | None, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices.append(index)
        carried = hidden @ memory if carried is None else 0.5 * carried + hidden @ memory
        return hidden + torch.tanh(hidden @ mix + carried), carried

    hidden, carried = start, None
    for index in range(depth.no_grad_steps):
        after, carried = step(hidden, carried, index)
        hidden, carried = hidden + (after - hidden).detach(), carried.detach()
    for index in range(depth.no_grad_steps, depth.steps):
        hidden, carried = step(hidden, carried, index)
    indices.clear()
    output = iterate_residual(step, start, depth)
    assert indices == list(range(depth.steps))
    torch.testing.assert_close(output, hidden, rtol=1e-12, atol=1e-12)
    for ours, plain in zip(_gradients(output, leaves), _gradients(hidden, leaves), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_detached_increments_are_exact() -> None:
    before, after = torch.randn(5, requires_grad=True), torch.randn(5)
    result = detached_increments(before, after)
    assert torch.equal(result, after)
    (gradient,) = torch.autograd.grad(result.sum(), before)
    assert torch.equal(gradient, torch.ones(5))
