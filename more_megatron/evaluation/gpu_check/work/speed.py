"""Stage e: how fast a training step is, at equal cost, and where its time goes."""

from __future__ import annotations

import json
import statistics
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from megatron.training.models.gpt import GPTModelConfig

from more_megatron.errors import MoREError
from more_megatron.evaluation.comparison.matching import Goal, match, system_cost
from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.plan import Sizes
from more_megatron.evaluation.runs import configure, sole_rank
from more_megatron.evaluation.step_benchmark import (
    StepBenchmark,
    peak_bytes,
    reset_peak,
)
from more_megatron.model.depth import Depth
from more_megatron.platform import Platform, initialize_platform
from more_megatron.systems import get_system

__all__ = ["measure", "profile_slowest", "save_target"]

# Part of the memory that a step may fill.
_FILL = 0.85
_KERNELS = 10
_WAITS_SHOWN = 4


def save_target(lines: dict[str, str], folder: str, sizes: Sizes) -> Finding:
    """Find the cost a token that all systems are brought to: that of the most expensive one as it is.

    Args:
        lines: Command line of each system.
        folder: Where the figure is left.
        sizes: Of this stage.
    """
    costs = {}
    for name, line in lines.items():
        args, model_config = configure(line)
        cost = system_cost(model_config, args.seq_length)
        costs[name] = cost.training_flops(0, sizes.steps)
    Path(folder, "target.json").write_text(json.dumps(max(costs.values())))
    return Finding({f"GFLOP a token, {name}": cost / 1e9 for name, cost in costs.items()})


def measure(name: str, precision: str, line: str, baseline: str, folder: str, sizes: Sizes) -> Finding:
    """Time forward and backward pass of a system, without the optimizer.

    Args:
        name: Name of the system.
        precision: `bf16` or `fp8`.
        line: Command line.
        baseline: Name of the system that others are compared with; measured first.
        folder: Where `save_target` has been; the figures are left there.
        sizes: Of this stage.
    """
    model_config, seq_length = _matched(line, folder, sizes)
    depth = Depth(0, sizes.steps)
    benchmark, micro_batch, peak = _filled(model_config, seq_length, depth, sizes)
    for _ in range(sizes.warmup):
        benchmark.step(depth)
    seconds = statistics.median(benchmark.step(depth) for _ in range(sizes.rounds))
    tokens = micro_batch * seq_length
    figures: dict[str, Any] = {
        "micro-batch": micro_batch,
        "ms": 1e3 * seconds,
        "tokens/s": tokens / seconds,
        "TFLOP/s": benchmark.cost.training_flops(0, sizes.steps) * tokens / seconds / 1e12,
        "GiB": peak / 2**30,
    }
    Path(folder, f"speed-{precision}-{name}.json").write_text(json.dumps(figures))
    figures |= _ratios(name, precision, baseline, Path(folder))
    if precision == "bf16":
        figures |= _waits(benchmark, depth)
        if get_system(name).recurrent:
            figures |= {f"ms at r={r}": 1e3 * _seconds(benchmark, Depth(0, r)) for r in sizes.depths}
            figures[f"ms at r={sizes.steps}"] = figures["ms"]
    return Finding(figures)


def _matched(line: str, folder: str, sizes: Sizes) -> tuple[GPTModelConfig, int]:
    """Return the model whose experts are as wide as the common cost allows, and the length of its sequences."""
    args, model_config = configure(line)
    target = json.loads(Path(folder, "target.json").read_text())
    depth = Depth(0, sizes.steps)
    return match(model_config, Goal(flops=target), depth, args.seq_length), args.seq_length


def _filled(
    model_config: GPTModelConfig, seq_length: int, depth: Depth, sizes: Sizes
) -> tuple[StepBenchmark, int, int]:
    """Return a benchmark whose micro-batch is as large as fits, its size, and the most memory a step takes."""
    sole_rank()
    benchmark = StepBenchmark(model_config, seq_length, 1)
    one, two = (_peak(benchmark, size, depth) for size in (1, 2))
    micro_batch, each = sizes.micro_batch, max(two - one, 1)
    while micro_batch > 1 and one + (micro_batch - 1) * each > _FILL * _memory():
        micro_batch //= 2
    return benchmark, micro_batch, _peak(benchmark, micro_batch, depth)


def _peak(benchmark: StepBenchmark, size: int, depth: Depth) -> int:
    benchmark.fill(size)
    benchmark.step(depth)
    reset_peak()
    benchmark.step(depth)
    return peak_bytes()


def _memory() -> float:
    if initialize_platform() is Platform.CPU:
        return float("inf")
    return float(torch.cuda.get_device_properties(0).total_memory)


def _seconds(benchmark: StepBenchmark, depth: Depth, rounds: int = 2) -> float:
    return min(benchmark.step(depth) for _ in range(rounds))


def _ratios(name: str, precision: str, baseline: str, folder: Path) -> dict[str, float]:
    """Hold a speed against the device's ceiling, the baseline and bf16, as far as they are known."""
    own = _read(folder / f"speed-{precision}-{name}.json")["TFLOP/s"]
    known = {
        "of peak": _read(folder / "ceilings.json").get(f"{precision} TFLOP/s"),
        "vs baseline": _read(folder / f"speed-{precision}-{baseline}.json").get("TFLOP/s"),
        "vs bf16": _read(folder / f"speed-bf16-{name}.json").get("TFLOP/s") if precision != "bf16" else None,
    }
    return {ratio: own / other for ratio, other in known.items() if other}


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _waits(benchmark: StepBenchmark, depth: Depth) -> dict[str, Any]:
    """Count how often the host waits for the device within a step, and say where most often."""
    if initialize_platform() is Platform.CPU:
        return {"waits": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            benchmark.step(depth)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        # Not those of the clock.
        if "synchroniz" in str(warning.message) and not warning.filename.endswith("cuda/__init__.py")
    )
    most = ", ".join(f"{place} x {count}" for place, count in places.most_common(_WAITS_SHOWN))
    return {"waits": sum(places.values()), "waits at": most}


def profile_slowest(lines: dict[str, str], folder: str, sizes: Sizes) -> Finding:
    """List the most expensive kernels of the system that gets least out of the device.

    Args:
        lines: Command line of each system.
        folder: Where `measure` has left its figures.
        sizes: Of this stage.
    """
    figures = {name: _read(Path(folder, f"speed-bf16-{name}.json")) for name in lines}
    measured = {name: float(known["TFLOP/s"]) for name, known in figures.items() if known}
    if not measured:
        raise MoREError("no system was measured: there is none to look into")
    slowest = min(measured, key=measured.__getitem__)
    model_config, seq_length = _matched(lines[slowest], folder, sizes)
    depth = Depth(0, sizes.steps)
    benchmark, _, _ = _filled(model_config, seq_length, depth, sizes)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if initialize_platform() is Platform.CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        benchmark.step(depth)
    return Finding({"system": slowest, "kernels": _kernels(profile)})


def _kernels(profile: torch.profiler.profile) -> list[str]:
    events = profile.key_averages()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    time = (lambda e: e.self_device_time_total) if on_device else (lambda e: e.self_cpu_time_total)
    events = sorted(on_device or events, key=time, reverse=True)
    total = sum(map(time, events)) or 1.0
    return [f"{time(e) / 1e3:.2f} ms, {time(e) / total:.0%}, {e.count} x {e.key[:90]}" for e in events[:_KERNELS]]
