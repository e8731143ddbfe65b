"""`recurrent_moe`: the mixture of experts iterated, its router seeing each new state."""

from __future__ import annotations

from torch import Tensor

from .cache import Memory
from .context import CallContext
from .experts import MoREMoE
from .fields import Field
from .interface import System
from .layer import MoRELayer

__all__ = ["SYSTEM"]


class IteratedLayer(MoRELayer):
    """A layer whose experts are applied r times: `h <- h + scale * MoE(norm(h))`."""

    mlp: MoREMoE

    def transform(self, hidden_states: Tensor, context: CallContext, memory: Memory) -> tuple[Tensor, ...]:
        """Return hidden states and the logits of each step."""
        if not self.is_moe:
            return super().transform(hidden_states, context, memory)
        scale = self.config.residual_scale
        decisions: list[Tensor] = []
        for _ in range(context.num_steps):
            normed = self.post_attention_layernorm(hidden_states)
            decisions.append(self._logits(normed, decisions))
            output = self.mlp.mix(normed, decisions[-1], context, memory)
            hidden_states = hidden_states + (output if scale == 1.0 else output * scale)
        return (hidden_states, *decisions)

    def _logits(self, x: Tensor, before: list[Tensor]) -> Tensor:
        """Return the router's logits, averaged over steps: l_t = beta l_{t-1} + (1 - beta) W s_t, and l_0 = W s_0."""
        logits, beta = self.mlp.gate(x), self.config.router_logit_ema
        return beta * before[-1] + (1.0 - beta) * logits if before and beta > 0.0 else logits


class RecurrentMoE(System):
    """Layers that iterate their experts."""

    layer_class = IteratedLayer
    fields = {  # noqa: RUF012
        "residual_scale": Field(float, 1.0, "Factor on what a step adds to the residual stream."),
        "router_logit_ema": Field(float, 0.0, "Weight of the former logits in the routing.", low=0.0, high=1.0),
    }


SYSTEM = RecurrentMoE()
