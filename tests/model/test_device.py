"""No system waits for a GPU beyond what Megatron's dispatcher does, or mixes tensors of both devices."""

from typing import Any

import torch

from more_megatron.model.depth import Depth
from more_megatron.systems import systems
from tests.helpers.imitated_gpu import ImitatedGPU
from tests.helpers.models import gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "moe_router_topk": 2}
_LENGTH = 16
# Time steps of an LSTM are as many as the longest segment has rows, which a GPU must say.
_ALLOWED = {"waits in cpu: segment_lstm.py, of"}


def test_no_system_waits_for_a_gpu_or_mixes_devices() -> None:
    (faults,) = run_ranks(1, faults_of_all_systems)
    assert faults.keys() == set(systems())
    assert {name: found for name, found in faults.items() if set(found) - _ALLOWED} == {}
    # What is allowed is seen: so is what is not.
    assert {fault for found in faults.values() for fault in found} == _ALLOWED


def faults_of_all_systems() -> dict[str, dict[str, int]]:
    """Return what a training step of each system does that it must not on a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from more_megatron.blocks import segment_attention

    start_ranks()
    move = moe_utils.maybe_move_tensor_to_cpu
    # Megatron's own, but for the stream, which a CPU has not.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: move(
        tensor, as_numpy
    )
    segment_attention._varlen_attention = _varlen_attention
    return {name: _faults(name) for name in systems()}


def _faults(system: str) -> dict[str, int]:
    gpu, generator = ImitatedGPU(), torch.Generator().manual_seed(0)
    model = gpt_model(small_config(system, **_SIZES, params_dtype=torch.bfloat16, bf16=True), _LENGTH).bfloat16()
    gpu.take(model)
    embeddings = torch.randn(_LENGTH, 2, _SIZES["hidden_size"], generator=generator).bfloat16()
    gpu.put(embeddings, True)
    with gpu.computing():
        logits(model.train(), embeddings, Depth(1, 2), (3, 8)).float().square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "experts" in name)
    return dict(gpu.faults)


def _varlen_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Any) -> torch.Tensor:
    """Return what the GPU's kernel would, which a CPU has not."""
    rows = torch.arange(len(query), device=query.device, dtype=segments.offsets.dtype)
    number = torch.searchsorted(segments.offsets[1:].contiguous(), rows, right=True)
    allowed = (number.unsqueeze(1) == number).tril()
    parts = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=allowed)[0].transpose(0, 1)
