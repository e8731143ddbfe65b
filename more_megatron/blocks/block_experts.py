"""Experts around recurrent blocks, and the MoE layers whose experts share one (Synthesis I).

Each is its own block (option A), or is projections around one that all share (option B), or a light network in front of
one (option B in another reading).
"""

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_pg_rank, get_pg_size

from more_megatron.blocks.dispatch import RowMoELayer
from more_megatron.blocks.experts import Experts, RoutedExperts
from more_megatron.blocks.layer import BaseMoELayer, LayerInputs
from more_megatron.blocks.parameters import Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.recurrent_block import RecurrentBlock, SequenceBlock, block_cost
from more_megatron.blocks.rows import RowPadding, Rows
from more_megatron.blocks.statistics import record_loss
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer, takase_std
from more_megatron.model.noise import TokenGrid
from more_megatron.monitoring.watch import Key, Watch


class BlockExperts(Experts):
    """N independent recurrent blocks with MLPs `ffn_hidden_size` wide; the output of an expert is its last state."""

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        self._ffn_hidden_size = ffn_hidden_size
        super().__init__(*args, **kwargs)

    def build(self) -> None:
        self.block = RecurrentBlock(self.config, self.placement, self._ffn_hidden_size, name="expert")

    def initialize(self, layer_number: int) -> None:
        self.block.initialize(layer_number)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        """Return the last states, [rows, h], given the rows that were sent to the local experts.

        With several expert-tensor-parallel ranks it is this rank's part of a sum that gives them.
        """
        rows, padding = rows.padded(self.backend.row_multiple(self.config))
        x = padding.pad(self.placement.enter(hidden_states))
        return self.placement.leave(padding.unpad(self.block(x, rows, depth)))


class ProjectionExperts(Experts):
    """Expert i computes `W_out_i . R(W_in_i . x)`, with dropout on both projections. They start orthogonal."""

    def build(self) -> None:
        config: Any = self.config
        shape = (config.hidden_size, config.hidden_size)
        self.proj_in = self.linear_weights(Weight(shape, "proj_in/{}", BlockInitializer.orthogonal))
        self.proj_out = self.linear_weights(Weight(shape, "proj_out/{}", BlockInitializer.orthogonal))
        self.dropout = torch.nn.Dropout(config.projection_dropout)

    def forward(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth, block: RecurrentBlock) -> torch.Tensor:
        """Return the projected last states of the shared block, otherwise as `BlockExperts.forward`."""
        rows, padding = rows.padded(self.backend.row_multiple(self.config))
        x = padding.pad(self.placement.enter(hidden_states))
        projected = self.dropout(self.backend.linear(x, self.proj_in, rows.groups))
        state = block(projected, rows.as_one_group(), depth)
        output = self.dropout(padding.unpad(self.backend.linear(state, self.proj_out, rows.groups)))
        return self.placement.leave(output)

    def orthogonality_penalty(self) -> torch.Tensor:
        """Return the mean over local projections of `||W W^T - 1||^2 / h`, in float32."""
        weights = torch.cat([self.backend.stacked(part) for part in (self.proj_in, self.proj_out)]).float()
        identity = torch.eye(weights.size(1), device=weights.device)
        deviation = weights @ weights.transpose(1, 2) - identity
        return deviation.square().sum(dim=(1, 2)).mean() / weights.size(1)

    @torch.no_grad()
    def record_projections(self, watch: Watch, place: str, share: float) -> None:
        """Record how far projections are from orthogonal, and from those of other experts. All expert ranks call it.

        The divergence of two is one minus the cosine of the angle between them; its mean over all pairs follows from
        the sum of the weights at unit length. `share` is 1 over the number of ranks with the same experts.
        """
        watch.add_mean(Key("system", "projection orthogonality", place), self.orthogonality_penalty(), share=share)
        number, group = self.placement.num_groups, parallel_state.get_expert_model_parallel_group()
        for name, projections in (("proj_in", self.proj_in), ("proj_out", self.proj_out)):
            weights = self.backend.stacked(projections).detach().float().flatten(1)
            total = torch.nn.functional.normalize(weights, dim=1).sum(0)
            torch.distributed.all_reduce(total, group=group)
            divergence = 1.0 - (total.double().square().sum() - number) / max(number * (number - 1), 1)
            watch.add_mean(Key("system", f"{name} divergence", place), divergence, share=share)


class LightExperts(RoutedExperts):
    """Expert i computes `W2_i . GELU(W1_i . x)` with dropout on the result; h -> 2h -> h."""

    def build(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        # What they compute is the input of a block, not added to the stream: nothing is to keep it small.
        inner = Weight((2 * hidden, hidden), "light/{}/fc1", BlockInitializer.takase_in, split_dim=0)
        outer = Weight((hidden, 2 * hidden), "light/{}/fc2", _of_combined, split_dim=1)
        self.fc1, self.fc2 = self.linear_weights(inner), self.linear_weights(outer)
        self.dropout = torch.nn.Dropout(config.hidden_dropout)

    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor, depth: Depth | None) -> torch.Tensor:
        inner = self.backend.linear(x, self.fc1, padding.groups)
        outer = self.backend.linear(torch.nn.functional.gelu(inner), self.fc2, padding.groups)
        output = self.dropout(padding.unpad(outer))
        return (output * probs.unsqueeze(-1)).to(output.dtype)


def _of_combined(initializer: BlockInitializer, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """Draw what keeps the length of the sum of the chosen experts' outputs, if routers know nothing yet."""
    config, chosen = initializer.config, initializer.config.moe_router_topk
    is_share_of_all = config.moe_router_score_function == "softmax" and config.moe_router_pre_softmax
    length = math.sqrt(chosen) / (config.num_moe_experts if is_share_of_all else chosen)
    return initializer.truncated_normal(shape, name, takase_std(config) / length)


class SharedBlockMoELayer(RowMoELayer):
    """Per-expert projections around one recurrent block, which is a dense parameter of the layer.

    Every expert rank holds the block and computes it on the rows of its experts. Where experts are split over the
    tensor-parallel ranks, so is the block. `ffn_hidden_size` is the width of the MLP in it.
    """

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, groups = self.config, kwargs["pg_collection"]
        split_experts = get_pg_size(groups.expt_tp) > 1
        placement = Placement(
            groups=range(1),
            num_groups=1,
            split_group=groups.expt_tp if split_experts else None,
            replica_rank=get_pg_rank(groups.dp_cp if split_experts else groups.tp_dp_cp),
        )
        self.recurrent_block = RecurrentBlock(config, placement, ffn_hidden_size, name="shared")
        # Replicas of experts see other rows on each tensor-parallel rank: their gradients are summed, as under
        # sequence parallelism.
        for parameter in self.recurrent_block.parameters():
            parameter.sequence_parallel = config.sequence_parallel and not split_experts
        # Megatron averages the gradients of experts over fewer replicas than those of dense parameters.
        self._replica_ratio = get_pg_size(groups.dp_cp) / get_pg_size(groups.expt_dp)

    def _apply_experts(self, hidden_states: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        return self._attach_penalty(self.experts(hidden_states, rows, depth, self.recurrent_block))

    def _attach_penalty(self, output: torch.Tensor) -> torch.Tensor:
        """Attach the orthogonality penalty of the local experts to the backward pass."""
        coefficient = self.config.projection_orthogonality_coeff
        if coefficient == 0.0 or not (self.training and torch.is_grad_enabled()):
            return output
        penalty = self.experts.orthogonality_penalty()
        record_loss("orthogonality_loss", penalty, self.config, self.layer_number, self.router.tp_dp_cp_group)
        share = self.num_local_experts / self.config.num_moe_experts
        weight = coefficient * share * self._replica_ratio
        return MoEAuxLossAutoScaler.apply(output, penalty * weight)


class CombinedBlockMoELayer(BaseMoELayer):
    """Light experts, combined, and then one recurrent block over the whole sequence.

    `ffn_hidden_size` is the width of the MLP in the block.
    """

    def __init__(self, *args: Any, ffn_hidden_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recurrent_block = SequenceBlock(self.config, ffn_hidden_size, kwargs["pg_collection"])

    def forward(self, hidden_states: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, None]:
        """Route, compute and combine the experts, then iterate the block: its last state, [s, b, h], and no bias."""
        combined, _ = super().forward(hidden_states, padding_mask=inputs.padding_mask)
        grid = TokenGrid.of(combined, inputs.micro_batch, self.config, self.attn_tp_group)
        state = grid.noise(self.layer_number, self.config.recurrence_state_std)
        attention = {"attention_mask": inputs.attention_mask, "rotary_pos_emb": inputs.rotary_pos_emb}
        return self.recurrent_block(combined, state, inputs.micro_batch.depth, **attention), None


def _routed_context(config: MoREConfig, seq_length: int) -> float:
    """Return how many tokens of a sequence meet in one expert if the load is balanced."""
    return seq_length * config.moe_router_topk / config.num_moe_experts


def block_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts."""
    expert = block_cost(config, ffn_hidden_size, _routed_context(config, seq_length))
    return expert.routed(config.num_moe_experts, config.moe_router_topk)


def projection_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block between their projections."""
    experts, topk = config.num_moe_experts, config.moe_router_topk
    block = block_cost(config, ffn_hidden_size, _routed_context(config, seq_length))
    rows = block.routed(1, topk)
    # A token meets the one block however many experts it is sent to.
    shared = Cost(block.parameters, block.parameters, rows.once, rows.per_step)
    return (linear_cost(config.hidden_size, config.hidden_size) * 2).routed(experts, topk) + shared


def light_experts_cost(config: MoREConfig, ffn_hidden_size: int, seq_length: int) -> Cost:
    """Return the cost of the routed experts and the block that follows them."""
    hidden = config.hidden_size
    expert = linear_cost(hidden, 2 * hidden) + linear_cost(2 * hidden, hidden)
    routed = expert.routed(config.num_moe_experts, config.moe_router_topk)
    return routed + block_cost(config, ffn_hidden_size, seq_length)
