"""`gru_experts`: each expert expands, iterates a GRU on its own state, and contracts."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts import CellExperts, RecurringMoE
from .fields import Config
from .interface import System
from .recurrence import Rows, State, recur
from .routing import Routing


class GRUExperts(CellExperts):
    """u = GELU(W1 x + b1);  r times u <- GRU(input u, hidden u);  y = W2 u + b2.

    Reset and update gate see the sum of what PyTorch calls the weights of input and state: `gru` has that sum. The new
    state sees them apart: `gru[:, 2]` is that of the input, `gru[:, 3]` that of the state.
    """

    def __init__(self, config: Config) -> None:
        width = config.moe_intermediate_size
        super().__init__(config, {"gru": (4, width, width), "gru_bias": (4, width)})

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """Return what the last states contract to, [rows, h], given [rows, h]."""

        def step(number: int, rows: Rows, state: Tensor) -> State:
            reset, update, new, hidden = self.linear(state, "gru", rows.routing).chunk(4, dim=-1)
            new = torch.tanh(new + reset.sigmoid() * hidden)
            return (torch.lerp(new, state.to(new.dtype), update.sigmoid()),)

        return self.contract(recur(step, (self.expand(x, rows.routing),), rows)[0], rows.routing)

    def contract(self, state: Tensor, routing: Routing) -> Tensor:
        """Return [rows, h] for [rows, m]."""
        return self.linear(state, "fc2", routing)


class GRUExpertsMoE(RecurringMoE):
    def contract(self, state: Tensor, routing: Routing) -> Tensor:
        # No call of the module, inside which this is asked for: its weights are here for the one that is under way.
        return self.experts.contract(state, routing)


SYSTEM = System(moe_class=GRUExpertsMoE, experts_class=GRUExperts)
