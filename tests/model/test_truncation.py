"""Truncated backpropagation against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from more_megatron.model.depth import Depth
from more_megatron.model.truncation import detached_increments, iterate_residual, iterate_state

_SIZE = 6


@pytest.fixture
def linear() -> torch.nn.Linear:
    """Return what the steps of the tests apply, in double precision."""
    torch.manual_seed(0)
    return torch.nn.Linear(_SIZE, _SIZE, dtype=torch.float64)


def _start() -> torch.Tensor:
    return torch.randn(3, _SIZE, dtype=torch.float64, requires_grad=True)


def _gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output.square().sum(), inputs)


@pytest.mark.parametrize(("no_grad_steps", "grad_steps"), [(0, 3), (1, 1), (3, 2), (4, 0)])
def test_residual_equals_explicitly_detached_loop(linear: torch.nn.Linear, no_grad_steps: int, grad_steps: int) -> None:
    start = _start()
    expected = start
    for _ in range(no_grad_steps):
        expected = expected + torch.tanh(linear(expected)).detach()
    for _ in range(grad_steps):
        expected = expected + torch.tanh(linear(expected))

    def step(state: torch.Tensor, carried: Any, index: int) -> tuple[torch.Tensor, Any]:
        return state + torch.tanh(linear(state)), None

    result = iterate_residual(step, start, Depth(no_grad_steps, grad_steps))
    torch.testing.assert_close(result, expected)
    inputs = (start, linear.weight) if grad_steps > 0 else (start,)
    for gradient, expected_gradient in zip(_gradients(result, *inputs), _gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_what_steps_carry_over_is_detached_with_them(linear: torch.nn.Linear) -> None:
    carried_into = []

    def step(state: torch.Tensor, carried: torch.Tensor | None, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        carried_into.append(carried)
        increment = linear(state)
        return state + increment, increment

    iterate_residual(step, _start(), Depth(2, 2))
    assert carried_into[0] is None
    assert [carried.requires_grad for carried in carried_into[1:]] == [False, False, True]


def test_indices_count_all_steps() -> None:
    indices: list[int] = []

    def step(state: torch.Tensor, carried: Any, index: int) -> tuple[torch.Tensor, Any]:
        indices.append(index)
        return state, carried

    iterate_residual(step, _start(), Depth(2, 3))
    assert indices == [0, 1, 2, 3, 4]


def test_detached_increments_are_exact() -> None:
    before, after = torch.randn(5, requires_grad=True), torch.randn(5)
    result = detached_increments(before, after)
    assert torch.equal(result, after)
    (gradient,) = torch.autograd.grad(result.sum(), before)
    assert torch.equal(gradient, torch.ones(5))


def test_state_keeps_gradient_through_the_last_steps_only(linear: torch.nn.Linear) -> None:
    injected = _start()
    initial = torch.zeros_like(injected.detach())

    def step(state: torch.Tensor) -> torch.Tensor:
        return torch.tanh(linear(state) + injected)

    expected = initial
    for index in range(5):
        expected = step(expected if index >= 3 else expected.detach())
        expected = expected.detach() if index < 3 else expected
    result = iterate_state(step, initial, Depth(3, 2))
    torch.testing.assert_close(result, expected)
    for gradient, expected_gradient in zip(
        _gradients(result, injected, linear.weight), _gradients(expected, injected, linear.weight), strict=True
    ):
        torch.testing.assert_close(gradient, expected_gradient)
