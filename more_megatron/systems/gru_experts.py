"""The sandwich expert: expand, a GRU on its own state, contract.

u = GELU(W1 x + b1);  r times u <- GRU(input u, hidden u);  y = W2 u + b2
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from more_megatron.blocks.refusals import cell_refusals
from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import CELL_FEED_FORWARD, Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack


class GRUExperts(System):
    """Experts that iterate a GRU in their inner layer, as wide as `--moe-ffn-hidden-size` says."""

    name = "gru_experts"
    summary = "expert i expands, iterates a GRU on its own state r times, and contracts"
    reads = DEPTH
    expert_rows = (
        *CELL_FEED_FORWARD[:2],
        # Rows of reset, update and new gate; of the last for the input and for the state.
        Row("mlp.experts.gru.weight", "mlp.experts.gru", "N 4 m m"),
        Row("mlp.experts.gru.bias", "mlp.experts.gru_bias", "N 4 m"),
        *CELL_FEED_FORWARD[2:],
    )
    former_keys: ClassVar[Mapping[str, str]] = {
        row.megatron: row.megatron.replace("ffn.fc", "experts.linear_fc") for row in CELL_FEED_FORWARD
    }

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        return cell_refusals(config)

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.cell_experts import GRUExperts, gru_experts_cost
        from more_megatron.blocks.layer import MicroBatchMoELayer
        from more_megatron.blocks.layers import expert_stack

        return expert_stack(config, MicroBatchMoELayer, GRUExperts, functools.partial(gru_experts_cost, config))


SYSTEM = GRUExperts()
