"""Tensors asked for on a GPU are on the CPU, wherever they are asked for."""

from typing import Any

import pytest
import torch

from more_megatron.platform.cuda.pytorch import CpuInPlaceOfCuda


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), 0])
def test_every_spelling(device: Any) -> None:
    assert torch.empty(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).to(device=device, dtype=torch.float64).dtype == torch.float64


def test_other_arguments_stay_what_they_are() -> None:
    assert torch.ones(2).to(torch.float16).dtype == torch.float16
    assert torch.full((2,), 3).tolist() == [3, 3]
    assert torch.empty(1, device="meta").is_meta


def test_cuda_is_not_there() -> None:
    assert not torch.cuda.is_available()
    assert torch.ones(1).cuda().device.type == "cpu"


def test_type_names() -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    with CpuInPlaceOfCuda():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


class _BackwardInBackward(torch.autograd.Function):
    """Recomputes in its backward pass, as Megatron's checkpoint does."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(_AllocatesInBackward.apply(x), grad)
        assert x.grad is not None
        return x.grad


class _AllocatesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad + torch.zeros(1, device=torch.cuda.current_device())


def test_backward_passes_within_backward_passes() -> None:
    x = torch.ones(2, requires_grad=True)
    _BackwardInBackward.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]
