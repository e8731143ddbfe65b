"""The sequential expert: a feed-forward network, then an LSTM cell that refines its output behind a gate.

q = FFN(x), c = 0;  r times n, c <- LSTMCell(input q, hidden q, cell c);  q <- w n + (1 - w) q, w = sigma(v . q + b)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from more_megatron.blocks.refusals import cell_refusals
from more_megatron.systems.base import DEPTH, System
from more_megatron.systems.export import CELL_FEED_FORWARD, Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack


class SequentialExperts(System):
    """Experts whose output is refined r times by a gated LSTM cell."""

    name = "sequential_experts"
    summary = "expert i is a feed-forward network, whose output a gated LSTM cell refines r times"
    reads = DEPTH
    expert_rows = (
        *CELL_FEED_FORWARD,
        # Rows of input, forget, new and output gate.
        Row("mlp.experts.lstm.weight", "mlp.experts.lstm", "N 4 h h"),
        Row("mlp.experts.lstm.bias", "mlp.experts.lstm_bias", "N 4 h"),
        Row("mlp.experts.gate.weight", "mlp.experts.gate", "N 1 h"),
        Row("mlp.experts.gate.bias", "mlp.experts.gate_bias", "N 1"),
    )

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        return cell_refusals(config)

    def figures(self, config: MoREConfig) -> tuple[str, ...]:
        from more_megatron.monitoring.recurrence import REFINEMENT_FIGURES

        return REFINEMENT_FIGURES

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.cell_experts import SequentialExperts, sequential_experts_cost
        from more_megatron.blocks.layer import MicroBatchMoELayer
        from more_megatron.blocks.layers import expert_stack

        return expert_stack(
            config, MicroBatchMoELayer, SequentialExperts, functools.partial(sequential_experts_cost, config)
        )


SYSTEM = SequentialExperts()
