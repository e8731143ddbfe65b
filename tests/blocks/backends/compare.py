"""The same model on one backend and another: weights carried over, outputs and gradients compared."""

import tempfile
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
)
from megatron.core.models.gpt import GPTModel

from more_megatron.evaluation.gpu_check.work.tensors import gradients, sharded
from more_megatron.hf.exported.system import find_system
from more_megatron.model.depth import Depth
from tests.helpers.models import gpt_model, logits, small_config

LENGTH, BATCH, LAYERS = 8, 2, 2
DEPTH = Depth(1, 2)
SAMPLES = (3, 8)


def model_of(variant: str, backend: str, **fields: Any) -> GPTModel:
    """Return a small model whose weights are the same on every call, on one of the two backends."""
    fields = {"num_layers": LAYERS, "moe_router_topk": 2, "num_query_groups": 2, "recurrence_state_std": 0.5} | fields
    if "num_key_value_heads" in find_system(variant).fixed:
        del fields["num_query_groups"]
    if backend == "transformer_engine":
        fields["moe_grouped_gemm"] = True
    if variant == "shared_block":
        fields["projection_orthogonality_coeff"] = 0.3
    return gpt_model(small_config(variant, transformer_impl=backend, **fields), LENGTH, weight_std=0.2).train()


def contents(model: GPTModel) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return key and global shape of each tensor of a checkpoint, and the keys of what else it holds."""
    state = sharded(model)
    apply_factories(state)
    values = list(nested_values(state))
    tensors = {value.key: tuple(value.global_shape) for value in values if isinstance(value, ShardedTensor)}
    return tensors, {value.key for value in values if isinstance(value, ShardedObject)}


def step(model: GPTModel, depth: Depth = DEPTH, starts: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return logits and gradients of a training step, on the CPU."""
    generator, device = torch.Generator().manual_seed(1), next(model.parameters()).device
    embeddings = torch.randn(LENGTH, BATCH, model.config.hidden_size, generator=generator)
    embeddings = embeddings.to(device=device, dtype=model.config.params_dtype).requires_grad_()
    output = logits(model, embeddings, depth, SAMPLES, starts)
    (output * torch.randn(output.shape, generator=generator).to(device)).sum().backward()
    found = {"logits": output.detach(), "embeddings": embeddings.grad, **gradients(model)}
    return {name: tensor.cpu() for name, tensor in found.items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of all tensors, relative to the largest entry of each."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    sizes = {name: max(float(other.abs().amax()), 1.0) for name, other in theirs.items() if other.numel() > 0}
    return max((float((ours[name] - theirs[name]).abs().max()) / size for name, size in sizes.items()), default=0.0)


def carry_over(source: GPTModel, target: GPTModel) -> None:
    """Save the one, load it into the other."""
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(sharded(source), folder)
        # Every weight must come from the checkpoint.
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.fill_(torch.nan)
        target.load_state_dict(dist_checkpointing.load(sharded(target), folder), strict=True)
