"""Experts of attention heads: every head has matrices of its own to choose from, all in one grouped product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_rank, get_pg_size

from more_megatron.blocks.backends import RowGroups, backend_of
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.parameters import Placement, draw_parameter, grouped_linear_weights, sharded_parameters
from more_megatron.blocks.statistics import routing_entropy
from more_megatron.config import MoREConfig
from more_megatron.model.initialization import BlockInitializer, replicated_parameter
from more_megatron.monitoring.figures import record_figure

__all__ = ["Choice", "HeadExperts", "HeadRouter", "head_figures", "record_use"]

_KINDS = ("value", "output")


def head_figures(max_steps: int) -> tuple[str, ...]:
    """Return the names of the figures that `record_use` records, in so many passes."""
    figures = ("router entropy", "expert load cv")
    steps = range(1, max_steps + 1)
    return tuple(f"{kind} {figure}/step {step}" for kind in _KINDS for figure in figures for step in steps)


def _sum_of_rows(rows: torch.Tensor, order: torch.Tensor, places: torch.Tensor, copies: int) -> torch.Tensor:
    """Return the sum over the rows of each item, [items, ...]."""
    if rows.is_cuda:  # Where sums into one place would be atomic, and their order any.
        return rows.index_select(0, places).unflatten(0, (-1, copies)).sum(dim=1)
    items = (order // copies).unsqueeze(-1).expand_as(rows)
    return rows.new_zeros(len(rows) // copies, rows.size(1)).scatter_add_(0, items, rows)


class _Copy(torch.autograd.Function):
    """A copy of an item for each of its rows, in the order of the rows. Backward: the sum over an item's rows."""

    @staticmethod
    def forward(ctx, items: torch.Tensor, order: torch.Tensor, places: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(order, places)
        ctx.copies = copies
        return items.index_select(0, order // copies)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, places = ctx.saved_tensors
        return _sum_of_rows(grad, order, places, ctx.copies), None, None, None


class _Sum(torch.autograd.Function):
    """The sum over an item's rows. Backward: a copy of its gradient for each of them."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, order: torch.Tensor, places: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return _sum_of_rows(rows, order, places, copies)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.copies), None, None, None


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
        order = expert.to(torch.int16 if heads * experts < 2**15 else torch.int32).argsort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        ends = torch.bincount(expert, minlength=heads * experts).cumsum(0).to(torch.int32)
        return cls(order, places, weights.index_select(0, order), RowGroups(ends))

    def loads(self, heads: int) -> torch.Tensor:
        """Return how often each expert was chosen, [heads, experts]."""
        return self.groups.ends.diff(prepend=self.groups.ends.new_zeros(1)).unflatten(0, (heads, -1))

    def copy(self, items: torch.Tensor) -> torch.Tensor:
        """Return rows, [rows, ...], of items that each have the same number of them, [items, ...]."""
        return _Copy.apply(items, self.order, self.places, len(self.order) // len(items))

    def sum(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Return sums over the rows of each of `count` items, [count, ...]."""
        return _Sum.apply(rows, self.order, self.places, len(self.order) // count)


@torch.no_grad()
def record_use(kind: str, index: int, logits: torch.Tensor, loads: torch.Tensor) -> None:
    """Record how heads use their experts in a pass: entropy of each decision, variation of the load of each head.

    Args:
        kind: "value" or "output".
        index: Number of the pass, from 0.
        logits: [..., experts].
        loads: How often each expert was chosen, [heads, experts].
    """
    loads = loads.float()
    record_figure(f"{kind} router entropy/step {index + 1}", routing_entropy(logits))
    record_figure(f"{kind} expert load cv/step {index + 1}", loads.std(dim=1, correction=0) / loads.mean(dim=1))


class HeadRouter(MegatronModule):
    """Scores the experts of all heads. Every rank holds all weights; sequence parallelism splits the positions."""

    def __init__(self, config: MoREConfig, num_experts: int, layer_number: int, name: str) -> None:
        super().__init__(config=config)
        self._num_experts = num_experts
        shape = (config.num_attention_heads * num_experts, config.hidden_size)
        initializer = BlockInitializer(config, layer_number)
        self.weight = replicated_parameter(
            config, shape, lambda: initializer.scaled_normal(shape, f"switchhead/{name}_router", config.hidden_size)
        )

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """Return logits, float32 [s, b, heads, experts], given [s, b, h]."""
        logits = torch.nn.functional.linear(normed, self.weight.to(normed.dtype))
        return logits.float().unflatten(-1, (-1, self._num_experts))


class HeadExperts(MegatronModule):
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
        super().__init__(config=config)
        total = config.num_attention_heads * num_experts
        local = total // get_pg_size(groups.tp)
        first = get_pg_rank(groups.tp) * local
        replica = get_pg_rank(groups.dp_cp)
        self._placement = Placement(range(first, first + local), total, split_group=None, replica_rank=replica)
        self._backend = backend_of(config)
        self._weighs_inputs = inputs < outputs
        self.weight = grouped_linear_weights(config, self._placement, (outputs, inputs))
        for parameter in self.parameters():
            # Other ranks hold other heads.
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010
            setattr(parameter, "partition_dim", 0)  # noqa: B010
        if config.perform_initialization:
            initializer = BlockInitializer(config, layer_number)

            def draw(group: int) -> torch.Tensor:
                return initializer.scaled_normal((outputs, inputs), f"switchhead/{group}/{name}", fan_in)

            draw_parameter(self.weight, self._placement, draw)

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
        padding = RowPadding.of(groups, self._backend.row_multiple(self.config))
        return padding.unpad(self._backend.linear(padding.pad(rows), self.weight, padding.groups))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        return sharded_parameters(self, self._placement, prefix, sharded_offsets, metadata)
