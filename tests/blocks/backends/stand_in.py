"""A stand-in for Transformer Engine on a CPU: what it is asked for is recorded, and computed in plain PyTorch.

Constructors and calls have the parameters of version 2.20. What the real modules do to gradients, to checkpoints and in
FP8 is imitated as far as callers can get it wrong: fused accumulation overwrites in the first pass, extra state is part
of the state, FP8 wants rows in multiples. Nothing is rounded.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

FP8_ROWS = 16


@dataclass(frozen=True)
class Request:
    """Construction of a module: the name of its class and the arguments that were given."""

    kind: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """Forward pass of a module."""

    kind: str  # name of the class
    rows: list[int]  # number of rows, of each group where there are groups
    fp8: bool  # whether it ran in FP8
    first: bool | None = None  # what the caller said about the first pass
    arguments: dict[str, Any] = field(default_factory=dict)  # what else there is to know


REQUESTS: list[Request] = []
CALLS: list[Call] = []


class FP8GlobalStateManager:
    """Whether FP8 is on, and with which recipe."""

    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return cls.recipe


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Iterator[None]:
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextlib.contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Iterator[None]:
    yield


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool = True,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """Recompute in the FP8 context of the forward pass."""
    recipe = FP8GlobalStateManager.recipe

    def in_context(*inner: Any) -> Any:
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*inner, **kwargs)

    return torch.utils.checkpoint.checkpoint(in_context, *args, use_reentrant=False)


def _plain(value: Any) -> Any:
    """Return numbers and names as they are, and of anything else the kind."""
    return value if value is None or isinstance(value, bool | int | float | str | torch.dtype) else type(value).__name__


class _Recorded(torch.nn.Module):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        arguments = {name: _plain(value) for name, value in arguments.items() if name not in ("self", "__class__")}
        # A subclass counts as what it is derived from.
        kinds = [kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__]
        REQUESTS.append(Request(kinds[0], arguments))
        self.fp8, self.fp8_calibration = False, False
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": Recipe()}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or state.numel() == 0

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


class _Multiply(torch.autograd.Function):
    """Linear map whose weight gradient goes to `main_grad`, as with fused accumulation."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.nn.Parameter, first: bool | None) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.first = weight, first
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        update = grad.flatten(0, -2).T @ x.flatten(0, -2)
        if ctx.first:
            weight.main_grad.copy_(update)
        else:
            weight.main_grad.add_(update)
        weight.grad_added_to_main_grad = True
        dummy = 0.0 if getattr(weight, "zero_out_wgrad", False) else torch.nan
        return grad @ weight, torch.full_like(weight, dummy), None


def _multiply(x: torch.Tensor, weight: torch.nn.Parameter, fused: bool, first: bool | None) -> torch.Tensor:
    if fused and torch.is_grad_enabled():
        return _Multiply.apply(x, weight, first)
    return torch.nn.functional.linear(x, weight)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype, device=device))


def _check_rows(rows: int) -> bool:
    fp8 = FP8GlobalStateManager.is_fp8_enabled()
    assert not fp8 or rows % FP8_ROWS == 0, f"FP8 wants rows in multiples of {FP8_ROWS}, not {rows}"
    return fp8


class Linear(_Recorded):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        rng_tracker_name: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(locals())
        assert tp_size == 1
        assert not bias
        self.fuse_wgrad_accumulation, self.parallel_mode = fuse_wgrad_accumulation, parallel_mode
        self.save_original_input, self.use_bias, self.tp_size = save_original_input, False, 1
        self.weight = _parameter((out_features, in_features), params_dtype, device)
        (init_method or torch.nn.init.normal_)(self.weight.data)
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0
        self.weight.partition_stride = 1

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool | None = False
    ) -> torch.Tensor:
        rows = inp.numel() // inp.size(-1)
        CALLS.append(Call("Linear", [rows], _check_rows(rows), is_first_microbatch))
        return _multiply(inp, self.weight, self.fuse_wgrad_accumulation, is_first_microbatch)


class LayerNormLinear(_Recorded):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        return_bias: bool = False,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        init_method: Any = None,
        bias: bool = True,
        fuse_wgrad_accumulation: bool = False,
        return_layernorm_output: bool = False,
        parallel_mode: str | None = None,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(locals())
        assert normalization == "RMSNorm"
        self.eps, self.fuse_wgrad_accumulation, self.parallel_mode = eps, fuse_wgrad_accumulation, parallel_mode
        self.use_bias, self.tp_size = False, 1
        self.layer_norm_weight = _parameter((in_features,), params_dtype, device)
        torch.nn.init.ones_(self.layer_norm_weight)
        self.weight = _parameter((out_features, in_features), params_dtype, device)
        (init_method or torch.nn.init.normal_)(self.weight.data)

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, fp8_output: bool | None = False
    ) -> torch.Tensor:
        rows = inp.numel() // inp.size(-1)
        CALLS.append(Call("LayerNormLinear", [rows], _check_rows(rows), is_first_microbatch))
        normed = torch.nn.functional.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps)
        return _multiply(normed, self.weight, self.fuse_wgrad_accumulation, is_first_microbatch)


class GroupedLinear(_Recorded):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        super().__init__(locals())
        assert tp_size == 1
        assert not bias
        self.num_gemms, self.fuse_wgrad_accumulation = num_gemms, fuse_wgrad_accumulation
        self.use_bias, self.tp_size = False, 1
        for index in range(num_gemms):
            weight = _parameter((out_features, in_features), params_dtype, device)
            (init_method or torch.nn.init.normal_)(weight.data)
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
            self.register_parameter(f"weight{index}", weight)

    def forward(
        self,
        inp: torch.Tensor,
        m_splits: Any,
        is_first_microbatch: bool | None = None,
        out: Any = None,
        dgrad_out: Any = None,
    ) -> torch.Tensor:
        splits = [int(rows) for rows in m_splits]
        assert len(splits) == self.num_gemms
        assert sum(splits) == inp.size(0)
        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        for rows in splits:
            _check_rows(rows)
        CALLS.append(Call("GroupedLinear", splits, fp8, is_first_microbatch))
        parts = [
            _multiply(part, getattr(self, f"weight{index}"), self.fuse_wgrad_accumulation, is_first_microbatch)
            for index, part in enumerate(inp.split(splits))
        ]
        return torch.cat(parts)


class DotProductAttention(_Recorded):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__(locals())
        self.heads, self.groups, self.channels = num_attention_heads, num_gqa_groups, kv_channels
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type

        def forgive(module: torch.nn.Module, keys: Any) -> None:
            for key in [key for key in keys.missing_keys if "core_attention._extra_state" in key]:
                keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(forgive)

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        **options: Any,
    ) -> torch.Tensor:
        layout, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        assert query_layer.shape[-2:] == (self.heads, self.channels)
        assert key_layer.shape[-2:] == (self.groups, self.channels)
        fp8 = FP8GlobalStateManager.is_fp8_enabled()
        CALLS.append(Call("DotProductAttention", [query_layer.size(0)], fp8, None, {"format": layout, "mask": mask}))
        assert (layout, mask) == ("sbhd", "causal" if attention_mask is None else "arbitrary")
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        return _causal(query, key, value, attention_mask).permute(2, 0, 1, 3).flatten(2)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend causally, [..., heads, s, d], or as a mask says, which forbids where it is true."""
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value = (
        x.to(wide).repeat_interleave(query.size(-3) // x.size(-3), dim=-3) for x in (query, key, value)
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
    forbidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1) if mask is None else mask
    return (scores.masked_fill(forbidden, -torch.inf).softmax(-1) @ value).to(dtype)


class RMSNorm(_Recorded):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(locals())
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = _parameter((normalized_shape,), params_dtype, options["device"])
        torch.nn.init.ones_(self.weight)
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.numel() > 0
        CALLS.append(Call("RMSNorm", [x.size(0)], FP8GlobalStateManager.is_fp8_enabled()))
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Not computed."""


class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        padded = [-(-rows // FP8_ROWS) * FP8_ROWS for rows in m_splits]
        parts = zip(inp.split(m_splits), m_splits, padded, strict=True)
        return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, new - old)) for part, old, new in parts]), padded


class Fp8Unpadding(Fp8Padding):
    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        padded = [-(-rows // FP8_ROWS) * FP8_ROWS for rows in m_splits]
        return torch.cat([part[:rows] for part, rows in zip(inp.split(padded), m_splits, strict=True)])


class Recipe:
    """Stands for every recipe."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class DelayedScaling(Recipe):
    """A type of its own: Megatron asks for it."""


def _accumulate(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
    main_grad.add_(grad.T @ x)


class _Named:
    """A name that is imported and not used."""


def install() -> None:
    """Make `import transformer_engine` find this. To be called before Megatron is imported."""
    recipes = {
        "Format": SimpleNamespace(E4M3="e4m3", HYBRID="hybrid"),
        "Recipe": Recipe,
        "DelayedScaling": DelayedScaling,
        **dict.fromkeys(("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"), Recipe),
    }
    precision = {
        "FP8GlobalStateManager": FP8GlobalStateManager,
        "fp8_autocast": fp8_autocast,
        "fp8_model_init": fp8_model_init,
    }
    modules = (
        Linear,
        LayerNormLinear,
        GroupedLinear,
        DotProductAttention,
        RMSNorm,
        LayerNorm,
        Fp8Padding,
        Fp8Unpadding,
    )
    router = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    fused = {"ops": SimpleNamespace(Sequential=torch.nn.Sequential)}
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": "2.20.2"},
        ".common": {},
        ".common.recipe": recipes,
        ".pytorch": {**{module.__name__: module for module in modules}, **precision, **fused},
        ".pytorch.fp8": precision,
        ".pytorch.distributed": {
            "CudaRNGStatesTracker": _Named,
            "activation_recompute_forward": contextlib.nullcontext,
            "checkpoint": checkpoint,
        },
        ".pytorch.router": dict.fromkeys(router, _Named),
        ".pytorch.tensor": {"QuantizedTensor": _Named},
    }
    # The extension of NVIDIA apex that Megatron's own linear layers accumulate gradients with.
    accumulate = ModuleType("fused_weight_gradient_mlp_cuda")
    accumulate.__dict__.update(dict.fromkeys(("wgrad_gemm_accum_fp32", "wgrad_gemm_accum_fp16"), _accumulate))
    sys.modules[accumulate.__name__] = accumulate
    for path, names in contents.items():
        name = f"transformer_engine{path}"
        module = ModuleType(name)
        module.__dict__.update(names)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
