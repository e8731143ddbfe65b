"""Experts with biases that are a feed-forward network and a recurrent cell."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import Config
from .parts import grouped_linear
from .routing import Routing

__all__ = ["CellExperts", "lstm_cell"]


class CellExperts(nn.Module):
    """A feed-forward network for each expert, linear, GELU, linear, and what a subclass has beside it.

    `shapes` are those of each further weight of one expert, by name. Weights of cells have an axis for their gates.
    """

    def __init__(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.moe_intermediate_size
        feed_forward = {"fc1": (width, hidden), "fc1_bias": (width,), "fc2": (hidden, width), "fc2_bias": (hidden,)}
        for name, shape in {**feed_forward, **shapes}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(config.num_experts, *shape)))

    def draw_weight(self, name: str, weight: Tensor) -> None:
        """Draw a new weight as the training code does."""
        if name.startswith(("gru", "lstm")):
            self.draw_recurrent(name, weight)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            std = self.config.initializer_range
            std = std / math.sqrt(2.0 * self.config.num_hidden_layers) if name == "fc2" else std
            nn.init.trunc_normal_(weight, std=std, a=-3.0 * std, b=3.0 * std)

    def draw_recurrent(self, name: str, weight: Tensor) -> None:
        """Draw a weight or bias of a cell, [N, gates, n, ...]: the sum of the two that PyTorch's cells have."""
        bound = 1.0 / math.sqrt(weight.size(2))
        weight.uniform_(-bound, bound).add_(torch.empty_like(weight).uniform_(-bound, bound))

    def linear(self, rows: Tensor, name: str, routing: Routing) -> Tensor:
        """Return the linear map of a name with its bias, [rows, out]; gates are laid side by side."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
        product = grouped_linear(rows, weight.flatten(1, -2), routing.ends)
        return product + bias.flatten(1)[routing.experts]

    def expand(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return the inner layer of the feed-forward network, [rows, m], given [rows, h]."""
        return F.gelu(self.linear(rows, "fc1", routing))

    def feed_forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return what the feed-forward network makes of [rows, h]."""
        return self.linear(self.expand(rows, routing), "fc2", routing)


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell state, [rows, n] each, given i, f, g and o before their activations."""
    write, keep, new, read = gates.chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + write.sigmoid() * new.tanh()
    return read.sigmoid() * cell.tanh(), cell
