"""Experts with biases that are a feed-forward network and a recurrent cell."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from .experts import Experts
from .fields import Config
from .routing import Routing

__all__ = ["CellExperts", "lstm_cell"]


class CellExperts(Experts):
    """A feed-forward network for each expert, linear, GELU, linear, and what a subclass has beside it.

    `shapes` are those of each further weight of one expert, by name.
    """

    def __init__(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        feed_forward = {"fc1": (width, hidden), "fc1_bias": (width,), "fc2": (hidden, width), "fc2_bias": (hidden,)}
        super().__init__(config, {**feed_forward, **shapes})

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
