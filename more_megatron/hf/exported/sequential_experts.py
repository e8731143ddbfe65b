"""`sequential_experts`: each expert is a feed-forward network, whose output a gated LSTM cell refines."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import CellExperts, RecurringMoE, lstm_cell
from .fields import Config
from .interface import System
from .recurrence import Rows, State, recur


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

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return the last states, [rows, h], given [rows, h]."""

        def step(number: int, rows: Rows, refined: Tensor, cell: Tensor) -> State:
            new, cell = lstm_cell(self.linear(refined, "lstm", rows.routing), cell)
            experts = rows.routing.experts
            gate = torch.sigmoid((refined * self.gate[experts, 0]).sum(-1, keepdim=True) + self.gate_bias[experts])
            return refined + gate * (new - refined), cell

        refined = self.feed_forward(x, rows.routing)
        return recur(step, (refined, torch.zeros_like(refined)), rows)[0]


SYSTEM = System(moe_class=RecurringMoE, experts_class=SequentialExperts)
