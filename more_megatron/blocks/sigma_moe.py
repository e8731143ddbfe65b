"""sigma-MoE: experts that are slices of one ReLU network, weighed by sigmoids that do not compete.

    y = sum over the chosen j of sigmoid(l_j) relu(x K_j) V_j

Csordas et al., arXiv 2310.10837; in MoEUT (arXiv 2405.16039) the router reads a norm of the stream and the experts read
the stream itself. Experts are many and small, 128 channels each; those of a rank are two grouped products.
"""

from __future__ import annotations

from typing import Any

import torch

from more_megatron.blocks.base_moe import BaseMoELayer
from more_megatron.blocks.entropy_balance import sum_over_positions
from more_megatron.blocks.experts import RoutedExperts
from more_megatron.blocks.layer import LayerInputs
from more_megatron.blocks.padding import RowPadding
from more_megatron.blocks.parameters import draw_parameters, grouped_linear_weights
from more_megatron.blocks.router import IteratedRouter, RouterStep
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.initialization import BlockInitializer

__all__ = ["SigmaExperts", "SigmaMoELayer", "SigmaRouter", "sigma_experts_cost"]


class SigmaRouter(IteratedRouter):
    """Megatron's router with sigmoids as they are for weights, and in training with experts that drop out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score_function = "sigmoid"

    def set_layer_number(self, layer_number: int) -> None:
        """Learn the number of the layer, from 1, and draw the weight, which depends on it."""
        super().set_layer_number(layer_number)
        if self.config.perform_initialization:
            initializer = BlockInitializer(self.config, layer_number)
            self.weight.data.copy_(initializer.rows_of_equal_norm(tuple(self.weight.shape), "sigma/router"))

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple:
        """Route as Megatron does, without dividing the weights of a token by their sum."""
        if self.training:
            self._step.sums = sum_over_positions(logits)
            if self.config.moeut_expert_dropout > 0.0:
                # The sigmoid of what dropped out is 0: it may be chosen for want of others, with weight 0.
                dropped = torch.rand_like(logits) < self.config.moeut_expert_dropout
                logits = logits.masked_fill(dropped, float("-inf"))
        probs, routing_map = super().routing(logits, padding_mask)
        if self.topk > 1:
            # The losses that Megatron attached hang on its weights, so its division is undone instead of left out.
            scores = torch.sigmoid(logits.float()).view_as(probs).masked_fill(probs == 0.0, 0.0)
            probs = probs * scores.sum(dim=-1, keepdim=True).to(probs.dtype)
        return probs, routing_map


class SigmaExperts(RoutedExperts):
    """Expert j computes `relu(x K_j) V_j`; h -> `moe_ffn_hidden_size` -> h, without gate and biases."""

    def build(self) -> None:
        hidden, width = self.config.hidden_size, self.config.moe_ffn_hidden_size
        self._shapes = {"keys": (width, hidden), "values": (hidden, width)}
        self.keys = grouped_linear_weights(self.config, self.placement, self._shapes["keys"], split_dim=0)
        self.values = grouped_linear_weights(self.config, self.placement, self._shapes["values"], split_dim=1)

    def draw(self, initializer: BlockInitializer) -> None:
        hidden, width = self.config.hidden_size, self.config.moe_ffn_hidden_size
        # The values of all experts together are one matrix.
        inputs = {"keys": hidden, "values": self.config.num_moe_experts * width}

        def draw(name: str, shape: tuple[int, ...], group: int) -> torch.Tensor:
            return initializer.scaled_normal(shape, f"sigma/{group}/{name}", inputs[name])

        draw_parameters(self, self._shapes, self.placement, draw)

    def compute(self, x: torch.Tensor, padding: RowPadding, probs: torch.Tensor) -> torch.Tensor:
        inner = self.backend.linear(x, self.keys, padding.groups)
        # Weighed where rows are narrow.
        weighed = torch.relu(inner) * padding.pad(probs).unsqueeze(-1)
        return padding.unpad(self.backend.linear(weighed.to(inner.dtype), self.values, padding.groups))


class SigmaMoELayer(BaseMoELayer):
    """Megatron's MoE layer whose router reads a norm of what the experts read."""

    router: SigmaRouter

    def forward(
        self, normed: torch.Tensor, stream: torch.Tensor, inputs: LayerInputs, step: RouterStep
    ) -> tuple[torch.Tensor, None]:
        """Return the sum of routed and shared experts, [s, b, h], and no bias.

        Router and shared expert read `normed`, experts the stream itself, [s, b, h] both.
        """
        # A gated unit is no homogeneous function: on the stream itself it would grow with its square.
        shared_output = self.shared_experts_compute(normed)
        with self.router.at(step):
            probs, routing_map = self.route(normed, inputs.token_padding_mask)
        dispatched, probs = self.dispatch(*self.preprocess(stream, probs, routing_map))
        output, _ = self.routed_experts_compute(dispatched, probs)
        return self.postprocess(self.combine(output), shared_output), None


def sigma_experts_cost(config: MoREConfig) -> Cost:
    """Return the cost of the routed experts."""
    hidden, width = config.hidden_size, config.moe_ffn_hidden_size
    expert = linear_cost(hidden, width) + linear_cost(width, hidden)
    return expert.routed(config.num_moe_experts, config.moe_router_topk)
