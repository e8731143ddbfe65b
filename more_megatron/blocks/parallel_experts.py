"""Experts with two branches: a feed-forward network, and an LSTM along the tokens that were sent to the expert."""

from typing import Any

import torch

from more_megatron.blocks.cells import ExpertBias
from more_megatron.blocks.experts import ExpertFeedForward, ExpertLinear, Experts, biased_linear_cost, feed_forward_cost
from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.rows import RowGroups, Rows
from more_megatron.blocks.segment_lstm import TimeSteps, segment_lstm
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.monitoring.figures import is_reported, record_figure

# Weight of the LSTM, and entropy of both weights in nats: 0 where experts have come to use one branch alone.
BRANCH_FIGURES = ("lstm gate", "lstm gate entropy")

# Hidden size of the network that mixes the branches.
_GATE_WIDTH = 64


class ParallelExperts(Experts):
    """Expert i computes `w0 FFN(x) + w1 LSTM(x)`, `w = softmax(W4 relu(W3 x + b3) + b4)` from the token.

    The LSTM runs along the rows of one sequence, in order of position, from a zero state. Ranks that split an expert
    share out the segments: each runs its own with all of the weights.
    """

    def build(self) -> None:
        hidden = self.config.hidden_size
        self.ffn = ExpertFeedForward(self.config, self.placement)
        self.lstm = _SegmentLSTM(self.config, self.placement, hidden)
        self.gate = _BranchGate(self.config, self.placement)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        """Return the mixed branches, [rows, h], of the rows that were sent to the local experts.

        Over the ranks that split an expert they add up. The depth has no effect: nothing is repeated.
        """
        padded, padding = rows.padded(self.backend.row_multiple(self.config))
        x = padding.pad(hidden_states)
        ffn = padding.unpad(self.ffn(x, padded.groups))
        gates = padding.unpad(self.lstm.gates(x, padded.groups))
        weights = padding.unpad(self.gate(x, padded.groups))
        # A pass that is recomputed runs without gradient first.
        if self.training and torch.is_grad_enabled() and is_reported(BRANCH_FIGURES[0]):
            figures = weights[:, 1], torch.special.entr(weights.detach().float()).sum(1)
            for name, values in zip(BRANCH_FIGURES, figures, strict=True):
                record_figure(name, values)
        return weights[:, :1] * ffn + weights[:, 1:] * self.lstm(gates, rows)


class _SegmentLSTM(GroupedModule):
    """An LSTM of a size for each expert, drawn as PyTorch draws its own, which has two biases.

    Over the ranks that split an expert its weights are split by channel.
    """

    def __init__(self, config: MoREConfig, placement: Placement, size: int) -> None:
        super().__init__(config, placement)
        draws = BlockInitializer
        weight = Weight((4, size, config.hidden_size), "lstm/input", draws.recurrent, split_dim=1)
        self.input = ExpertLinear(config, placement, weight, bias=draws.recurrent_sum)
        self.state = self.stacked_weight(Weight((4, size, size), "lstm/state/{}", draws.recurrent, split_dim=1))

    def gates(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return what the inputs, [rows, h], contribute to the gates, [rows, 4n], on every rank."""
        own = self.input(x, groups)
        return own if self.placement.split_size == 1 else self._whole(own).flatten(1)

    def forward(self, gates: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return the hidden states, [rows, n], of the segments that this rank runs; zeros in the others."""
        placement = self.placement
        weight: torch.Tensor = self.state
        if placement.split_size > 1:
            # Channels of the output last, gathered, and back.
            weight = self._whole(weight.permute(0, 3, 1, 2).flatten(2)).permute(0, 2, 3, 1)
        steps = TimeSteps.of(rows.segments, len(rows.groups.ends), placement.split_rank, placement.split_size)
        return segment_lstm(gates, weight.flatten(1, 2), rows.groups.ends, steps)

    def _whole(self, own: torch.Tensor) -> torch.Tensor:
        """Return [..., 4, n] of all ranks, given this rank's channels of it, [..., 4 * n / ranks]."""
        parts = self.placement.gathered(own).unflatten(-1, (self.placement.split_size, 4, -1))
        return parts.transpose(-3, -2).flatten(-2)


class _BranchGate(GroupedModule):
    """Two weights for each row that add up to 1, about half at first: a small network of its expert, on every rank."""

    def __init__(self, config: MoREConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        draws = BlockInitializer
        weight = Weight((_GATE_WIDTH, config.hidden_size), "gate/inner", draws.megatron_in)
        self.inner = ExpertLinear(config, placement, weight, bias=draws.zeros)
        self.weight = self.stacked_weight(Weight((2, _GATE_WIDTH), "gate/{}", draws.megatron_in))
        self.bias = self.stacked_bias(Weight((2,), "gate/{}/bias", draws.zeros))

    def forward(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return [rows, 2] for [rows, h]; every rank contributes to its gradient."""
        inner = torch.relu(self.inner(self.placement.enter(x), groups)).unsqueeze(1)
        weight = ExpertBias.of(self.weight.flatten(1), groups, len(x)).of_rows().unflatten(1, (2, _GATE_WIDTH))
        logits = ExpertBias.of(self.bias, groups, len(x)).add_to((inner * weight).sum(-1))
        return self.placement.copied(torch.softmax(logits, dim=-1))


def parallel_experts_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    hidden: Any = config.hidden_size
    gate = biased_linear_cost(_GATE_WIDTH, hidden) + biased_linear_cost(2, _GATE_WIDTH)
    # Of the products with the state there is no bias.
    state = biased_linear_cost(4, hidden, hidden) + Cost(-4 * hidden, -4 * hidden)
    expert = feed_forward_cost(config) + biased_linear_cost(4, hidden, hidden) + state + gate
    return expert.routed(config.num_moe_experts, config.moe_router_topk)
