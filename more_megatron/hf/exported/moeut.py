"""`moeut`: a group of layers repeated, with SwitchHead attention and sigma-MoE in peri-layernorm layers.

Csordas et al., arXiv 2405.16039: norms feed only what ends in a softmax or a sigmoid; values and experts read the
stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attend
from .cache import Memory
from .context import CallContext
from .experts import Experts, MoREMoE
from .fields import Config, Field
from .interface import System
from .layer import LayerOutput, MoRELayer
from .parts import grouped_linear
from .routing import MoRERouter, RouterLogits, Routing, load_balancing_loss
from .stack import Loop


class SigmaRouter(MoRERouter):
    """Weighs the chosen experts by their sigmoids, as they are."""

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs, experts = self.best(logits.float().sigmoid())
        return self.scaled(probs, logits), experts


class SigmaExperts(Experts):
    """Expert j computes `relu(x K_j) V_j`."""

    def __init__(self, config: Config) -> None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        super().__init__(config, {"keys": (width, hidden), "values": (hidden, width)})

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h]."""
        inner = torch.relu(self.linear(rows, "keys", routing))
        return self.linear(routing.weigh(inner), "values", routing)


class SigmaMoE(MoREMoE):
    """Many small experts, which read the stream; router and shared expert read its norm."""

    router_class = SigmaRouter


class HeadWeight(nn.Module):
    """A matrix for each expert of each head, or one for all heads."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Return `x` times the one matrix, or each group of rows that ends there times its own."""
        return nn.functional.linear(x, self.weight) if ends is None else grouped_linear(x, self.weight, ends)


class SwitchHead(nn.Module):
    """Attention whose heads choose experts for their values and outputs; with one expert, heads with gates."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, size, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        experts, width = config.num_head_experts, heads * size
        is_dense = experts == 1
        self.query_key = HeadWeight(2 * width, hidden)
        self.output_router = HeadWeight(heads * experts, hidden)
        self.value_router = None if is_dense else HeadWeight(heads * experts, hidden)
        self.value = HeadWeight(width, hidden) if is_dense else HeadWeight(heads * experts, size, hidden)
        self.output = HeadWeight(hidden, width) if is_dense else HeadWeight(heads * experts, hidden, size)

    def forward(self, normed: Tensor, stream: Tensor, context: CallContext, memory: Memory) -> tuple[Tensor, ...]:
        """Return what each token gathers, [b, s, h], and the logits of the routers, [b, s, heads, experts] each.

        Values are made of the stream; queries, keys and routers read its norm, [b, s, h] each.
        """
        both = self._by_head(self.query_key(normed)).transpose(1, 2).chunk(2, dim=-1)
        query, key = map(context.rotate, both)
        output_logits = self._by_head(self.output_router(normed).float())
        if self.value_router is None:
            key, value = memory.extend("attention", key, self._by_head(self.value(stream)).transpose(1, 2))
            gathered = attend(query, key, value, context.mask).transpose(1, 2)
            return (self.output((gathered * output_logits.sigmoid().to(gathered.dtype)).flatten(2)),)
        value_logits = self._by_head(self.value_router(normed).float())
        key, value = memory.extend("attention", key, self._values(stream, value_logits))
        output = self._outputs(attend(query, key, value, context.mask), output_logits)
        return output, value_logits, output_logits

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_attention_heads, -1))

    def _values(self, stream: Tensor, logits: Tensor) -> Tensor:
        """Return [b, heads, s, d]."""
        routing = self._routing(logits)
        rows = routing.weigh(self.value(routing.dispatch(stream), routing.ends))
        return routing.unsorted(rows).unflatten(1, (logits.size(2), -1)).sum(2)

    def _outputs(self, gathered: Tensor, logits: Tensor) -> Tensor:
        """Return [b, s, h], given [b, heads, s, d]."""
        routing = self._routing(logits)
        rows = gathered.repeat_interleave(self.config.num_head_experts_per_tok, dim=1).flatten(0, 2)[routing.order]
        return routing.combine(self.output(routing.weigh(rows), routing.ends))

    def _routing(self, logits: Tensor) -> Routing:
        """Return the rows of all heads; each head has experts of its own."""
        heads, experts = logits.shape[2:]
        scores, chosen = logits.sigmoid().topk(self.config.num_head_experts_per_tok, dim=-1)
        first = torch.arange(0, heads * experts, experts, device=logits.device).unsqueeze(-1)
        return Routing(scores.flatten(2), (chosen + first).flatten(2), heads * experts)


class PeriLayer(MoRELayer):
    """A layer whose parts are told of the stream and of its norm."""

    mlp: SigmaMoE
    attention_class = SwitchHead

    def __init__(self, config: Config, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__(config, layer_idx, mlp)
        self.routers = ("router",) if config.num_head_experts == 1 else ("router", "value", "output")

    def forward(self, hidden_states: Tensor, context: CallContext, memory: Memory, *former: Tensor) -> LayerOutput:
        normed = self.input_layernorm(hidden_states)
        output, *of_heads = self.self_attn(normed, hidden_states, context, memory)
        hidden_states = hidden_states + output
        normed = self.post_attention_layernorm(hidden_states)
        logits = self.mlp.gate(normed)
        output = self.mlp.mix(normed, logits, context, memory, hidden_states)
        return (hidden_states + output, logits, *of_heads)


def _minus_entropy(logits: Sequence[Tensor], batch: int, mask: Tensor | None) -> Tensor:
    """Return minus the entropy of the mean distribution over passes and tokens, the mean over sequences and heads."""
    pooled = torch.stack([part.float().softmax(-1).unflatten(0, (batch, -1)) for part in logits]).mean(0)
    mean = pooled.mean(1)
    if mask is not None:
        counted = mask[:, -pooled.size(1) :].to(pooled).view(batch, -1, *(1,) * (pooled.dim() - 2))
        mean = (pooled * counted).sum(1) / counted.sum(1).clamp(min=1.0)
    return torch.special.xlogy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum(-1).mean()


class MoEUT(System):
    """One group of peri-layernorm layers, repeated."""

    moe_class = SigmaMoE
    experts_class = SigmaExperts
    layer_class = PeriLayer
    loop_class = Loop
    head_bias = True
    fields = {  # noqa: RUF012
        "num_head_experts": Field(int, 8, "Experts of a head for values, and for outputs; 1: gated heads.", low=1),
        "num_head_experts_per_tok": Field(int, 2, "Experts that a head uses for a token.", low=1),
        "head_balance_coef": Field(float, 0.001, "Coefficient of the entropy of the routers of heads.", low=0.0),
        "balance_coef": Field(float, 0.01, "Coefficient of the entropy of the routers of experts.", low=0.0),
    }
    defaults = {  # noqa: RUF012
        "norm_type": "layernorm",
        "rotary_percent": 0.5,
        "moe_intermediate_size": 128,
        "router_score_function": "sigmoid",
        "router_aux_loss_coef": 0.0,
    }
    fixed = {  # noqa: RUF012
        "qk_norm": False,
        "attention_bias": False,
        "linear_bias": False,
        "moe_layers": lambda found: [True] * found["num_hidden_layers"],
        "num_key_value_heads": lambda found: found["num_attention_heads"],
    }

    def check(self, values: Mapping[str, Any]) -> None:
        super().check(values)
        experts, topk = values["num_head_experts"], values["num_head_experts_per_tok"]
        if 1 < experts < topk:
            raise ValueError(f"num_head_experts_per_tok {topk} must be at most num_head_experts {experts}")

    def router_loss(self, config: Config, router_logits: RouterLogits, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the entropy losses, twice; Megatron's balance loss is in it if its coefficient is not 0."""
        of_experts = [part for part in router_logits if part.dim() == 2]
        total = load_balancing_loss(of_experts, config, mask) * config.router_aux_loss_coef
        by_place: dict[tuple[int, str], list[Tensor]] = {}
        for logits, layer, router in zip(router_logits, router_logits.layers, router_logits.routers, strict=True):
            by_place.setdefault((layer, router), []).append(logits)
        for (_, router), passes in by_place.items():
            coefficient = config.balance_coef if router == "router" else config.head_balance_coef
            total = total + coefficient * _minus_entropy(passes, router_logits.batch, mask).to(total.device)
        return total, total


SYSTEM = MoEUT()
