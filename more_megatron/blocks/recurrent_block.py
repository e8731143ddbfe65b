"""Huginn's recurrent block: an adapter and a sandwich block.

    u <- Adapter([s; x]),   u <- N2(u + Attn(N1(u))),   s <- N4(u + MLP(N3(u)))

Geiping et al., arXiv 2502.05171, section 3: four RMSNorms, two of them over the residual sum; the input x is injected
in every step. `RecurrentBlock` works on rows that were sent to experts, with one set of weights for each group of rows,
all groups of a rank together; `SequenceBlock` on whole sequences.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from more_megatron.blocks.backends import Weights, backend_of
from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.row_ops import rms_norm, rotate, rotation_of
from more_megatron.blocks.rows import Rows
from more_megatron.blocks.segment_attention import segment_attention
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, attention_cost, gated_mlp_cost, linear_cost
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer, Draw, draw_as_takase
from more_megatron.model.loops import linear_injection
from more_megatron.model.noise import state_noise
from more_megatron.model.truncation import iterate_state
from more_megatron.monitoring.recurrence import watch_states

_NORMS = ("norm_1", "norm_2", "norm_3", "norm_4")


class RecurrentBlock(GroupedModule):
    """Recurrent blocks, one for each group; `name` is unique within the layer.

    Over the ranks of `placement.split_group` attention is split by heads and the MLP by width, as in tensor
    parallelism; adapter and norms are on every rank.
    """

    def __init__(self, config: MoREConfig, placement: Placement, ffn_hidden_size: int, name: str) -> None:
        super().__init__(config, placement)
        self._head_dim = config.kv_channels
        self._queries_per_group = config.num_attention_heads // config.num_query_groups
        hidden, heads = config.hidden_size, config.num_attention_heads * self._head_dim
        # For each query group its queries, then its key and its value: Megatron's order, which splits by groups.
        qkv = config.num_query_groups * (self._queries_per_group + 2) * self._head_dim
        inward, outward = BlockInitializer.takase_in, BlockInitializer.takase_out

        def linear(key: str, draw: Draw, *shape: int, split_dim: int | None = None, columns: int = 1) -> Weights:
            return self.linear_weights(Weight(shape, f"{name}/{{}}/{key}", draw, split_dim), columns)

        self.adapter = linear("adapter", inward, hidden, 2 * hidden, columns=2)
        self.qkv = linear("qkv", inward, qkv, hidden, split_dim=0)
        self.proj = linear("proj", outward, hidden, heads, split_dim=1)
        self.fc1 = linear("fc1", inward, 2, ffn_hidden_size, hidden, split_dim=1)
        self.fc2 = linear("fc2", outward, hidden, ffn_hidden_size, split_dim=1)
        for key in _NORMS:
            setattr(self, key, self.norm_weights())

    def forward(self, inputs: torch.Tensor, rows: Rows, depth: Depth) -> torch.Tensor:
        """Iterate from a random state, and return the last one, [rows, h], the same on every rank of the split group.

        The inputs, [rows, h], are injected in every step; they are the same on every rank of the split group.
        """
        adapter_state, adapter_input = self.backend.columns(self.adapter, 2)
        injected = self._linear(inputs, adapter_input, rows)
        norm_1, norm_2, norm_3, norm_4 = self._norms(rows)
        rotation = None
        if rows.rotary_pos_emb is not None:
            angles = rows.rotary_pos_emb[:, 0].index_select(0, rows.positions)
            rotation = rotation_of(angles, self.config.rotary_interleaved, self.config.params_dtype)

        def step(state: torch.Tensor, index: int) -> torch.Tensor:
            mixed = self._linear(state, adapter_state, rows) + injected
            attended = norm_2(mixed + self._attention(norm_1(mixed), rows, rotation))
            return norm_4(attended + self._mlp(norm_3(attended), rows))

        place, group = f"layer {self.layer_number}", self.placement.split_group
        see = watch_states(place, depth.steps, inputs, is_padding=rows.is_padding, group=group)
        return iterate_state(step, self._initial_state(rows).to(inputs.dtype), depth, see)

    def _linear(self, x: torch.Tensor, weights: Any, rows: Rows) -> torch.Tensor:
        return self.backend.linear(x, weights, rows.groups)

    def _initial_state(self, rows: Rows) -> torch.Tensor:
        config, layer = self.config, self.layer_number
        std, seed = config.recurrence_state_std, config.seed
        noise = state_noise(rows.sample_ids, rows.positions, config.hidden_size, seed=seed, layer=layer, std=std)
        return noise if rows.is_padding is None else noise.masked_fill(rows.is_padding, 0.0)

    def _attention(
        self, x: torch.Tensor, rows: Rows, rotation: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        qkv = self._linear(self.placement.copied(x), self.qkv, rows)
        # Not `view`: without rows it could not tell the number of query groups.
        qkv = qkv.unflatten(1, (-1, self._queries_per_group + 2, self._head_dim))
        query, key, value = qkv.split((self._queries_per_group, 1, 1), dim=2)
        query, key, value = query.flatten(1, 2), key.squeeze(2), value.squeeze(2)
        if rotation is not None:
            query, key = (rotate(x, *rotation, self.config.rotary_interleaved) for x in (query, key))
        context = segment_attention(query, key, value, rows.segments).flatten(1)
        return self.placement.summed(self._linear(context, self.proj, rows))

    def _mlp(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        inner = self._linear(self.placement.copied(x), self.fc1, rows)
        if self.config.bias_activation_fusion:
            activated = bias_swiglu_impl(inner, None)
        else:
            gate, up = inner.chunk(2, dim=-1)
            activated = torch.nn.functional.silu(gate) * up
        return self.placement.summed(self._linear(activated, self.fc2, rows))

    def _norms(self, rows: Rows) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield the four norms: the backend's, or ours with the weight of each row's group."""
        for key in _NORMS:
            norm = getattr(self, key)
            if isinstance(norm, torch.nn.Module):
                yield norm
                continue
            weight = norm.view(-1, self.config.hidden_size)
            weight = weight[0] if len(weight) == 1 else rows.spread(weight)
            yield functools.partial(rms_norm, weight=weight, eps=self.config.layernorm_epsilon)


class SequenceBlock(MegatronModule):
    """One recurrent block over whole sequences, from Megatron's own attention and MLP and with its parallelism."""

    def __init__(self, config: MoREConfig, ffn_hidden_size: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.layer_number = 0
        config = copy.copy(backend_of(config).looped(config))
        config.gated_linear_unit, config.activation_func = True, torch.nn.functional.silu
        config.ffn_hidden_size = ffn_hidden_size
        draw_as_takase(config, config.num_layers * config.mean_steps)
        backend, hidden = backend_of(config), config.hidden_size
        # Drawn when the number of the layer is known.
        draw = BlockInitializer.zeros
        self.adapter = BlockInitializer(config, 0).replicated_parameter((hidden, 2 * hidden), "", draw)
        self.attention = build_module(backend.attention(), config=config, layer_number=1, pg_collection=pg_collection)
        self.mlp = MLP(config, backend.mlp(), ffn_hidden_size=ffn_hidden_size, tp_group=pg_collection.tp)
        for number in range(1, 5):
            norm = backend.norm()(config=config, hidden_size=hidden, eps=config.layernorm_epsilon)
            self.add_module(f"norm_{number}", norm)

    def initialize(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and draw the adapter, which is no module of Megatron's."""
        self.layer_number = layer_number
        if self.config.perform_initialization:
            initializer = BlockInitializer(self.config, layer_number)
            self.adapter.data.copy_(initializer.takase_in(tuple(self.adapter.shape), "sequence/adapter"))

    def forward(self, inputs: torch.Tensor, state: torch.Tensor, depth: Depth, **attention_kwargs: Any) -> torch.Tensor:
        """Iterate from a state, and return the last one, [s, b, h].

        The inputs, [s, b, h], are injected in every step; mask and angles are for Megatron's attention.
        """
        inject = linear_injection(self.adapter, inputs)

        def step(state: torch.Tensor, index: int) -> torch.Tensor:
            mixed = inject(state)
            attended = self.norm_2(mixed + self.attention(self.norm_1(mixed), **attention_kwargs)[0])
            return self.norm_4(attended + self.mlp(self.norm_3(attended))[0])

        see = watch_states(f"layer {self.layer_number}", depth.steps, inputs)
        return iterate_state(step, state.to(inputs.dtype), depth, see)


def block_cost(config: MoREConfig, ffn_hidden_size: int, context: float) -> Cost:
    """Return the cost of one block: all in every step, but for the half of the adapter that sees the input.

    `context` is the length of the sequence that attends to itself.
    """
    hidden = config.hidden_size
    step = linear_cost(hidden, hidden) + attention_cost(config, context) + gated_mlp_cost(hidden, ffn_hidden_size)
    norms = Cost(4 * hidden, 4 * hidden)
    return linear_cost(hidden, hidden) + step.in_every_step() + norms
