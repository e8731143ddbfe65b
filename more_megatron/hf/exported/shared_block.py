"""`shared_block`: experts are projections around one recurrent block a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache import Memory
from .context import CallContext
from .fields import Config
from .grouped import grouped_linear
from .recurrent_block import BlockSystem, MixingMoE, RecurrentBlock, block_width
from .routing import Routing

__all__ = ["SYSTEM"]


class ProjectionExperts(nn.Module):
    """The maps `W_in_i` and `W_out_i` of each expert."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.hidden_size)
        self.proj_in, self.proj_out = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def draw_weight(self, name: str, weight: Tensor) -> None:
        """Draw orthogonal matrices."""
        for matrix in weight:
            matrix.copy_(nn.init.orthogonal_(torch.empty_like(matrix, dtype=torch.float32)))


class SharedBlockMoE(MixingMoE):
    """Expert i computes `W_out_i . R(W_in_i . x)`, where R is the block."""

    experts: ProjectionExperts

    def build_experts(self) -> None:
        """Create the projections and the block."""
        self.experts = ProjectionExperts(self.config)
        self.recurrent_block = RecurrentBlock(self.config)

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        """Return weighted projections of the last states, [rows, h]."""
        state, rows = self.initial_rows(x, routing, context), self.block_rows(routing, context, memory)
        projected = grouped_linear(routing.dispatch(x), self.experts.proj_in, routing.ends)
        state = self.recurrent_block(projected, state, rows)
        return self.output(state, routing)

    def output(self, state: Tensor, routing: Routing) -> Tensor:
        """Return the weighted projections of last states, [rows, h]."""
        return routing.weigh(grouped_linear(state, self.experts.proj_out, routing.ends))


class SharedBlock(BlockSystem):
    """The layers with such experts."""

    moe_class = SharedBlockMoE
    fields = {"recurrent_intermediate_size": block_width(4)}  # noqa: RUF012


SYSTEM = SharedBlock()
