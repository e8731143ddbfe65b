"""Stage b: logits and gradients of a system against the CPU in float32, and the noise of initial states."""

import math
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from more_megatron.evaluation.command_lines import Flags
from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.plan import EXACT, PRECISIONS, Plan, command_line, everywhere
from more_megatron.evaluation.gpu_check.work.tensors import gradients, sharded
from more_megatron.evaluation.runs import configure, fresh_model
from more_megatron.evaluation.step_benchmark import forward
from more_megatron.model.depth import Depth
from more_megatron.model.noise import state_noise

# Largest distance of logits and of any gradient, as a part of its norm.
_BARS = {"fp32": (1e-4, 1e-3), "bf16": (0.05, 0.3)}
# A gradient that is small beside the largest is compared on this part of its scale.
_SMALLEST = 1e-3
_NOISE_BAR = 1e-5
_DEPTH = Depth(1, 2)


def save_reference(plan: Plan, system: str, precision: str) -> Finding:
    """Save a model, and the logits and gradients of a step, for a comparison in a precision."""
    folder = _reference(plan, system, precision)
    model = _model(plan, system, precision, EXACT)
    redraw(model)
    (folder / "weights").mkdir(parents=True)
    dist_checkpointing.save(sharded(model), str(folder / "weights"))
    torch.save(take_step(model), folder / "step.pt")
    return Finding()


def compare(plan: Plan, system: str, precision: str, backend: str) -> Finding:
    """Load the model of a reference on this device, under a backend and in a precision, take its step and compare."""
    folder = _reference(plan, system, precision)
    expected = _by_the_cpu(folder / "step.pt")
    model = _model(plan, system, precision, plan.backends[backend] | PRECISIONS[precision])
    model.load_state_dict(dist_checkpointing.load(sharded(model), str(folder / "weights")), strict=True)
    found = take_step(model)
    if set(found) != set(expected):
        return Finding(faults=[f"has other tensors than the CPU: {sorted(set(found) ^ set(expected))[:4]}"])
    return _judge(found, expected, precision)


def _reference(plan: Plan, system: str, precision: str) -> Path:
    return plan.folder / f"reference-{precision}-{system}"


def _model(plan: Plan, system: str, precision: str, flags: Flags) -> GPTModel:
    # A rounding in bf16 could send a token elsewhere.
    routing = everywhere(system) if precision == "bf16" else {}
    _, model_config = configure(command_line(system, plan.sizes.parity, routing, flags, steps=3, backprop_steps=2))
    return fresh_model(model_config)


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


def save_noise(plan: Plan) -> Finding:
    """Save the noise of the CPU."""
    torch.save({"noise": _noise()}, plan.folder / "noise.pt")
    return Finding()


def compare_noise(plan: Plan) -> Finding:
    """Compare initial states with those of the CPU: equal up to the rounding of logarithm, sine and cosine."""
    distance = float((_noise().cpu() - _by_the_cpu(plan.folder / "noise.pt")["noise"]).abs().max())
    finding = Finding({"largest difference": distance})
    finding.require(distance <= _NOISE_BAR, f"noise is {distance:.1e} away, more than {_NOISE_BAR:.0e}")
    return finding


def _noise() -> torch.Tensor:
    device = torch.cuda.current_device()
    samples, positions = torch.arange(64).repeat_interleave(128), torch.arange(128).repeat(64)
    return state_noise(samples.to(device), positions.to(device), 64, seed=1234, layer=3, std=1.0)


def _by_the_cpu(file: Path) -> dict[str, torch.Tensor]:
    if not file.exists():
        raise RuntimeError(f"the CPU did not do its part: {file.parent.name} has no {file.name}")
    return torch.load(file)
