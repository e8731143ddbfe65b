"""A layer: attention and a feed-forward part, each with a norm before it and a residual around it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend
from .cache import Memory
from .context import CallContext
from .experts import MoREMoE
from .fields import Config
from .parts import build_norm

LayerOutput = tuple[Tensor, ...]
"""Hidden states, [b, s, h], and the logits of each routing decision, [b, s, N]."""


class MoREAttention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = nn.Linear(hidden, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.linear_bias)
        self.q_norm = build_norm(config, size) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, size) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states: Tensor, context: CallContext, memory: Memory) -> Tensor:
        """Return what each token gathers from those before it, [b, s, h]."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = context.rotate(self.q_norm(query)), context.rotate(self.k_norm(key))
        key, value = memory.extend("attention", key, value)
        return self.o_proj(attend(query, key, value, context.mask).transpose(1, 2).flatten(2))


class MoRELayer(GradientCheckpointingLayer):
    """Megatron's layer, counted from 0, with an MLP or experts. Subclasses have other parts, norms or residuals."""

    # Names of the routers of which one call returns logits, in their order; if it returns more, the list begins
    # anew with the next step
    routers: tuple[str, ...] = ("router",)
    attention_class: type[nn.Module] = MoREAttention

    def __init__(self, config: Config, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_moe = config, layer_idx, isinstance(mlp, MoREMoE)
        self.input_layernorm = build_norm(config)
        self.self_attn = self.attention_class(config)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> LayerOutput:
        """Return what the next layer is given, and router logits.

        Args:
            hidden_states: Input, [b, s, h].
            context: What the layer knows about the call.
            memory: The layer's part of the cache, in a loop that of this pass.
            former: The logits that the layer returned in the pass before, if there was one.
        """
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), context, memory)
        return self.transform(hidden_states, context, memory, *former)

    def transform(self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> LayerOutput:
        """Return what follows attention."""
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_moe:
            return (hidden_states + self.mlp(normed),)
        output, *logits = self.mlp(normed, context.beside(hidden_states), memory, *former)
        return (hidden_states + output, *logits)


class SandwichLayer(MoRELayer):
    """A layer with a norm over the residual sum behind attention and behind its feed-forward part, too."""

    def __init__(self, config: Config, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__(config, layer_idx, mlp)
        self.attention_output_norm, self.mlp_output_norm = build_norm(config), build_norm(config)

    def transform(self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> LayerOutput:
        hidden_states = self.attention_output_norm(hidden_states)
        hidden_states, *logits = super().transform(hidden_states, context, memory, *former)
        return (self.mlp_output_norm(hidden_states), *logits)
