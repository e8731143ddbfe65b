"""The backend in plain PyTorch: fused kernels where the device has them, on a CPU too."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.blocks.backends.interface import Backend, Piece, RowGroups, Weights
from more_megatron.blocks.backends.short_segments import are_short, short_segment_attention
from more_megatron.blocks.segments import Segments
from more_megatron.config import MoREConfig
from more_megatron.model.initialization import parameter_device

__all__ = ["LocalAttention", "LocalBackend", "LocalNorm", "grouped_linear", "segment_attention"]


class LocalNorm(torch.nn.Module):
    """RMSNorm or LayerNorm in plain PyTorch, usable under sequence parallelism.

    Megatron's local norm refuses sequence parallelism, which an MoE model needs under tensor parallelism. The weights
    are marked, and Megatron sums their gradients over the tensor-parallel group.
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
        """Attend; arguments as for Megatron's.

        The mask, [b or 1, 1, s, s], is True where attention is forbidden; without one attention is causal.
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
        # As in Megatron: heads are split over ranks, so each rank draws its own dropout. Under sequence parallelism the
        # decoder has forked already, and recomputation, which forks once, would draw other numbers in a second fork.
        if self.config.sequence_parallel:
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()


def grouped_linear(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Apply to each group of rows, [rows, in] sorted by group, its map of [groups, out, in], all groups in one kernel.

    `ends` is the end of each group's rows, int32 [groups].
    """
    if weight.size(0) == 1:
        return torch.nn.functional.linear(rows, weight[0])
    return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def segment_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Attend causally within each segment, all segments together; return [rows, heads, head_dim].

    Both backends use it. Transformer Engine has kernels for segments too; but where cuDNN does not offer them, it pads
    every segment to the longest and stores all scores, at seven times the time and half of the device's memory.

    Args:
        query: [rows, heads, head_dim]; the rows of a segment are consecutive and in ascending position.
        key: [rows, groups, head_dim].
        value: [rows, groups, head_dim].
        segments: Where the segments are.
    """
    if _varlen_can(query):
        return _varlen_attention(query, key, value, segments)
    if are_short(query, segments):
        return short_segment_attention(query, key, value, segments)
    # Padding comes after the rows of a segment, so the causal mask hides it.
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=query.size(1) != key.size(1)
    )
    return segments.unpad(map(attend, *(segments.pad(x) for x in (query, key, value))))


def _varlen_can(query: torch.Tensor) -> bool:
    """Return whether PyTorch's attention for segments of any length, a flash kernel, takes these heads."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.size(-1) % 8 == 0
        and query.size(-1) <= 256
        and query.size(0) > 0
    )


def _varlen_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> torch.Tensor:
    # Imported here: it imports PyTorch's compiler, which takes a second.
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = segments.offsets, segments.longest
    shared = query.size(1) // key.size(1)
    options: dict[str, Any] = {}
    if shared > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    context: Any = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0), **options)
    return context


class LocalBackend(Backend):
    """Plain PyTorch. The weights of all groups are one parameter, [groups, ...]."""

    core_attention = LocalAttention

    def layer_submodules(self, config: MoREConfig, moe: bool) -> TransformerLayerSubmodules:
        submodules = get_gpt_layer_local_submodules(
            num_experts=config.num_moe_experts if moe else None,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
        attention = submodules.self_attention.submodules
        qk_norm = LocalNorm if config.qk_layernorm and not config.qk_l2_norm else attention.q_layernorm
        attention = dataclasses.replace(
            attention, core_attention=LocalAttention, q_layernorm=qk_norm, k_layernorm=qk_norm
        )
        # In checkpoints modules are called as Transformer Engine calls its own: there the norm before a dense MLP is
        # part of the MLP's first linear layer; before experts it is a module by itself.
        names = dict(submodules.sharded_state_dict_keys_map)
        if moe:
            names.pop("pre_mlp_layernorm.", None)
        return dataclasses.replace(
            submodules,
            input_layernorm=LocalNorm,
            pre_mlp_layernorm=LocalNorm,
            self_attention=dataclasses.replace(submodules.self_attention, submodules=attention),
            sharded_state_dict_keys_map=names,
        )

    def linears(self) -> tuple[Any, Any]:
        parts = LocalSpecProvider()
        return parts.column_parallel_linear(), parts.row_parallel_linear()

    def norm(self) -> LayerNormBuilder:
        return LocalNorm

    def looped(self, config: MoREConfig) -> MoREConfig:
        return config

    def row_multiple(self, config: MoREConfig) -> None:
        return None

    def linear_weights(self, config: MoREConfig, groups: int, shape: tuple[int, ...], columns: int = 1) -> Weights:
        size = (groups, *shape)
        return torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=parameter_device(config)))

    def pieces(self, weights: Weights) -> Iterator[Piece]:
        assert isinstance(weights, torch.nn.Parameter)
        yield Piece(weights)

    def columns(self, weights: Weights, number: int) -> tuple[torch.Tensor, ...]:
        assert isinstance(weights, torch.nn.Parameter)
        return weights.chunk(number, dim=-1)

    def linear(self, rows: torch.Tensor, weights: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        return grouped_linear(rows, weights.flatten(1, -2), groups.ends)

    def stacked(self, weights: Weights) -> torch.Tensor:
        assert isinstance(weights, torch.nn.Parameter)
        return weights

    def row_norm(self, config: MoREConfig) -> None:
        return None
