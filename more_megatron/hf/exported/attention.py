"""Causal self-attention of a layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .cache import Memory
from .context import CallContext
from .fields import Config
from .norms import build_norm
from .rotary import rotate
from .row_mask import RowMask

__all__ = ["MoREAttention", "attend"]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | RowMask | None) -> Tensor:
    """Return the attention of [b, heads, rows, d] to [b, groups, keys, d] where the mask is True; None: causal."""
    if isinstance(mask, RowMask):
        return mask.attend(query, key, value)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.size(2) > 1,
        enable_gqa=query.size(1) != key.size(1),
    )


class MoREAttention(nn.Module):
    """Attention with grouped queries."""

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
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in projections
        )
        query = rotate(self.q_norm(query), context.rotation, self.config.rotary_interleaved)
        key = rotate(self.k_norm(key), context.rotation, self.config.rotary_interleaved)
        key, value = memory.extend("attention", key, value)
        return self.o_proj(attend(query, key, value, context.mask).transpose(1, 2).flatten(2))
