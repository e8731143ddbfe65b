"""Building blocks by backend: `local` (plain PyTorch) and Transformer Engine.

`layer_submodules` is the one place that asks which backend a run uses; systems take what it returns and replace the
MoE part.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.config import MoREConfig
from more_megatron.segments import Segments

__all__ = [
    "LocalAttention",
    "LocalNorm",
    "SandwichParts",
    "final_norm",
    "grouped_linear",
    "layer_submodules",
    "sandwich_parts",
    "segment_attention",
]


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm in plain PyTorch, usable under sequence parallelism.

    Megatron's local norm refuses sequence parallelism, which an MoE model needs under tensor parallelism. The weights
    are marked, and Megatron sums their gradients over the tensor-parallel group.

    Args:
        config: Model configuration; `normalization` names the kind.
        hidden_size: Size of the last dimension.
        eps: Added to the variance.
    """

    def __new__(  # type: ignore[misc]
        cls, config: MoREConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any
    ) -> torch.nn.Module:
        """Return the PyTorch module: its parameter names are Megatron's."""
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.data = parameter.data.to(config.params_dtype)
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LocalAttention(DotProductAttention):
    """Megatron's local attention, computed by PyTorch's fused kernel wherever the kernel can do it.

    The scores of [b, heads, s, s] are never stored. What the kernel cannot do (learnt softmax offsets, sliding windows,
    scaling by layer) is left to Megatron's own code.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s, b, heads, head_dim].
            key: [s, b, groups, head_dim].
            value: [s, b, groups, head_dim].
            attention_mask: True where attention is forbidden, [b or 1, 1, s, s]. None: causal.
            attn_mask_type: Kind of the mask. Default: the layer's.
            kwargs: Passed on to Megatron where it computes.

        Returns:
            [s, b, heads * head_dim].
        """
        if not self._kernel_can(kwargs):
            return super().forward(query, key, value, attention_mask, attn_mask_type, **kwargs)
        allowed = None if attention_mask is None else ~attention_mask.bool()
        query_, key_, value_ = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.attention_dropout.p if self.training else 0.0
        with self._random_state():
            context = torch.nn.functional.scaled_dot_product_attention(
                query_,
                key_,
                value_,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=allowed is None,
                scale=self.softmax_scale,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _kernel_can(self, kwargs: dict[str, Any]) -> bool:
        return (
            self.attn_mask_type == AttnMaskType.causal
            and self.config.softmax_type == "vanilla"
            and self.scale_mask_softmax.window_size is None
            and not self.config.apply_query_key_layer_scaling
            and kwargs.get("attention_bias") is None
            and kwargs.get("packed_seq_params") is None
        )

    def _random_state(self) -> Any:
        # As in Megatron: heads are split over ranks, so each rank draws its own dropout.
        return tensor_parallel.get_cuda_rng_tracker().fork()


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Apply to each group of rows a linear map of its own, all groups in one kernel.

    Args:
        rows: [rows, in], sorted by group.
        weight: [groups, out, in].
        ends: End of each group's rows, int32 [groups].

    Returns:
        [rows, out].
    """
    if weight.size(0) == 1:
        return torch.nn.functional.linear(rows, weight[0])
    return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def segment_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attend causally within each segment, all segments in one kernel.

    Args:
        query: [rows, heads, head_dim]; the rows of a segment are consecutive and in ascending position.
        key: [rows, groups, head_dim].
        value: [rows, groups, head_dim].
        segments: Where the segments are.

    Returns:
        [rows, heads, head_dim].
    """
    query, key, value = (segments.pad(x) for x in (query, key, value))
    # Padding comes after the rows of a segment, so the causal mask hides it.
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.size(1) != key.size(1)
    )
    return segments.unpad(context)


def layer_submodules(config: MoREConfig, moe: bool) -> TransformerLayerSubmodules:
    """Return the submodules of one transformer layer on the backend of `config`.

    Args:
        config: Model configuration; `transformer_impl` names the backend.
        moe: Whether the layer's feed-forward part is a mixture of experts.
    """
    num_experts = config.num_moe_experts if moe else None
    if config.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_submodules(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm and moe,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
        )
    submodules = get_gpt_layer_local_submodules(
        num_experts=num_experts,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    attention = submodules.self_attention.submodules
    qk_norm = LocalNorm if config.qk_layernorm and not config.qk_l2_norm else attention.q_layernorm
    attention = dataclasses.replace(attention, core_attention=LocalAttention, q_layernorm=qk_norm, k_layernorm=qk_norm)
    return dataclasses.replace(
        submodules,
        input_layernorm=LocalNorm,
        pre_mlp_layernorm=LocalNorm,
        self_attention=dataclasses.replace(submodules.self_attention, submodules=attention),
        sharded_state_dict_keys_map=_checkpoint_names(submodules, moe),
    )


@dataclass(frozen=True)
class SandwichParts:
    """Builders of the parts of a sandwich block over whole sequences.

    Attributes:
        norm: Builds a norm.
        attention: Specification of causal self-attention, without a norm of its own.
        mlp: Linear layers of a gated MLP, without a norm of its own.
    """

    norm: LayerNormBuilder
    attention: ModuleSpec
    mlp: MLPSubmodules


def sandwich_parts(config: MoREConfig) -> SandwichParts:
    """Return the parts of a sandwich block on the backend of `config`."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        provider: BackendSpecProvider = TESpecProvider()
        core_attention = provider.core_attention()
    else:
        provider, core_attention = LocalSpecProvider(), LocalAttention
    attention = SelfAttentionSubmodules(
        linear_qkv=provider.column_parallel_linear(),
        core_attention=core_attention,
        linear_proj=provider.row_parallel_linear(),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    return SandwichParts(
        norm=final_norm(config),
        attention=ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
        mlp=MLPSubmodules(linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()),
    )


def _checkpoint_names(submodules: TransformerLayerSubmodules, moe: bool) -> dict[str, str]:
    """Return how the layer's modules are called in checkpoints: as Transformer Engine calls its own.

    There the norm before a dense MLP is part of the MLP's first linear layer; before experts it is a module by itself.
    """
    names = dict(submodules.sharded_state_dict_keys_map)
    if moe:
        names.pop("pre_mlp_layernorm.", None)
    return names


def final_norm(config: MoREConfig) -> LayerNormBuilder:
    """Return the norm after the last layer on the backend of `config`."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return LocalNorm
