"""Huginn's recurrent block over whole sequences, from Megatron's own attention and MLP.

    u <- Adapter([s; x]),   u <- N2(u + Attn(N1(u))),   s <- N4(u + MLP(N3(u)))

Geiping et al., arXiv 2502.05171, section 3. Tensor and sequence parallelism are Megatron's.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from more_megatron.blocks.backends import backend_of, sandwich_parts
from more_megatron.config import MoREConfig
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.truncation import iterate_state
from more_megatron.monitoring.recurrence import watch_states

__all__ = ["SequenceBlock"]


class SequenceBlock(MegatronModule):
    """One recurrent block with ordinary causal attention.

    Args:
        config: Model configuration.
        ffn_hidden_size: Width of the gated MLP.
        pg_collection: Process groups.
    """

    def __init__(self, config: MoREConfig, ffn_hidden_size: int, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.layer_number = 0
        initializer = BlockInitializer(config, layer_number=0)
        config = copy.copy(backend_of(config).looped(config))
        config.gated_linear_unit, config.activation_func = True, torch.nn.functional.silu
        config.ffn_hidden_size = ffn_hidden_size
        config.init_method = functools.partial(_truncated_normal, std=initializer.in_std)
        config.output_layer_init_method = functools.partial(_truncated_normal, std=initializer.out_std)
        parts = sandwich_parts(config)
        hidden, device = config.hidden_size, "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.adapter = torch.nn.Parameter(torch.empty(hidden, 2 * hidden, dtype=config.params_dtype, device=device))
        setattr(self.adapter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self.attention = build_module(parts.attention, config=config, layer_number=1, pg_collection=pg_collection)
        self.mlp = MLP(config, parts.mlp, ffn_hidden_size=ffn_hidden_size, tp_group=pg_collection.tp)
        for number in range(1, 5):
            norm = parts.norm(config=config, hidden_size=hidden, eps=config.layernorm_epsilon)
            self.add_module(f"norm_{number}", norm)

    def initialize(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and draw the adapter, which is no module of Megatron's."""
        self.layer_number = layer_number
        if self.config.perform_initialization:
            initializer = BlockInitializer(self.config, layer_number)
            weight = initializer.truncated_normal(tuple(self.adapter.shape), "sequence/adapter", initializer.in_std)
            self.adapter.data.copy_(weight)

    def forward(self, inputs: torch.Tensor, state: torch.Tensor, depth: Depth, **attention_kwargs: Any) -> torch.Tensor:
        """Iterate from a state.

        Args:
            inputs: What is injected in every step, [s, b, h].
            state: Initial state, [s, b, h].
            depth: Number of steps.
            attention_kwargs: Mask and angles for Megatron's attention.

        Returns:
            The last state, [s, b, h].
        """
        adapter_state, adapter_input = self.adapter.split(self.config.hidden_size, dim=1)
        injected = torch.nn.functional.linear(inputs, adapter_input)

        def step(state: torch.Tensor) -> torch.Tensor:
            mixed = torch.nn.functional.linear(state, adapter_state) + injected
            attended = self.norm_2(mixed + self.attention(self.norm_1(mixed), **attention_kwargs)[0])
            return self.norm_4(attended + self.mlp(self.norm_3(attended))[0])

        see = watch_states(f"layer {self.layer_number}", depth.steps, inputs)
        return iterate_state(step, state.to(inputs.dtype), depth, see)


def _truncated_normal(weight: torch.Tensor, std: float) -> torch.Tensor:
    return torch.nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
