"""`shared_block_ffn`: light experts, combined, then one recurrent block over the whole sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .cache import Memory
from .context import CallContext
from .experts import Experts, MoREMoE
from .fields import Config
from .recurrence import Rows
from .recurrent_block import BlockSystem, RecurrentBlock
from .routing import Routing


class LightExperts(Experts):
    """Expert i computes `W2_i . GELU(W1_i . x)`, h -> 2h -> h."""

    def __init__(self, config: Config) -> None:
        hidden = config.hidden_size
        super().__init__(config, {"fc1": (2 * hidden, hidden), "fc2": (hidden, 2 * hidden)})

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h]."""
        return routing.weigh(self.linear(F.gelu(self.linear(rows, "fc1", routing)), "fc2", routing))


class CombinedBlockMoE(MoREMoE):
    """Light experts are combined first; then one recurrent block runs over the whole sequence."""

    def __init__(self, config: Config, *args: Any) -> None:
        super().__init__(config, *args)
        self.recurrent_block = RecurrentBlock(config, follows_layers=True)

    def mix(
        self, x: Tensor, logits: Tensor, context: CallContext, memory: Memory, stream: Tensor | None = None
    ) -> Tensor:
        output = super().mix(x, logits, context, memory, stream)
        rows = Rows(context, memory.at("block"), self.layer_idx)
        return self.recurrent_block(output, context.initial_state(self.layer_idx, output), rows)


SYSTEM = BlockSystem(4, moe_class=CombinedBlockMoE, experts_class=LightExperts)
