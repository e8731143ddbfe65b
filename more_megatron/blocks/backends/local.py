"""The backend in plain PyTorch: fused kernels where the device has them, on a CPU too."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm, LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from more_megatron.blocks.rows import RowGroups
from more_megatron.config import MoREConfig

# Weights of a linear map or of a norm. Assigned to an attribute of a module they become its parameter or its submodule.
Weights = torch.nn.Parameter | torch.nn.Module


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


class Backend:
    """Building blocks in plain PyTorch. Systems call these methods and do not know which backend answers.

    Another backend overrides what it has of its own. Here the weights of all groups are one parameter, [groups, ...].
    """

    core_attention: ClassVar[Any] = LocalAttention  # attention between queries, keys and values
    parts: ClassVar[Any] = LocalSpecProvider()  # Megatron's modules

    def layer_submodules(self, config: MoREConfig, moe: bool) -> TransformerLayerSubmodules:
        """Return the submodules of one transformer layer; its feed-forward part is a mixture of experts, or not."""
        submodules = self._megatrons_layer(config, config.num_moe_experts if moe else None)
        attention = submodules.self_attention.submodules
        attention = dataclasses.replace(
            attention,
            core_attention=self.core_attention,
            q_layernorm=self._norm_for(attention.q_layernorm),
            k_layernorm=self._norm_for(attention.k_layernorm),
        )
        return dataclasses.replace(
            submodules,
            input_layernorm=self._norm_for(submodules.input_layernorm),
            pre_mlp_layernorm=self._norm_for(submodules.pre_mlp_layernorm),
            self_attention=dataclasses.replace(submodules.self_attention, submodules=attention),
        )

    def _megatrons_layer(self, config: MoREConfig, num_experts: int | None) -> TransformerLayerSubmodules:
        """Return the submodules of Megatron's own layer on this backend, dense without a number of experts."""
        submodules = get_gpt_layer_local_submodules(
            num_experts=num_experts,
            qk_layernorm=config.qk_layernorm,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
        )
        # In checkpoints modules are called as Transformer Engine calls its own: there the norm before a dense MLP is
        # part of the MLP's first linear layer; before experts it is a module by itself.
        names = dict(submodules.sharded_state_dict_keys_map)
        if num_experts is not None:
            names.pop("pre_mlp_layernorm.", None)
        return dataclasses.replace(submodules, sharded_state_dict_keys_map=names)

    def _norm_for(self, megatrons: Any) -> Any:
        """Return the builder of norms to take in the place of Megatron's."""
        return megatrons if megatrons in (IdentityOp, L2Norm) else LocalNorm

    def linears(self) -> tuple[Any, Any]:
        """Return the linear layers that are split by output and by input, without a norm of their own."""
        return self.parts.column_parallel_linear(), self.parts.row_parallel_linear()

    def attention(self) -> ModuleSpec:
        """Return causal self-attention over whole sequences, without a norm of its own."""
        column, row = self.linears()
        submodules = SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=self.core_attention,
            linear_proj=row,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        )
        return ModuleSpec(SelfAttention, {"attn_mask_type": AttnMaskType.causal}, submodules)

    def mlp(self) -> MLPSubmodules:
        """Return the linear layers of an MLP over whole sequences, without a norm of its own."""
        column, row = self.linears()
        return MLPSubmodules(linear_fc1=column, linear_fc2=row)

    def norm(self) -> LayerNormBuilder:
        """Return the builder of norms over whole sequences."""
        return LocalNorm

    def looped(self, config: MoREConfig) -> MoREConfig:
        """Return the configuration for modules of Megatron's that run several times in one forward pass."""
        return config

    def row_multiple(self, config: MoREConfig) -> int | None:
        """Return the number of which each group's rows must be a multiple in the pass that is under way.

        There must also be that many rows at least. None: the rows are taken as they come.
        """
        return None

    def row_norm(self, config: MoREConfig) -> torch.nn.Module | None:
        """Return an RMSNorm over rows with one weight for all of them; None if the caller shall compute it."""
        return None

    def linear_module(
        self, config: MoREConfig, groups: int, shape: tuple[int, ...], columns: int
    ) -> torch.nn.Module | None:
        """Return the weights of a linear map without bias for each group, not yet drawn, as a module of the backend's.

        It has a parameter for each group, and that for each of the `columns` equal parts of the input that are
        multiplied separately. None: the weights are one parameter, [groups, ...].

        Args:
            shape: Shape of one group's weight on this rank; the last dimension is the input.
        """
        return None

    def columns(self, weights: Weights, number: int) -> Sequence[Any]:
        """Return the weights for each of the `number` parts of the input, as `linear` takes them."""
        assert isinstance(weights, torch.nn.Parameter)
        return weights.chunk(number, dim=-1)

    def linear(self, rows: torch.Tensor, weights: Any, groups: RowGroups) -> torch.Tensor:
        """Apply to the rows of each group, [rows, in], a linear map of its own.

        The weights are those of a linear map, or one of its `columns`; the result is [rows, out], more dimensions of
        the weight are flattened.
        """
        return grouped_linear(rows, weights.flatten(1, -2), groups.ends)

    def stacked(self, weights: Weights) -> torch.Tensor:
        """Return the weights of a linear map as a tensor that carries gradient, [groups, ...]."""
        assert isinstance(weights, torch.nn.Parameter)
        return weights
