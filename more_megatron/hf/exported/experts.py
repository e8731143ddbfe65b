"""Layers with experts: router, routed experts and shared expert. Megatron's experts, which are MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .cache import Memory
from .context import CallContext
from .fields import Config
from .parts import MoREMLP, grouped_linear
from .recurrence import Rows
from .routing import MoRERouter, Routing, averaged_logits

__all__ = ["FeedForwardExperts", "MoREMoE", "RecurringMoE"]


class FeedForwardExperts(nn.Module):
    """Megatron's experts: MLPs."""

    down_proj: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.activation = config, ACT2FN[config.hidden_act]
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.up_name, inner = ("gate_up_proj", 2 * width) if config.gated_mlp else ("up_proj", width)
        for name, shape in ((self.up_name, (inner, hidden)), ("down_proj", (hidden, width))):
            self.register_parameter(name, nn.Parameter(torch.empty(config.num_experts, *shape)))
            bias = nn.Parameter(torch.empty(config.num_experts, shape[0])) if config.linear_bias else None
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h], given [rows, h]."""
        up_bias, down_bias = (getattr(self, f"{name}_bias") for name in (self.up_name, "down_proj"))
        inner = grouped_linear(rows, getattr(self, self.up_name), routing.ends)
        inner = inner if up_bias is None else inner + up_bias[routing.experts]
        if self.config.gated_mlp:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        output = grouped_linear(routing.weigh(inner), self.down_proj, routing.ends)
        return output if down_bias is None else output + routing.weigh(down_bias[routing.experts])


class MoREMoE(nn.Module):
    """Router, routed experts and shared expert of a layer, counted from 0. Subclasses have other experts."""

    router_class: type[MoRERouter] = MoRERouter

    def __init__(self, config: Config, layer_idx: int, experts_class: Callable[[Config], nn.Module]) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.gate = self.router_class(config)
        self.experts: Any = experts_class(config)
        width = config.shared_expert_intermediate_size
        self.shared_expert = MoREMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, x: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> tuple[Tensor, Tensor]:
        """Return output, [b, s, h], and router logits, [b, s, N].

        Given are normed hidden states and, where they count, the logits of the pass before.
        """
        logits = averaged_logits(self.config, self.gate(x), *former)
        return self.mix(x, logits, context, memory), logits

    def mix(self, x: Tensor, logits: Tensor, context: CallContext, memory: Memory) -> Tensor:
        """Return the output, [b, s, h], of the experts that the logits, [b, s, N], choose."""
        routing = Routing(*self.gate.choose(logits), self.config.num_experts)
        shared = self.shared_output(x)
        output = routing.combine(self.apply_experts(x, routing, context.beside(shared), memory))
        return output if shared is None else output + shared

    def shared_output(self, x: Tensor) -> Tensor | None:
        """Return the output of the shared expert, [b, s, h], where there is one, given what it reads."""
        if self.shared_expert is None:
            return None
        shared = self.shared_expert(x)
        return shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(x).sigmoid()

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        """Return weighted outputs of the routed experts, [rows, h]."""
        return self.experts(routing.dispatch(x), routing)


class RecurringMoE(MoREMoE):
    """Experts with a recurrence inside them, which are called with the rows and what rows they are."""

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        rows = Rows(context, memory, self.layer_idx, self.stream, routing)
        return routing.weigh(self.experts(routing.dispatch(x), rows))

    def contract(self, state: Tensor, routing: Routing) -> Tensor:
        """Return what experts make of their last states, [rows, h]; for criteria also of others, while they run."""
        return state

    def stream(self, state: Tensor, rows: Rows) -> Tensor:
        """Return what the next layer would be given if the recurrence ended now, shaped as tokens."""
        stream: Any = rows.context.stream
        return stream + rows.routing.combine(rows.routing.weigh(self.contract(state, rows.routing)))
