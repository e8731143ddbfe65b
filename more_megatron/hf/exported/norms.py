"""Norms of layers and blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .fields import Config

__all__ = ["MoRERMSNorm", "build_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class MoRERMSNorm(nn.Module):
    """RMSNorm of the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed `x`."""
        return rms_norm(x, self.weight, self.eps)


def build_norm(config: Config, size: int) -> nn.Module:
    """Return a norm of the kind that the model has."""
    kind = MoRERMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)
