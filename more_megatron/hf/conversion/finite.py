"""Numbers that a model can be made of."""

from __future__ import annotations

import torch

from more_megatron.errors import MoREError

__all__ = ["cast_finite"]


def cast_finite(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Return a parameter in a dtype.

    Args:
        tensor: The parameter.
        dtype: What it is cast to.
        name: What it is called in a message.

    Raises:
        MoREError: If it holds NaN or infinity, or the dtype is too narrow for it.
    """
    if not bool(tensor.isfinite().all()):
        wrong = int((~tensor.isfinite()).sum())
        raise MoREError(
            f"{name} holds NaN or infinity in {wrong} of {tensor.numel()} places: convert an older checkpoint"
        )
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        raise MoREError(
            f"{name} reaches {tensor.abs().max().item():.3g}, which {dtype} cannot hold: use --dtype bfloat16"
        )
    return cast
