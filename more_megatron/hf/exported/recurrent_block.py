"""Huginn's recurrent block over the rows of experts, and layers whose experts let their tokens attend to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import attend
from .cache import Memory
from .context import CallContext
from .experts import RecurringMoE
from .fields import Config, Field
from .interface import System
from .parts import grouped_linear, rms_norm
from .recurrence import Rows, State, recur
from .routing import Routing


class RecurrentBlock(nn.Module):
    """Huginn's recurrent block (Geiping et al., arXiv 2502.05171, section 3), one for all rows or one for each expert.

        u <- Adapter([s; x]),   u <- N2(u + Attn(N1(u))),   s <- N4(u + MLP(N3(u)))

    Args:
        experts: Number of blocks; None: one for all rows.
        follows_layers: Whether norms and biases are those of the layers around it.
    """

    adapter: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    fc1: Tensor
    fc2: Tensor

    def __init__(self, config: Config, experts: int | None = None, follows_layers: bool = False) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.recurrent_intermediate_size
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {
            "adapter": (hidden, 2 * hidden),
            # For each key head its queries, then the key, then the value.
            "qkv": ((heads + 2 * groups) * config.head_dim, hidden),
            "proj": (hidden, heads * config.head_dim),
            "fc1": (2, width, hidden),
            "fc2": (hidden, width),
            **{f"norm_{number}": (hidden,) for number in range(1, 5)},
        }
        self.layernorm = follows_layers and config.norm_type == "layernorm"
        if self.layernorm:
            shapes.update({f"norm_{number}_bias": (hidden,) for number in range(1, 5)})
        self.register_parameter("qkv_bias", None)
        if follows_layers and config.attention_bias:
            shapes["qkv_bias"] = shapes["qkv"][:1]
        for name, shape in shapes.items():
            shape = shape if experts is None else (experts, *shape)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor, state: Tensor, rows: Rows) -> Tensor:
        """Return the last state, given what is injected in every step and the first, [rows, h] or [b, s, h] each."""
        adapter_state, adapter_input = self.adapter.split(self.config.hidden_size, dim=-1)
        injected = self._linear(x, adapter_input, rows)

        def step(number: int, rows: Rows, state: Tensor) -> State:
            mixed = self._linear(state, adapter_state, rows) + rows.take(injected)
            attended = self._attention(self._norm(mixed, 1, rows), rows, number)
            mixed = self._norm(mixed + attended, 2, rows)
            return (self._norm(mixed + self._mlp(self._norm(mixed, 3, rows), rows), 4, rows),)

        return recur(step, (state,), rows)[0]

    def _attention(self, x: Tensor, rows: Rows, step: int) -> Tensor:
        routing, groups, size = rows.routing, self.config.num_key_value_heads, self.config.head_dim
        qkv = self._linear(x, self.qkv, rows)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias
        # [b, groups, queries of a group + 2, k, s, d]
        qkv = qkv.unsqueeze(1) if routing is None else routing.unsorted(qkv)
        qkv = qkv.unflatten(-1, (groups, -1, size)).permute(0, 3, 4, 1, 2, 5)
        query, key = rows.context.rotate(qkv[:, :, :-2].flatten(1, 2)), rows.context.rotate(qkv[:, :, -2])
        extended = rows.memory.at_step(step).extend("", key.flatten(1, 2), qkv[:, :, -1].flatten(1, 2))
        key, value = (part.unflatten(1, (groups, -1)).flatten(2, 3) for part in extended)
        output = attend(query.flatten(2, 3), key, value, rows.mask)
        output = output.transpose(1, 2).flatten(2)
        return self._linear(output if routing is None else output.flatten(0, 1)[routing.order], self.proj, rows)

    def _mlp(self, x: Tensor, rows: Rows) -> Tensor:
        gate, up = self._linear(x, self.fc1.flatten(-3, -2), rows).chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, self.fc2, rows)

    def _linear(self, x: Tensor, weight: Tensor, rows: Rows) -> Tensor:
        if weight.dim() == 2 or rows.routing is None:
            return F.linear(x, weight)
        return grouped_linear(x, weight, rows.routing.ends)

    def _norm(self, x: Tensor, number: int, rows: Rows) -> Tensor:
        weight, eps = getattr(self, f"norm_{number}"), self.config.norm_eps
        if self.layernorm:
            return F.layer_norm(x, x.shape[-1:], weight, getattr(self, f"norm_{number}_bias"), eps)
        if weight.dim() > 1 and rows.routing is not None:
            weight = weight[rows.routing.experts]
        return rms_norm(x, weight, eps)


class MixingMoE(RecurringMoE):
    """Experts whose blocks let the tokens of a sequence that were sent to them attend to each other, causally."""

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        topk = routing.shape[1]
        chosen, _ = memory.extend("experts", routing.chosen.unsqueeze(1), routing.chosen.unsqueeze(1))
        query, key = routing.chosen.transpose(1, 2).flatten(1), chosen.squeeze(1).transpose(1, 2).flatten(1)
        # A row sees those of its expert that its token sees.
        visible = (query.unsqueeze(2) == key.unsqueeze(1)).unsqueeze(1) & context.visible.repeat(1, 1, topk, topk)
        rows = Rows(context, memory.at("block"), self.layer_idx, self.stream, routing, visible)
        state = routing.dispatch(context.initial_state(self.layer_idx, x))
        return routing.weigh(self.contract(self.run_block(routing.dispatch(x), state, rows), routing))

    def run_block(self, x: Tensor, state: Tensor, rows: Rows) -> Tensor:
        """Return the last states, [rows, h], given the rows and the first states."""
        return self.experts(x, state, rows)


class BlockSystem(System):
    """Layers with recurrent blocks: one initial state a layer, and attention in every step.

    Args:
        width: Default width of the MLP in a block, in hidden sizes.
    """

    def __init__(self, width: int, **own: Any) -> None:
        meaning = "Width of the MLP in a recurrent block."
        field = Field(int, lambda found: width * found["hidden_size"], meaning, low=1)
        super().__init__(fields={"recurrent_intermediate_size": field}, **own)

    def num_states(self, config: Config) -> int:
        return config.num_hidden_layers

    def caches_steps(self, config: Config) -> bool:
        return any(config.moe_layers)
