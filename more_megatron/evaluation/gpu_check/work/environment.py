"""Stage a: what is installed, what the defaults make of it, and what the device can do at the most."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.plan import Plan, command_line
from more_megatron.evaluation.runs import configure
from more_megatron.evaluation.step_benchmark import seconds_of
from more_megatron.platform import Platform, initialize_platform

_PACKAGES = ("megatron-core", "transformer_engine", "apex", "triton", "transformers", "numpy")
# What a run's defaults decide by what is there.
_CHOICES = (
    "transformer_impl",
    "bf16",
    "distributed_backend",
    "gradient_accumulation_fusion",
    "bias_swiglu_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "masked_softmax_fusion",
    "moe_grouped_gemm",
    "use_distributed_optimizer",
)


def packages() -> Finding:
    """Name the device and the versions of all that computes."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {name: _version(name) for name in _PACKAGES}
    if initialize_platform() is Platform.CUDA:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory GiB": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return Finding(found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def defaults(plan: Plan) -> Finding:
    """Say what a run takes that leaves the choice to us."""
    args, _ = configure(command_line(plan.systems[0], plan.sizes.training))
    return Finding({name: getattr(args, name) for name in _CHOICES})


def attention() -> Finding:
    """Say which kernel Transformer Engine attends with: unfused, it stores all scores."""
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as module

    attend = DotProductAttention(16, 128, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal")
    shape, device = (512, 2, 16, 128), torch.cuda.current_device()
    attend(*(torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)))
    # Which one it takes is kept there, and nowhere else.
    known = getattr(module, "_attention_backends", None)
    if known is None:
        return Finding({"attention": "not told by this version"})
    chosen = [kind for kind in ("flash", "fused") if known[f"use_{kind}_attention"]]
    return Finding({"attention": next(iter(chosen), "unfused: NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why")})


def fp8_obstacle(recipe: str = "") -> str:
    """Return why this device has no FP8 with a recipe, or at all; empty if it has, or where a CPU only imitates it."""
    if initialize_platform() is Platform.CPU:
        return ""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as Manager

    asked = Manager.is_fp8_block_scaling_available if recipe == "blockwise" else Manager.is_fp8_available
    can, why = asked()
    return "" if can else f"{recipe} FP8 is not there: {why}".strip()


def ceilings(plan: Plan) -> Finding:
    """Measure a product of square matrices and a copy in memory, on random data: what everything later is held against.

    The figures are left in the folder for stage e.
    """
    size, copy_bytes = plan.sizes.matmul, plan.sizes.copy_bytes
    device, flops = torch.cuda.current_device(), 2 * size**3
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(255, (copy_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    figures = {
        "bf16 TFLOP/s": flops / _seconds(lambda: left @ right) / 1e12,
        "TB/s": 2 * copy_bytes / _seconds(lambda: target.copy_(source)) / 1e12,
    }
    if initialize_platform() is Platform.CUDA and torch.cuda.get_device_capability() >= (8, 9):
        figures["fp8 TFLOP/s"] = flops / _seconds(_fp8_product(left, right)) / 1e12
    (plan.folder / "ceilings.json").write_text(json.dumps(figures))
    return Finding(figures)


def _fp8_product(left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    first, second = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t().contiguous().t()
    one = torch.ones((), device=left.device)
    return lambda: torch._scaled_mm(first, second, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _seconds(work: Callable[[], Any], warmup: int = 3, rounds: int = 10) -> float:
    return statistics.median([seconds_of(work) for _ in range(warmup + rounds)][warmup:])
