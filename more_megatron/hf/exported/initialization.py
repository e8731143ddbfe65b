"""Initial weights of recurrent parts."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .fields import Config

__all__ = ["layers_passed", "takase_normal"]


def layers_passed(config: Config) -> int:
    """Return the number of layers that a token passes if each is repeated."""
    return config.num_hidden_layers * config.mean_recurrence


def takase_normal(config: Config, weight: Tensor, depth: int | None) -> None:
    """Draw a weight as Takase et al. (arXiv 2312.16903), as used in Huginn (arXiv 2502.05171, section 4).

    Args:
        config: Model configuration.
        weight: What is drawn.
        depth: Layers that a token passes, if the output of the weight is added to the state; else None.
    """
    std = math.sqrt(2.0 / (5.0 * config.hidden_size))
    if depth is not None:
        std /= math.sqrt(2.0 * depth)
    nn.init.trunc_normal_(weight, std=std, a=-3.0 * std, b=3.0 * std)
