"""Layers with experts: router, routed experts and shared expert; kinds of experts that more than one system has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .cache import Memory
from .context import CallContext
from .fields import Config
from .parts import MoREMLP, grouped_linear
from .recurrence import Rows
from .routing import MoRERouter, Routing


class Experts(nn.Module):
    """Weights of all routed experts, each name's with an axis for the experts in front of the shape of one.

    Weights of cells have an axis for their gates behind it, which `linear` lays side by side.
    """

    def __init__(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.config = config
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(config.num_experts, *shape)))

    def linear(self, rows: Tensor, name: str, routing: Routing) -> Tensor:
        """Return the linear map of a name, with a bias if there is one, [rows, out] for [rows, in]."""
        product = grouped_linear(rows, getattr(self, name).flatten(1, -2), routing.ends)
        bias = getattr(self, f"{name}_bias", None)
        return product if bias is None else product + bias.flatten(1)[routing.experts]


class FeedForwardExperts(Experts):
    """Megatron's experts: MLPs."""

    down_proj: Tensor
    down_proj_bias: Tensor

    def __init__(self, config: Config) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        up, inner = ("gate_up_proj", 2 * width) if config.gated_mlp else ("up_proj", width)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in ((up, (inner, hidden)), ("down_proj", (hidden, width))):
            shapes[name] = shape
            if config.linear_bias:
                shapes[f"{name}_bias"] = shape[:1]
        super().__init__(config, shapes)
        self.up, self.activation = up, ACT2FN[config.hidden_act]

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h], given [rows, h]."""
        inner = self.linear(rows, self.up, routing)
        if self.config.gated_mlp:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        output = grouped_linear(routing.weigh(inner), self.down_proj, routing.ends)
        if self.config.linear_bias:
            output = output + routing.weigh(self.down_proj_bias[routing.experts])
        return output


class CellExperts(Experts):
    """A feed-forward network with biases, linear, GELU, linear, and a cell that a subclass has beside it.

    `shapes` has the shapes of what the subclass has, for one expert, by name.
    """

    def __init__(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        feed_forward = {"fc1": (width, hidden), "fc1_bias": (width,), "fc2": (hidden, width), "fc2_bias": (hidden,)}
        super().__init__(config, {**feed_forward, **shapes})

    def expand(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return the inner layer of the feed-forward network, [rows, m], given [rows, h]."""
        return F.gelu(self.linear(rows, "fc1", routing))

    def feed_forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return what the feed-forward network makes of [rows, h]."""
        return self.linear(self.expand(rows, routing), "fc2", routing)


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next hidden and cell state, [rows, n] each, given i, f, g and o before their activations."""
    write, keep, new, read = gates.chunk(4, dim=-1)
    cell = keep.sigmoid() * cell + write.sigmoid() * new.tanh()
    return read.sigmoid() * cell.tanh(), cell


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

        Given are normed hidden states and, where they count, the logits of the step before: those of this one are then
        `beta former + (1 - beta) logits`.
        """
        logits = self.gate(x)
        if former and self.config.router_logit_ema > 0.0:
            beta = self.config.router_logit_ema
            logits = beta * former[0] + (1.0 - beta) * logits
        return self.mix(x, logits, context, memory), logits

    def mix(
        self, x: Tensor, logits: Tensor, context: CallContext, memory: Memory, stream: Tensor | None = None
    ) -> Tensor:
        """Return the output, [b, s, h], of the experts that the logits, [b, s, N], choose.

        Routed experts read `stream`, where it is given, in the place of `x`.
        """
        routing = Routing(*self.gate.choose(logits), self.config.num_experts)
        shared = None if self.shared_expert is None else self.shared_expert(x)
        if self.shared_expert_gate is not None:
            shared = shared * self.shared_expert_gate(x).sigmoid()
        read = x if stream is None else stream
        output = routing.combine(self.apply_experts(read, routing, context.beside(shared), memory))
        return output if shared is None else output + shared

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        """Return weighted outputs of the routed experts, [rows, h]."""
        return self.experts(routing.dispatch(x), routing)


class RecurringMoE(MoREMoE):
    """Experts with a recurrence inside them, which are called with the rows and what rows they are."""

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        rows = Rows(context, memory, self.layer_idx, self.stream, routing)
        return routing.weigh(self.experts(routing.dispatch(x), rows))

    def contract(self, state: Tensor, routing: Routing) -> Tensor:
        """Return what experts make of their last states, or for a criterion of those of any step, [rows, h]."""
        return state

    def stream(self, state: Tensor, rows: Rows) -> Tensor:
        """Return what the next layer would be given if the recurrence ended now, shaped as tokens."""
        stream: Any = rows.context.stream
        return stream + rows.routing.combine(rows.routing.weigh(self.contract(state, rows.routing)))
