"""`recurrent_experts`: each expert is a recurrent block of its own."""

from __future__ import annotations

from torch import Tensor

from .cache import Memory
from .context import CallContext
from .recurrent_block import BlockSystem, MixingMoE, RecurrentBlock, block_width
from .routing import Routing

__all__ = ["SYSTEM"]


class RecurrentExpertsMoE(MixingMoE):
    """Expert i computes `s <- Block_i(Adapter_i([s; x]))`, r times."""

    def build_experts(self) -> None:
        """Create the blocks."""
        self.experts = RecurrentBlock(self.config, self.config.num_experts)

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        """Return weighted last states, [rows, h]."""
        state, rows = self.initial_rows(x, routing, context), self.block_rows(routing, context, memory)
        return self.output(self.experts(routing.dispatch(x), state, rows), routing)


class RecurrentExperts(BlockSystem):
    """The layers with such experts."""

    moe_class = RecurrentExpertsMoE
    fields = {"recurrent_intermediate_size": block_width(2)}  # noqa: RUF012


SYSTEM = RecurrentExperts()
