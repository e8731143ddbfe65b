"""A layer: attention and a feed-forward part, each with a norm before it and a residual around it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MoREAttention
from .cache import Memory
from .context import CallContext
from .experts import MoREMoE
from .fields import Config
from .norms import build_norm

__all__ = ["MoRELayer"]


class MoRELayer(GradientCheckpointingLayer):
    """Megatron's layer. Subclasses have other parts, norms or residuals.

    Args:
        config: Model configuration.
        layer_idx: Index of the layer, from 0.
        mlp: What stands in the place of the MLP.

    Attributes:
        routers: Names of the routers of which one call returns logits, in their order; if it returns more, the list
            begins anew with the next step.
    """

    routers: tuple[str, ...] = ("router",)

    def __init__(self, config: Config, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_moe = config, layer_idx, isinstance(mlp, MoREMoE)
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attn = self.build_attention()
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.mlp = mlp

    def build_attention(self) -> nn.Module:
        """Return the attention."""
        return MoREAttention(self.config)

    def forward(
        self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor
    ) -> tuple[Tensor, ...]:
        """Return hidden states, [b, s, h], and the logits of each routing decision, [b, s, N].

        Args:
            hidden_states: Input, [b, s, h].
            context: What the layer knows about the call.
            memory: The layer's part of the cache, in a loop that of this pass.
            former: The logits that the layer returned in the pass before, if there was one.
        """
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), context, memory)
        return self.transform(hidden_states, context, memory, *former)

    def transform(
        self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what follows attention: hidden states and the logits of each routing decision."""
        context = context.beside(hidden_states)
        output, *logits = self.feed_forward(self.post_attention_layernorm(hidden_states), context, memory, *former)
        return (hidden_states + output, *logits)

    def feed_forward(self, x: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> tuple[Tensor, ...]:
        """Return the output of MLP or experts, and the logits of the routing decision where there is one."""
        return self.mlp(x, context, memory, *former) if self.is_moe else (self.mlp(x),)
