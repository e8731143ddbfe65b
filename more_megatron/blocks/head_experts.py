"""Experts of attention heads: every head has matrices of its own to choose from, all in one grouped product."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size

from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.rows import RowGroups, RowPadding
from more_megatron.config import MoREConfig
from more_megatron.model.initialization import BlockInitializer


def _sum_of_rows(rows: torch.Tensor, order: torch.Tensor, places: torch.Tensor, copies: int) -> torch.Tensor:
    """Return the sum over the rows of each item, [items, ...]."""
    if rows.is_cuda:  # Where sums into one place would be atomic, and their order any.
        return rows.index_select(0, places).unflatten(0, (-1, copies)).sum(dim=1)
    items = (order // copies).unsqueeze(-1).expand_as(rows)
    return rows.new_zeros(len(rows) // copies, rows.size(1)).scatter_add_(0, items, rows)


class _Move(torch.autograd.Function):
    """A copy of an item for each of its rows, in their order, or the sum over them: each is the other's backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, sums: bool, order: torch.Tensor, places: torch.Tensor, copies: int) -> Any:
        ctx.save_for_backward(order, places)
        ctx.sums, ctx.copies = sums, copies
        return _sum_of_rows(x, order, places, copies) if sums else x.index_select(0, order // copies)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, places = ctx.saved_tensors
        copies = ctx.copies
        grad = grad.index_select(0, order // copies) if ctx.sums else _sum_of_rows(grad, order, places, copies)
        return grad, None, None, None, None


@dataclass(frozen=True)
class Choice:
    """Which experts the heads of each token chose: a row for each choice, sorted by expert.

    Before sorting, choices are in the order of tokens, then heads: those of one head of one token are consecutive, and
    so are those of one token. `copy` and `sum` go from either to rows and back.
    """

    order: torch.Tensor  # for each row which choice it is, int64 [rows]
    places: torch.Tensor  # for each choice its row, int64 [rows]
    weights: torch.Tensor  # weight of each row, float32 [rows]
    groups: RowGroups  # rows of each expert

    @classmethod
    def of(cls, logits: torch.Tensor, topk: int, dropout: float = 0.0) -> Choice:
        """Choose the `topk` experts of the largest scores for each head; the scores are the weights, as they are.

        Logits are [tokens, heads, experts]; with the probability `dropout` an expert cannot be chosen.
        """
        heads, experts = logits.shape[1:]
        scores = logits.float().sigmoid()
        eligible = scores.detach()
        if dropout > 0.0:
            eligible = eligible.masked_fill(torch.rand_like(eligible) < dropout, float("-inf"))
        chosen = eligible.topk(topk, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen).flatten()
        first = torch.arange(0, heads * experts, experts, device=logits.device).unsqueeze(-1)
        expert = (chosen + first).flatten()
        # Small integers sort several times faster.
        small = torch.int16 if heads * experts < 2**15 else torch.int32
        ordered, order = expert.to(small).sort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        # Counting the rows of each expert would wait for the device.
        all_experts = torch.arange(heads * experts, dtype=small, device=order.device)
        ends = torch.searchsorted(ordered, all_experts, right=True, out_int32=True)
        return cls(order, places, weights.index_select(0, order), RowGroups(ends))

    def loads(self, heads: int) -> torch.Tensor:
        """Return how often each expert was chosen, [heads, experts]."""
        return self.groups.ends.diff(prepend=self.groups.ends.new_zeros(1)).unflatten(0, (heads, -1))

    def copy(self, items: torch.Tensor) -> torch.Tensor:
        """Return rows, [rows, ...], of items that each have the same number of them, [items, ...]."""
        return _Move.apply(items, False, self.order, self.places, len(self.order) // len(items))

    def sum(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Return sums over the rows of each of `count` items, [count, ...]."""
        return _Move.apply(rows, True, self.order, self.places, len(self.order) // count)


class HeadRouter(MegatronModule):
    """Scores the experts of all heads. Every rank holds all weights; sequence parallelism splits the positions."""

    def __init__(self, config: MoREConfig, num_experts: int, layer_number: int, name: str) -> None:
        super().__init__(config=config)
        self._num_experts = num_experts
        shape = (config.num_attention_heads * num_experts, config.hidden_size)
        draw = functools.partial(BlockInitializer.scaled_normal, inputs=config.hidden_size)
        initializer = BlockInitializer(config, layer_number)
        self.weight = initializer.replicated_parameter(shape, f"switchhead/{name}_router", draw)

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [s, b, heads, experts], given [s, b, h]."""
        logits = torch.nn.functional.linear(normed, self.weight.to(normed.dtype))
        return logits.float().unflatten(-1, (-1, self._num_experts))


class HeadExperts(GroupedModule):
    """A linear map without bias for each expert of the heads on this rank.

    `fan_in` is the number of inputs that the initial weights are scaled by, and `name` unique within the layer.
    """

    def __init__(
        self,
        config: MoREConfig,
        num_experts: int,
        layer_number: int,
        groups: ProcessGroupCollection,
        *,
        name: str,
        inputs: int,
        outputs: int,
        fan_in: int,
    ) -> None:
        total = config.num_attention_heads * num_experts
        local = total // get_pg_size(groups.tp)
        first = get_pg_rank(groups.tp) * local
        replica = get_pg_rank(groups.dp_cp)
        placement = Placement(range(first, first + local), total, split_group=None, replica_rank=replica)
        super().__init__(config, placement)
        self._weighs_inputs = inputs < outputs
        draw = functools.partial(BlockInitializer.scaled_normal, inputs=fan_in)
        self.weight = self.linear_weights(Weight((outputs, inputs), f"switchhead/{{}}/{name}", draw))
        for parameter in self.parameters():
            # Other ranks hold other heads.
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010
            setattr(parameter, "partition_dim", 0)  # noqa: B010
        self.initialize(layer_number)

    def forward(self, items: torch.Tensor, choice: Choice, count: int) -> torch.Tensor:
        """Apply to each item the experts that were chosen for it, and sum up the weighed results, [count, out].

        Args:
            items: Tokens, or heads of tokens, [items, in].
            choice: Which experts.
            count: Number of tokens, or of heads of tokens, that the results are summed for.
        """
        rows, weights = choice.copy(items), choice.weights.unsqueeze(-1).to(items.dtype)
        if self._weighs_inputs:
            return choice.sum(self._linear(rows * weights, choice.groups), count)
        return choice.sum(self._linear(rows, choice.groups) * weights, count)

    def _linear(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        padding = RowPadding.of(groups, self.backend.row_multiple(self.config))
        return padding.unpad(self.backend.linear(padding.pad(rows), self.weight, padding.groups))
