"""`sequential_experts`: each expert is a feed-forward network, whose output a gated LSTM cell refines."""

from __future__ import annotations

import torch
from torch import Tensor

from .cell_experts import CellExperts, IteratedMoE, lstm_cell
from .fields import Config
from .interface import System
from .routing import Routing

__all__ = ["SYSTEM"]


class SequentialExperts(CellExperts):
    """q = FFN(x), c = 0;  r times n, c <- LSTMCell(q, q, c);  q <- w n + (1 - w) q, w = sigma(v . q + b).

    The gates see the sum of what PyTorch calls the weights of input and state: `lstm` has that sum.
    """

    gate: Tensor
    gate_bias: Tensor

    def __init__(self, config: Config) -> None:
        hidden = config.hidden_size
        shapes = {"lstm": (4, hidden, hidden), "lstm_bias": (4, hidden), "gate": (1, hidden), "gate_bias": (1,)}
        super().__init__(config, shapes)

    def forward(self, rows: Tensor, routing: Routing, num_steps: int) -> Tensor:
        """Return [rows, h]."""
        refined = self.feed_forward(rows, routing)
        cell, vector = torch.zeros_like(refined), self.gate[routing.experts, 0]
        for _ in range(num_steps):
            new, cell = lstm_cell(self.linear(refined, "lstm", routing), cell)
            gate = torch.sigmoid((refined * vector).sum(-1, keepdim=True) + self.gate_bias[routing.experts])
            refined = refined + gate * (new - refined)
        return refined


class SequentialExpertsMoE(IteratedMoE):
    """A layer of them."""

    def build_experts(self) -> None:
        """Create the routed experts."""
        self.experts = SequentialExperts(self.config)


class SequentialExpertsSystem(System):
    """Experts alone differ."""

    moe_class = SequentialExpertsMoE


SYSTEM = SequentialExpertsSystem()
