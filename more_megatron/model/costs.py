"""What a model costs: parameters stored, parameters a token uses, floating-point operations a token takes.

Operations are those of matrix products, a multiplication and an addition counted as two, forward pass. Attention is
counted causally: half of the rectangle. Norms, activations and the softmax are left out, as in Megatron's own figures.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

from more_megatron.config import MoREConfig


@dataclass(frozen=True)
class Cost:
    """Cost of a part of a model."""

    parameters: int = 0  # weights that are stored
    active_parameters: int = 0  # weights that one token meets
    once: float = 0.0  # operations a token, independent of recurrence
    per_step: float = 0.0  # operations a token and recurrence step

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, count: int) -> Cost:
        return self.routed(count, count)

    def routed(self, num_experts: int, topk: int) -> Cost:
        """Return the cost of `num_experts` such parts of which a token uses `topk`."""
        return Cost(
            self.parameters * num_experts, self.active_parameters * topk, self.once * topk, self.per_step * topk
        )

    def in_every_step(self) -> Cost:
        """Return the cost of the part if it is computed in every recurrence step."""
        return Cost(self.parameters, self.active_parameters, 0.0, self.once + self.per_step)

    def training_flops(self, no_grad_steps: float, grad_steps: float) -> float:
        """Return operations a token of a training step: a backward pass costs two forward passes, and steps without
        gradient have none.
        """
        return 3.0 * self.once + (no_grad_steps + 3.0 * grad_steps) * self.per_step


def linear_cost(inputs: int, outputs: int) -> Cost:
    """Return the cost of a linear map without bias."""
    return Cost(inputs * outputs, inputs * outputs, 2.0 * inputs * outputs)


def gated_mlp_cost(hidden_size: int, ffn_hidden_size: int) -> Cost:
    """Return the cost of a gated MLP without bias."""
    return linear_cost(hidden_size, 2 * ffn_hidden_size) + linear_cost(ffn_hidden_size, hidden_size)


def mlp_cost(config: MoREConfig, ffn_hidden_size: int) -> Cost:
    """Return the cost of an MLP without bias, gated as the configuration says."""
    hidden = config.hidden_size
    if config.gated_linear_unit:
        return gated_mlp_cost(hidden, ffn_hidden_size)
    return linear_cost(hidden, ffn_hidden_size) + linear_cost(ffn_hidden_size, hidden)


def attention_cost(config: MoREConfig, context: float) -> Cost:
    """Return the cost of causal self-attention without bias, over a sequence of length `context`."""
    queries = config.num_attention_heads * config.kv_channels
    keys_and_values = 2 * config.num_query_groups * config.kv_channels
    core = Cost(once=4.0 * queries * context / 2)
    return linear_cost(config.hidden_size, queries + keys_and_values) + linear_cost(queries, config.hidden_size) + core
