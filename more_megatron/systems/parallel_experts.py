"""The parallel expert: a feed-forward network beside an LSTM along the tokens that were sent to the expert.

y = w0 FFN(x) + w1 LSTM(x), w = softmax(W4 relu(W3 x + b3) + b4)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from more_megatron.blocks.refusals import cell_refusals, mixing_refusals
from more_megatron.systems.base import System
from more_megatron.systems.export import CELL_FEED_FORWARD, Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.ranges import Ends


class ParallelExperts(System):
    """Experts of two branches. Its recurrence runs along the sequence: there is no depth to choose."""

    name = "parallel_experts"
    summary = "expert i mixes, token by token, a feed-forward network and an LSTM along the tokens sent to it"
    mixes_tokens = True
    expert_rows = (
        *CELL_FEED_FORWARD,
        # Rows of input, forget, new and output gate.
        Row("mlp.experts.lstm.input.weight", "mlp.experts.lstm_input", "N 4 h h"),
        Row("mlp.experts.lstm.input.bias", "mlp.experts.lstm_input_bias", "N 4 h"),
        Row("mlp.experts.lstm.state", "mlp.experts.lstm_state", "N 4 h h"),
        Row("mlp.experts.gate.inner.weight", "mlp.experts.gate_fc1", "N 64 h"),
        Row("mlp.experts.gate.inner.bias", "mlp.experts.gate_fc1_bias", "N 64"),
        Row("mlp.experts.gate.weight", "mlp.experts.gate_fc2", "N 2 64"),
        Row("mlp.experts.gate.bias", "mlp.experts.gate_fc2_bias", "N 2"),
    )

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        yield from cell_refusals(config)
        yield from mixing_refusals(config)

    def figures(self, config: MoREConfig) -> tuple[str, ...]:
        from more_megatron.blocks.parallel_experts import BRANCH_FIGURES

        return BRANCH_FIGURES

    def health_ranges(self, config: MoREConfig) -> Mapping[str, Ends]:
        """Return the healthy ranges of its figures: without entropy, experts use one of their branches alone."""
        return {"system/lstm gate entropy": (0.02, None)}

    def stack(self, config: MoREConfig) -> Stack:
        from more_megatron.blocks.dispatch import RowMoELayer
        from more_megatron.blocks.layers import expert_stack
        from more_megatron.blocks.parallel_experts import ParallelExperts, parallel_experts_cost

        return expert_stack(config, RowMoELayer, ParallelExperts, functools.partial(parallel_experts_cost, config))


SYSTEM = ParallelExperts()
