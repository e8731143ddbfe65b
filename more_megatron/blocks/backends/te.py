"""The backend of Transformer Engine: its norms, linear layers, grouped linear layers and attention over
sequences, in bf16 or FP8.

Nothing of its own is written to checkpoints, so that they load under the other backend: what its modules call extra
state is empty but for the scaling histories of delayed FP8, which fill again within a few steps.
"""

import copy
import math
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_submodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from more_megatron.blocks.backends.local import Backend, Weights
from more_megatron.blocks.rows import RowGroups
from more_megatron.config import MoREConfig
from more_megatron.model.initialization import parameter_device


class _Attention(TEDotProductAttention):
    """Megatron's, which reads a mask where there is one: under the causal type Transformer Engine would not."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; arguments as for Megatron's."""
        kind = attn_mask_type if attention_mask is None else AttnMaskType.arbitrary
        return super().forward(query, key, value, attention_mask, kind, **kwargs)


class TransformerEngineBackend(Backend):
    """Transformer Engine. Each group's weight is a parameter, [out, in], of one module for all groups."""

    core_attention = _Attention
    parts = TESpecProvider()

    def _megatrons_layer(self, config: MoREConfig, num_experts: int | None) -> TransformerLayerSubmodules:
        return get_gpt_layer_with_transformer_engine_submodules(
            num_experts=num_experts,
            moe_grouped_gemm=config.moe_grouped_gemm and num_experts is not None,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
        )

    def _norm_for(self, megatrons: Any) -> Any:
        return _without_state(megatrons)

    def norm(self) -> LayerNormBuilder:
        return _without_state(TENorm)

    def looped(self, config: MoREConfig) -> MoREConfig:
        # With fused accumulation a linear layer overwrites the gradient in its first pass of a step and adds to it in
        # the later ones. In a loop the first pass is differentiated last. Told of no first pass, it always adds.
        if config.gradient_accumulation_fusion:
            config = copy.copy(config)
            config.disable_parameter_transpose_cache = True
        return config

    def row_multiple(self, config: MoREConfig) -> int:
        # Megatron enters FP8 layer by layer; some layers may stay in bf16.
        return get_fp8_align_size(config.fp8_recipe) if FP8GlobalStateManager.is_fp8_enabled() else 1

    def linear_module(self, config: MoREConfig, groups: int, shape: tuple[int, ...], columns: int) -> torch.nn.Module:
        sizes = shape[-1] // columns, math.prod(shape[:-1])
        if columns > 1:
            return torch.nn.ModuleList(_linear(config, groups, *sizes) for _ in range(columns))
        return _linear(config, groups, *sizes)

    def columns(self, weights: Weights, number: int) -> tuple[Any, ...]:
        assert isinstance(weights, torch.nn.ModuleList)
        return tuple(weights)

    def linear(self, rows: torch.Tensor, weights: Any, groups: RowGroups) -> torch.Tensor:
        return weights(rows, groups)

    def stacked(self, weights: Weights) -> torch.Tensor:
        assert isinstance(weights, torch.nn.Module)
        parameters = tuple(weights.parameters())
        for parameter in parameters:
            # With fused accumulation autograd's gradient is dropped as a dummy; so marked, it is added.
            setattr(parameter, "zero_out_wgrad", True)  # noqa: B010
        return torch.stack(parameters)

    def row_norm(self, config: MoREConfig) -> torch.nn.Module:
        config = copy.copy(config)
        config.normalization, config.layernorm_zero_centered_gamma = "RMSNorm", False
        return self.norm()(config, config.hidden_size, config.layernorm_epsilon)


class _WithoutExtraState:
    """Makes PyTorch neither write nor expect extra state."""

    get_extra_state = torch.nn.Module.get_extra_state
    set_extra_state = torch.nn.Module.set_extra_state


class _FirstPass:
    """Tells Transformer Engine which pass is the first of a training step: it quantizes the weights, later ones do not.

    Megatron sets `is_first_microbatch` before each step.
    """

    fuse_wgrad_accumulation: bool

    def watch(self, config: MoREConfig) -> None:
        """Begin with a first pass."""
        self.is_first_microbatch = True
        self._keeps_quantized = not config.disable_parameter_transpose_cache

    def _is_first(self) -> bool | None:
        """Return whether this pass is the first; None: quantize for this pass alone."""
        # See `TransformerEngineBackend.looped`. A pass without gradient overwrites none.
        overwrites = self.is_first_microbatch and self.fuse_wgrad_accumulation and torch.is_grad_enabled()
        if overwrites or not self._keeps_quantized:
            return None
        is_first, self.is_first_microbatch = self.is_first_microbatch, False
        return is_first


class _Linear(_WithoutExtraState, _FirstPass, te.Linear):
    """A linear map for rows of one group. Parallelism is the caller's business."""

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return [rows, out] for [rows, in]."""
        return super().forward(rows, is_first_microbatch=self._is_first())


class _GroupedLinear(_WithoutExtraState, _FirstPass, te.GroupedLinear):
    """A linear map for each group of rows. Parallelism is the caller's business."""

    def forward(self, rows: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """Return [rows, out] for [rows, in]."""
        return super().forward(rows, groups.sizes, is_first_microbatch=self._is_first())


def _linear(config: MoREConfig, groups: int, in_features: int, out_features: int) -> torch.nn.Module:
    kind, sizes = (_Linear, ()) if groups == 1 else (_GroupedLinear, (groups,))
    module = kind(
        *sizes,
        in_features,
        out_features,
        bias=False,
        params_dtype=config.params_dtype,
        device=parameter_device(config),
        fuse_wgrad_accumulation=config.gradient_accumulation_fusion,
        init_method=_leave,
    )
    module.watch(config)
    return module


def _leave(weight: torch.Tensor) -> None:
    """Draw nothing: weights are drawn when the number of the layer is known."""


def _without_state(builder: Any) -> Any:
    """Return a builder of Megatron's norms whose modules write and expect no extra state.

    Norms have none to keep, and PyTorch's, which the other backend uses, know of none.
    """
    if builder is IdentityOp:
        return builder

    class Norm:
        def __new__(cls, *args: Any, **kwargs: Any) -> torch.nn.Module:  # type: ignore[misc]
            norm = builder(*args, **kwargs)
            norm.register_state_dict_post_hook(_remove_extra_state)
            norm.register_load_state_dict_pre_hook(_add_extra_state)
            return norm

    return Norm


def _remove_extra_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.pop(f"{prefix}_extra_state", None)


def _add_extra_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.setdefault(f"{prefix}_extra_state", None)
