"""Huginn's sandwich layer: Megatron's, with a norm over the residual sum behind each of its parts.

    a <- N2(x + Attn(N1(x))),   out <- N4(a + MLP(N3(a)))

Geiping et al., arXiv 2502.05171, section 3.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.iterated_moe import RepeatedTransformerLayer
from more_megatron.blocks.layers import plain_layers, repeated_layers
from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost
from more_megatron.model.stack import Layer


class SandwichLayer(TransformerLayer):
    """Megatron's layer with two norms more. A bias of the QKV projection acts on queries and keys only."""

    def __init__(self, config: MoREConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_attention_norm = self._norm()
        self.post_mlp_norm = self._norm()
        bias = getattr(self.self_attention.linear_qkv, "bias", None)
        if bias is not None and bias.numel() > 0:
            mask = self._mask_of_queries_and_keys(bias)
            # A model that was initialized on the CPU has moved since.
            bias.register_hook(lambda gradient: gradient * mask.to(gradient))

    def _norm(self) -> torch.nn.Module:
        config: MoREConfig = self.config
        norm = backend_of(config).norm()
        return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def _mask_of_queries_and_keys(self, bias: torch.Tensor) -> torch.Tensor:
        """Return 0 for this rank's values and 1 for its queries and keys: with that gradient a zero stays zero."""
        groups = self.config.num_query_groups
        shape = (groups, self.config.num_attention_heads // groups + 2, self.config.kv_channels)
        mask = torch.ones(shape, dtype=bias.dtype, device=bias.device)
        mask[:, -1] = 0
        return mask.flatten().chunk(self.tp_group.size())[self.tp_group.rank()]

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_states, context = super()._forward_attention(*args, **kwargs)
        return _viewless(self.post_attention_norm(hidden_states)), context

    def _forward_post_mlp(
        self, mlp_output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor
    ) -> torch.Tensor:
        return _viewless(self.post_mlp_norm(super()._forward_post_mlp(mlp_output_with_bias, residual)))


class RepeatedSandwichLayer(SandwichLayer, RepeatedTransformerLayer):
    """A sandwich layer in a group that is repeated."""


def sandwich_layers(config: MoREConfig) -> tuple[list[Layer], list[Layer]]:
    """Return the layers of a model as they are where they run once, and where they are repeated.

    Besides Megatron's parts they have two norms, and a bias of the attention's input.
    """
    has_bias = config.add_qkv_bias or config.add_bias_linear
    heads = config.num_attention_heads + 2 * config.num_query_groups
    parameters = 2 * config.hidden_size + (heads * config.kv_channels if has_bias else 0)
    more = Cost(parameters, parameters)
    once, repeated = plain_layers(config, SandwichLayer), repeated_layers(config, RepeatedSandwichLayer)
    return [layer.with_cost(more) for layer in once], [layer.with_cost(more) for layer in repeated]


def _viewless(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as no view of another: Megatron's checkpoints take no views, and norms may return some."""
    return make_viewless_tensor(inp=tensor, requires_grad=tensor.requires_grad, keep_graph=True)
