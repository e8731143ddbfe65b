"""`huginn`: prelude, a core with input injection repeated from a random state, coda (Geiping et al., arXiv 2502.05171).

a <- N2(x + Attn(N1(x))),   out <- N4(a + MLP(N3(a)))   in each layer; one norm behind the core and behind the coda.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .cache import Memory
from .context import CallContext
from .division import AROUND, InjectedLoop, RepeatedMoE, check_division, divided, injection
from .fields import LOGIT_EMA, Config
from .initialization import takase_normal
from .interface import Group, System
from .layer import MoRELayer
from .norms import MoRERMSNorm, build_norm

__all__ = ["SYSTEM"]


class SandwichLayer(MoRELayer):
    """A layer with a norm over the residual sum behind attention and behind its feed-forward part."""

    def __init__(self, config: Config, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__(config, layer_idx, mlp)
        self.attention_output_norm = build_norm(config, config.hidden_size)
        self.mlp_output_norm = build_norm(config, config.hidden_size)
        inner = [part for name, part in mlp.named_modules() if name.rpartition(".")[2] == "down_proj"]
        for part in (self.self_attn.o_proj, *inner):
            part.adds_to_stream = True  # which initial weights depend on

    def transform(
        self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor
    ) -> tuple[Tensor, ...]:
        """Return hidden states and the logits of each routing decision."""
        hidden_states = self.attention_output_norm(hidden_states)
        hidden_states, *logits = super().transform(hidden_states, context, memory, *former)
        return (self.mlp_output_norm(hidden_states), *logits)


class Core(InjectedLoop):
    """Repeats the core on a random state, or on its input where nothing is injected."""

    def first_state(self, hidden_states: Tensor, context: CallContext) -> Tensor:
        """Return the state in front of the first pass."""
        if self.config.injection == "none":
            return hidden_states
        # The training code numbers the groups of its stack from 1; the prelude is one.
        return context.initial_state(0, hidden_states, layer=2 if self.config.prelude_layers > 0 else 1)

    def add(self, state: Tensor, hidden_states: Tensor, step: int) -> Tensor:
        """Return the state, to which the input is added in front of every pass."""
        return state + hidden_states if self.config.injection == "add" else state


class Huginn(System):
    """Sandwich layers and one initial state."""

    moe_class = RepeatedMoE
    layer_class = SandwichLayer
    fields = {**AROUND, "injection": injection("linear"), "router_logit_ema": LOGIT_EMA}  # noqa: RUF012

    def check(self, values: Mapping[str, Any]) -> None:
        """Check that the numbers of layers agree."""
        check_division(values)

    def groups(self, config: Config) -> Sequence[Group]:
        """Return prelude, core and coda."""
        return divided(config, Core, norm_first=True)

    def num_states(self, config: Config) -> int:
        """Return 1, or 0 where the core starts from its input."""
        return 0 if config.injection == "none" else 1

    def embedding_scale(self, config: Config) -> float:
        """Return the root of the hidden size."""
        return math.sqrt(config.hidden_size)

    def draw_weight(self, config: Config, module: nn.Module, name: str, weight: Tensor) -> bool:
        """Draw all matrices by the unrolled depth."""
        if name.endswith("bias") or isinstance(module, MoRERMSNorm | nn.LayerNorm):
            return False
        around = config.prelude_layers + config.coda_layers
        depth = around + (config.num_hidden_layers - around) * config.mean_recurrence
        adds_to_stream = name == "down_proj" or getattr(module, "adds_to_stream", False)
        takase_normal(config, weight, depth if adds_to_stream else None)
        return True


SYSTEM = Huginn()
