"""Stage b: logits and gradients of a system against the CPU in float32, and the noise of initial states."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.work.tensors import gradients, sharded
from more_megatron.evaluation.runs import configure, fresh_model
from more_megatron.evaluation.step_benchmark import forward
from more_megatron.model.depth import Depth
from more_megatron.model.noise import state_noise

__all__ = ["compare", "compare_noise", "save_noise", "save_reference", "take_step"]

# Largest distance of logits and of any gradient, as a part of its norm.
_BARS = {"fp32": (1e-4, 1e-3), "bf16": (0.05, 0.3)}
# A gradient that is small beside the largest is compared on this part of its scale.
_SMALLEST = 1e-3
_NOISE_BAR = 1e-5
_DEPTH = Depth(1, 2)
_PATIENCE_SECONDS = 240.0


def save_reference(folder: str, flags: str) -> Finding:
    """Save a model, and the logits and gradients of a step.

    Args:
        folder: Where to.
        flags: Command line of the model.
    """
    try:
        _, model_config = configure(flags)
        model = fresh_model(model_config)
        redraw(model)
        Path(folder, "weights").mkdir(parents=True)
        dist_checkpointing.save(sharded(model), str(Path(folder, "weights")))
        _publish(take_step(model), Path(folder, "step.pt"))
    except BaseException:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "step.failed").touch()
        raise
    return Finding()


def compare(folder: str, flags: str, precision: str) -> Finding:
    """Load the model of a reference, take its step and compare.

    Args:
        folder: Of the reference.
        flags: Command line of the same model for this device, backend and precision.
        precision: Names the bars.
    """
    _, model_config = configure(flags)
    model = fresh_model(model_config)
    expected = _await(Path(folder, "step.pt"))
    model.load_state_dict(dist_checkpointing.load(sharded(model), str(Path(folder, "weights"))), strict=True)
    found = take_step(model)
    if set(found) != set(expected):
        return Finding(faults=[f"has other tensors than the CPU: {sorted(set(found) ^ set(expected))[:4]}"])
    return _judge(found, expected, precision)


def redraw(model: GPTModel) -> None:
    """Draw weights anew, so large that every part has its say in the output, and such that bf16 holds them exactly."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter.size(-1) ** 0.5)
            else:
                parameter.add_(0.1 * noise)
            parameter.copy_(parameter.bfloat16())


def take_step(model: GPTModel) -> dict[str, torch.Tensor]:
    """Return logits and gradients of one training step, in float32 on the CPU."""
    generator, device = torch.Generator().manual_seed(1), next(model.parameters()).device
    tokens = torch.randint(model.vocab_size, (2, model.max_sequence_length), generator=generator)
    logits = forward(model, tokens.to(device), None, _DEPTH, sample_ids=(3, 8))
    weights = torch.randn(logits.shape, generator=generator).to(device)
    (logits.float() * weights).sum().backward()
    found = {"logits": logits.detach(), **gradients(model)}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def _judge(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], precision: str) -> Finding:
    """Say how far tensors are from what is expected, and what is too far."""
    of_logits, of_gradients = _BARS[precision]
    largest = max(float(tensor.norm()) for name, tensor in expected.items() if name != "logits")
    distances = {}
    for name, tensor in expected.items():
        scale = float(tensor.norm()) if name == "logits" else max(float(tensor.norm()), _SMALLEST * largest)
        distance = float((found[name] - tensor).norm()) / scale
        distances[name] = math.inf if math.isnan(distance) else distance
    logits = distances.pop("logits")
    worst = max(distances, key=distances.__getitem__)
    finding = Finding({"logits": logits, "gradients": distances[worst], "worst": worst})
    finding.require(logits <= of_logits, f"logits are {logits:.1e} from the CPU's, more than {of_logits:.0e}")
    for name, distance in distances.items():
        finding.require(
            distance <= of_gradients, f"gradient of {name} is {distance:.1e} away, more than {of_gradients}"
        )
    return finding


def save_noise(folder: str) -> Finding:
    """Save the noise of the CPU."""
    _publish({"noise": _noise()}, Path(folder, "noise.pt"))
    return Finding()


def compare_noise(folder: str) -> Finding:
    """Compare initial states with those of the CPU: equal up to the rounding of logarithm, sine and cosine."""
    distance = float((_noise().cpu() - _await(Path(folder, "noise.pt"))["noise"]).abs().max())
    finding = Finding({"largest difference": distance})
    finding.require(distance <= _NOISE_BAR, f"noise is {distance:.1e} away, more than {_NOISE_BAR:.0e}")
    return finding


def _noise() -> torch.Tensor:
    device = torch.cuda.current_device()
    samples, positions = torch.arange(64).repeat_interleave(128), torch.arange(128).repeat(64)
    return state_noise(samples.to(device), positions.to(device), 64, seed=1234, layer=3, std=1.0)


def _publish(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a file that others wait for, whole or not at all."""
    unfinished = file.with_suffix(".unfinished")
    torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, unfinished)
    unfinished.rename(file)


def _await(file: Path) -> dict[str, torch.Tensor]:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not file.exists():
        if file.with_suffix(".failed").exists() or time.monotonic() > deadline:
            raise RuntimeError(f"the CPU did not do its part: {file.parent.name} has no {file.name}")
        time.sleep(0.05)
    return torch.load(file, map_location="cpu")
