"""`shared_block`: experts are projections around one recurrent block a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fields import Config
from .parts import grouped_linear
from .recurrence import Rows
from .recurrent_block import BlockSystem, MixingMoE, RecurrentBlock, block_fields
from .routing import Routing


class ProjectionExperts(nn.Module):
    """The maps `W_in_i` and `W_out_i` of each expert."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.hidden_size)
        self.proj_in, self.proj_out = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def draw_weight(self, name: str, weight: Tensor) -> None:
        for matrix in weight:
            matrix.copy_(nn.init.orthogonal_(torch.empty_like(matrix, dtype=torch.float32)))

    def forward(self, rows: Tensor, name: str, ends: Tensor) -> Tensor:
        """Return [rows, h] times the matrices of a name; each expert's rows end at one of `ends`."""
        return grouped_linear(rows, getattr(self, name), ends)


class SharedBlockMoE(MixingMoE):
    """Expert i computes `W_out_i . R(W_in_i . x)`, where R is the block."""

    def __init__(self, config: Config, *args: Any) -> None:
        super().__init__(config, *args)
        self.recurrent_block = RecurrentBlock(config)

    def run_block(self, x: Tensor, state: Tensor, rows: Rows) -> Tensor:
        return self.recurrent_block(self.experts(x, "proj_in", rows.routing.ends), state, rows)

    def contract(self, state: Tensor, routing: Routing) -> Tensor:
        return self.experts(state, "proj_out", routing.ends)


SYSTEM = BlockSystem(moe_class=SharedBlockMoE, experts_class=ProjectionExperts, fields=block_fields(4))
