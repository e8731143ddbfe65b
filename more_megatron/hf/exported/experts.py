"""Layers with experts: router, routed experts and shared expert. Megatron's experts, which are MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .cache import Memory
from .context import CallContext
from .fields import Config
from .parts import MoREMLP, grouped_linear
from .recurrence import Rows
from .routing import MoRERouter, Routing

__all__ = ["FeedForwardExperts", "MoREMoE", "RecurringMoE"]


class FeedForwardExperts(nn.Module):
    """Megatron's experts: MLPs."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gated, inner = config.gated_mlp, width * (2 if config.gated_mlp else 1)
        self.up_name = "gate_up_proj" if config.gated_mlp else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(experts, inner, hidden)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        up_bias = nn.Parameter(torch.empty(experts, inner)) if config.linear_bias else None
        self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden)) if config.linear_bias else None
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h], given [rows, h]."""
        inner = grouped_linear(rows, getattr(self, self.up_name), routing.ends)
        if self.down_proj_bias is not None:
            inner = inner + getattr(self, f"{self.up_name}_bias")[routing.experts]
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        output = grouped_linear(routing.weigh(inner), self.down_proj, routing.ends)
        if self.down_proj_bias is not None:
            output = output + routing.weigh(self.down_proj_bias[routing.experts])
        return output


class MoREMoE(nn.Module):
    """Router, routed experts and shared expert. Subclasses have other experts.

    Args:
        config: Model configuration.
        layer_idx: Index of the layer, from 0.

    Attributes:
        experts_class: The routed experts.
        router_class: The router.
        reads_former: Whether routing depends on the logits of the pass before, in a layer that is repeated.
    """

    experts_class: type[nn.Module] = FeedForwardExperts
    router_class: type[MoRERouter] = MoRERouter
    reads_former = False

    def __init__(self, config: Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.gate = self.router_class(config)
        self.build_experts()
        width = config.shared_expert_intermediate_size
        self.shared_expert = MoREMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def build_experts(self) -> None:
        """Create the routed experts, and what they share."""
        self.experts: Any = self.experts_class(self.config)

    def forward(self, x: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> tuple[Tensor, Tensor]:
        """Route, compute and combine.

        Args:
            x: Normed hidden states, [b, s, h].
            context: What the layer knows about the call.
            memory: The layer's part of the cache.
            former: Router logits of the pass before, in a layer that is repeated.

        Returns:
            Output, [b, s, h], and router logits, [b, s, N].
        """
        logits = self.decide(x, *former)
        return self.mix(x, logits, context, memory), logits

    def decide(self, x: Tensor, *former: Tensor) -> Tensor:
        """Return the router logits, [b, s, N], given those of the pass before if there was one."""
        return self.gate(x)

    def mix(self, x: Tensor, logits: Tensor, context: CallContext, memory: Memory) -> Tensor:
        """Return the output, [b, s, h], of the experts that the logits, [b, s, N], choose."""
        routing = Routing(*self.gate.choose(logits), self.config.num_experts)
        shared = self.shared_output(x)
        output = routing.combine(self.apply_experts(x, routing, context.beside(shared), memory))
        return self.finish(output if shared is None else output + shared, context, memory)

    def shared_output(self, x: Tensor) -> Tensor | None:
        """Return the output of the shared expert, [b, s, h], where there is one, given what it reads."""
        if self.shared_expert is None:
            return None
        shared = self.shared_expert(x)
        return shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(x).sigmoid()

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        """Return weighted outputs of the routed experts, [rows, h]."""
        return self.experts(routing.dispatch(x), routing)

    def finish(self, output: Tensor, context: CallContext, memory: Memory) -> Tensor:
        """Return what the layer makes of the combined output, [b, s, h]."""
        return output


class RecurringMoE(MoREMoE):
    """Experts with a recurrence inside them. Subclasses say how it runs, and what follows from its last states."""

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        return self.output(self.last_states(x, routing, context, memory), routing)

    def last_states(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        """Return the last states, [rows, any], of experts that are called with the rows and what rows they are."""
        return self.experts(routing.dispatch(x), Rows(context, self.layer_idx, routing, self.stream))

    def output(self, state: Tensor, routing: Routing) -> Tensor:
        """Return the weighted outputs that follow from last states, [rows, h]."""
        return routing.weigh(state)

    def stream(self, state: Tensor, rows: Rows) -> Tensor:
        """Return what the next layer would be given if the recurrence ended now, shaped as tokens."""
        return rows.context.stream + rows.routing.combine(self.output(state, rows.routing))
