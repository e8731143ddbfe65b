"""Experts that refine what they computed with a recurrent cell, token by token.

The increments of steps without gradient are constants to the backward pass, so that what lies before the iteration
keeps its gradient. Over the ranks that split an expert, state and gates are split by channel; a product with the whole
state gathers it first.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.mappings import reduce_scatter_last_dim_to_tensor_parallel_region

from more_megatron.blocks.cells import ExpertBias, gru_step, lstm_step
from more_megatron.blocks.experts import (
    ExpertFeedForward,
    ExpertLinear,
    RoutedExperts,
    biased_linear_cost,
    feed_forward_cost,
)
from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.rows import RowGroups, RowPadding
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.truncation import iterate_residual
from more_megatron.monitoring.figures import is_reported
from more_megatron.monitoring.recurrence import REFINEMENT_FIGURES, Refinement, States, watch_states
from more_megatron.monitoring.watch import current_watch


class CellExperts(RoutedExperts):
    """Experts that iterate on each token: what they have in common."""

    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor, depth: Depth | None) -> torch.Tensor:
        """Return outputs times probabilities, [rows, h]. Over the ranks that split an expert they add up."""
        assert depth is not None, "experts that iterate are told their depth"
        output = padding.unpad(self.iterate(x, padding, depth))
        return (output * probs.unsqueeze(-1)).to(output.dtype)

    def watched(self, padding: RowPadding, depth: Depth) -> States | None:
        """Return what sees the states of an iteration, this rank's channels of them; None if nobody watches."""
        if current_watch() is None:
            return None
        place, group = f"layer {self.layer_number}", self.placement.split_group
        return watch_states(place, depth.steps, is_padding=padding.is_padding(), group=group, split=True)

    @abstractmethod
    def iterate(self, x: torch.Tensor, padding: RowPadding, depth: Depth) -> torch.Tensor:
        """Return this rank's part of the sum that is the output, [rows, h], given rows with padding, [rows, h]."""


class GRUExperts(CellExperts):
    """Expert i expands, iterates a GRU on its own state, and contracts.

    u = GELU(W1 x + b1);  r times u <- GRU(input u, hidden u);  y = W2 u + b2
    """

    def build(self) -> None:
        width = self.config.moe_ffn_hidden_size
        self.ffn = ExpertFeedForward(self.config, self.placement)
        draw = BlockInitializer.gru_of_its_state
        weight = Weight((4, width, width), "gru", draw, split_dim=1)
        self.gru = ExpertLinear(self.config, self.placement, weight, bias=draw)

    def iterate(self, x: torch.Tensor, padding: RowPadding, depth: Depth) -> torch.Tensor:
        groups = padding.groups
        bias = self.gru.row_bias(x, groups)

        def step(state: torch.Tensor, carried: None, index: int) -> tuple[torch.Tensor, None]:
            products = self.gru.product(self.placement.gathered(state), groups)
            return gru_step(products, bias, state), None

        state = iterate_residual(step, self.ffn.expand(x, groups), depth, self.watched(padding, depth))
        return self.ffn.fc2(state, groups)


class SequentialExperts(CellExperts):
    """Expert i refines the output of a feed-forward network by a gated LSTM cell.

    q = FFN(x), c = 0;  r times n, c <- LSTMCell(input q, hidden q, cell c);  q <- w n + (1 - w) q, w = sigma(v . q + b)
    """

    def build(self) -> None:
        hidden = self.config.hidden_size
        self.ffn = ExpertFeedForward(self.config, self.placement)
        draw = BlockInitializer.recurrent_sum
        weight = Weight((4, hidden, hidden), "lstm", draw, split_dim=1)
        self.lstm = ExpertLinear(self.config, self.placement, weight, bias=draw)
        self.gate = _TokenGate(self.config, self.placement)

    def iterate(self, x: torch.Tensor, padding: RowPadding, depth: Depth) -> torch.Tensor:
        groups = padding.groups
        bias, gate_of = self.lstm.row_bias(x, groups), self.gate.for_rows(x, groups)
        # A pass that is recomputed runs without gradient first.
        is_watched = self.training and torch.is_grad_enabled() and is_reported(REFINEMENT_FIGURES[0])
        watched = Refinement() if is_watched else None

        def step(refined: torch.Tensor, cell: torch.Tensor | None, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            products = self.lstm.product(self.placement.gathered(refined), groups)
            new, cell = lstm_step(products, bias, torch.zeros_like(refined) if cell is None else cell)
            gate = gate_of(refined)
            after = torch.lerp(refined, new, gate)
            if watched is not None:
                watched.add(refined, after, gate)
            return after, cell

        # Of the sum over the ranks that split an expert each refines its own columns, [rows, h / ranks].
        start, ranks, group = self.ffn(x, groups), self.placement.split_size, self.placement.split_group
        if ranks > 1:
            start = reduce_scatter_last_dim_to_tensor_parallel_region(start, group=group)
        refined = iterate_residual(step, start, depth, self.watched(padding, depth))
        if watched is not None:
            watched.record(padding.unpad, group if ranks > 1 else None)
        # As a part of a sum: with zeros in the place of the others' columns.
        width, rank = refined.size(1), self.placement.split_rank
        return torch.nn.functional.pad(refined, (rank * width, (ranks - 1 - rank) * width))


class _TokenGate(GroupedModule):
    """One number from 0 to 1 for each row, half on average at first: `sigma(v . q + b)`, with weights of its expert."""

    def __init__(self, config: MoREConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        shape, draws = (1, config.hidden_size), BlockInitializer
        self.weight = self.stacked_weight(Weight(shape, "gate/{}/weight", draws.megatron_in, split_dim=1))
        self.bias = self.stacked_bias(Weight((1,), "gate/{}/bias", draws.zeros))

    def for_rows(self, x: torch.Tensor, groups: RowGroups) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the gate of these rows as a function of this rank's columns, [rows, h / ranks], to [rows, 1]."""
        weight = ExpertBias.of(self.weight.flatten(1), groups, len(x)).of_rows()
        bias = ExpertBias.of(self.bias, groups, len(x))

        def gate(columns: torch.Tensor) -> torch.Tensor:
            logits = self.placement.summed(torch.linalg.vecdot(columns, weight).unsqueeze(1))
            return torch.sigmoid(self.placement.copied(bias.add_to(logits)))

        return gate


def gru_experts_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    width = config.moe_ffn_hidden_size
    expert = feed_forward_cost(config) + biased_linear_cost(4, width, width).in_every_step()
    return expert.routed(config.num_moe_experts, config.moe_router_topk)


def sequential_experts_cost(config: MoREConfig, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    hidden = config.hidden_size
    cell = biased_linear_cost(4, hidden, hidden) + biased_linear_cost(1, hidden)
    expert = feed_forward_cost(config) + cell.in_every_step()
    return expert.routed(config.num_moe_experts, config.moe_router_topk)
