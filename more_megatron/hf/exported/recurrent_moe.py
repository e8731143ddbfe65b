"""`recurrent_moe`: the mixture of experts iterated, its router seeing each new state."""

from __future__ import annotations

from torch import Tensor

from .cache import Memory
from .context import CallContext
from .experts import MoREMoE
from .fields import LOGIT_EMA, Field
from .interface import System
from .layer import LayerOutput, MoRELayer
from .recurrence import Rows, State, recur


class IteratedLayer(MoRELayer):
    """A layer whose experts are applied r times: `h <- h + scale * MoE(norm(h))`."""

    mlp: MoREMoE

    def transform(self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> LayerOutput:
        if not self.is_moe:
            return super().transform(hidden_states, context, memory)
        scale = self.config.residual_scale
        decisions: list[Tensor] = []

        def step(number: int, rows: Rows, state: Tensor, *former: Tensor) -> State:
            output, logits = self.mlp(self.post_attention_layernorm(state), rows.context, rows.memory, *former)
            decisions.append(logits)
            return state + (output if scale == 1.0 else output * scale), logits

        state = recur(step, (hidden_states,), Rows(context, memory, self.layer_idx))[0]
        return (state, *decisions)


_SCALE = Field(float, 1.0, "Factor on what a step adds to the residual stream.")
SYSTEM = System(layer_class=IteratedLayer, fields={"residual_scale": _SCALE, "router_logit_ema": LOGIT_EMA})
