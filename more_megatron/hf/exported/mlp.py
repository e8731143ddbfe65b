"""The feed-forward network of a layer without experts, and the shared expert."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .fields import Config

__all__ = ["MoREMLP"]


class MoREMLP(nn.Module):
    """Feed-forward network, gated or not.

    Args:
        config: Model configuration.
        width: Width between the two maps.
        bias: Whether they have biases. Default: as all linear maps of the model.
    """

    def __init__(self, config: Config, width: int, bias: bool | None = None) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.linear_bias if bias is None else bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., h]."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
