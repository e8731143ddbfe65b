"""The sandwich expert: expand, a GRU on its own state, contract.

u = GELU(W1 x + b1);  r times u <- GRU(input u, hidden u);  y = W2 u + b2
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack

__all__ = ["SYSTEM"]


class GRUExperts(System):
    """Experts that iterate a GRU in their inner layer, as wide as `--moe-ffn-hidden-size` says."""

    name = "gru_experts"
    summary = "expert i expands, iterates a GRU on its own state r times, and contracts"
    reads = DEPTH
    expert_rows = (
        Row("mlp.experts.ffn.fc1.weight", "mlp.experts.fc1", "N m h"),
        Row("mlp.experts.ffn.fc1.bias", "mlp.experts.fc1_bias", "N m"),
        # Rows of reset, update and new gate; of the last for the input and for the state.
        Row("mlp.experts.gru.weight", "mlp.experts.gru", "N 4 m m"),
        Row("mlp.experts.gru.bias", "mlp.experts.gru_bias", "N 4 m"),
        Row("mlp.experts.ffn.fc2.weight", "mlp.experts.fc2", "N h m"),
        Row("mlp.experts.ffn.fc2.bias", "mlp.experts.fc2_bias", "N h"),
    )
    expert_states = ()
    former_keys: ClassVar[Mapping[str, str]] = {
        "mlp.experts.ffn.fc1.weight": "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.ffn.fc1.bias": "mlp.experts.experts.linear_fc1.bias",
        "mlp.experts.ffn.fc2.weight": "mlp.experts.experts.linear_fc2.weight",
        "mlp.experts.ffn.fc2.bias": "mlp.experts.experts.linear_fc2.bias",
    }

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        """Yield what the system cannot do of what `config` asks for."""
        from more_megatron.blocks.refusals import cell_refusals, recurrence_refusals

        yield from recurrence_refusals(config)
        yield from cell_refusals(config)

    def stack(self, config: MoREConfig) -> Stack:
        """Return the layers of the whole model."""
        from more_megatron.blocks.cell_experts import CellMoELayer, GRUExperts, gru_experts_cost
        from more_megatron.blocks.layer import MicroBatchTransformerLayer
        from more_megatron.blocks.layers import decoder_stack, moe_layer

        layer = moe_layer(
            config,
            layer=MicroBatchTransformerLayer,
            moe=CellMoELayer,
            parts={"experts": GRUExperts},
            experts_cost=functools.partial(gru_experts_cost, config),
        )
        return decoder_stack(config, layer)


SYSTEM = GRUExperts()
