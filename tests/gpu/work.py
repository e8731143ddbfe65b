"""What tests on a GPU have done in a process of its own, on a CPU or on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from tests.blocks.backends.compare import model_of, sharded, step
from tests.helpers.models import EXPERTS, start_ranks

# Large enough for the kernels of a GPU. Every token goes to every expert: a rounding sends none elsewhere.
_FIELDS: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "moe_ffn_hidden_size": 64,
    "recurrence_ffn_hidden_size": 128,
    "moe_router_topk": EXPERTS,
}


def reference(folder: Path, variants: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Save a model of each system, and return logits and gradients of a step, in float32."""
    start_ranks()
    found = {}
    for variant in variants:
        model = model_of(variant, "local", **_FIELDS)
        (folder / variant).mkdir()
        dist_checkpointing.save(sharded(model), str(folder / variant))
        found[variant] = step(model)
    return found


def on_gpu(folder: Path, variants: list[str], backend: str, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """Return the same of the saved models on the GPU."""
    torch.distributed.init_process_group("nccl")
    start_ranks()
    half = {"bf16": True} if dtype == torch.bfloat16 else {}
    found = {}
    for variant in variants:
        model = model_of(variant, backend, **_FIELDS, params_dtype=dtype, **half).cuda()
        model.load_state_dict(dist_checkpointing.load(sharded(model), str(folder / variant)), strict=True)
        found[variant] = {name: tensor.float() for name, tensor in step(model).items()}
    return found
