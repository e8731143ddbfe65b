"""`shared_block`: experts are projections around one recurrent block a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .experts import Experts
from .fields import Config
from .recurrence import Rows
from .recurrent_block import BlockSystem, MixingMoE, RecurrentBlock
from .routing import Routing


class ProjectionExperts(Experts):
    """The maps `W_in_i` and `W_out_i` of each expert."""

    def __init__(self, config: Config) -> None:
        shape = (config.hidden_size, config.hidden_size)
        super().__init__(config, {"proj_in": shape, "proj_out": shape})

    def forward(self, rows: Tensor, name: str, routing: Routing) -> Tensor:
        """Return [rows, h] times the matrices of a name."""
        return self.linear(rows, name, routing)


class SharedBlockMoE(MixingMoE):
    """Expert i computes `W_out_i . R(W_in_i . x)`, where R is the block."""

    def __init__(self, config: Config, *args: Any) -> None:
        super().__init__(config, *args)
        self.recurrent_block = RecurrentBlock(config)

    def run_block(self, x: Tensor, state: Tensor, rows: Rows) -> Tensor:
        return self.recurrent_block(self.experts(x, "proj_in", rows.routing), state, rows)

    def contract(self, state: Tensor, routing: Routing) -> Tensor:
        return self.experts(state, "proj_out", routing)


SYSTEM = BlockSystem(4, moe_class=SharedBlockMoE, experts_class=ProjectionExperts)
