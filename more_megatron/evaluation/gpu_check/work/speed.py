"""Stage e: how fast a training step is, at equal cost, and where its time goes."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.evaluation.gpu_check.outcomes import Finding
from more_megatron.evaluation.gpu_check.plan import Plan, command_line
from more_megatron.evaluation.gpu_check.work.environment import fp8_obstacle
from more_megatron.evaluation.matching import Described
from more_megatron.evaluation.step_benchmark import StepBenchmark, time_systems
from more_megatron.model.depth import Depth
from more_megatron.platform import Platform, initialize_platform
from more_megatron.systems import get_system

# Part of the memory that a step may fill.
_FILL = 0.85
_KERNELS = 10
_WAITS_SHOWN = 4


def save_target(plan: Plan) -> Finding:
    """Leave the cost a token that all systems are brought to: that of the most expensive one as it is."""
    costs = {system: _described(plan, system, "bf16").flops for system in plan.baseline_first}
    (plan.folder / "target.json").write_text(json.dumps(max(costs.values())))
    return Finding({f"GFLOP a token, {name}": cost / 1e9 for name, cost in costs.items()})


def measure(plan: Plan, system: str, precision: str) -> Finding:
    """Time forward and backward pass of a system in bf16 or fp8, without the optimizer, and leave the figures."""
    if precision == "fp8" and (obstacle := fp8_obstacle()):
        return Finding(skipped=obstacle)
    sizes = plan.sizes
    benchmark = _filled(plan, system, precision)
    (timing,) = time_systems({system: benchmark}, sizes.rounds, sizes.warmup)
    figures: dict[str, Any] = {
        "micro-batch": len(benchmark.tokens),
        "ms": 1e3 * timing.median_seconds,
        "tokens/s": timing.tokens_per_second,
        "TFLOP/s": timing.achieved_flops / 1e12,
        "GiB": timing.peak_bytes / 2**30,
    }
    _file(plan, system, precision).write_text(json.dumps(figures))
    figures |= _ratios(plan, system, precision)
    if precision == "bf16":
        figures |= _waits(benchmark)
        if get_system(system).recurrent:
            for steps in sizes.depths:
                figures[f"ms at r={steps}"] = 1e3 * min(benchmark.step(Depth(0, steps)) for _ in range(2))
            figures[f"ms at r={sizes.steps}"] = figures["ms"]
    return Finding(figures)


def _described(plan: Plan, system: str, precision: str) -> Described:
    recipe = next(iter(plan.recipes.values())) if precision == "fp8" else {}
    line = command_line(system, plan.sizes.speed, plan.best_backend, recipe, steps=plan.sizes.steps)
    return Described.by(line, Depth(0, plan.sizes.steps))


def _filled(plan: Plan, system: str, precision: str) -> StepBenchmark:
    """Return a benchmark at the common cost, with the largest micro-batch that fits."""
    described = _described(plan, system, precision).match(flops=_read(plan.folder / "target.json"))
    benchmark = StepBenchmark(described, 1)

    def peak(size: int) -> int:
        benchmark.fill(size)
        benchmark.step()
        return benchmark.memory()[0]

    one, two = peak(1), peak(2)
    micro_batch, each = plan.sizes.micro_batch, max(two - one, 1)
    while micro_batch > 1 and one + (micro_batch - 1) * each > _FILL * _device_memory():
        micro_batch //= 2
    benchmark.fill(micro_batch)
    benchmark.step()
    return benchmark


def _device_memory() -> float:
    if initialize_platform() is Platform.CPU:
        return float("inf")
    return float(torch.cuda.get_device_properties(0).total_memory)


def _ratios(plan: Plan, system: str, precision: str) -> dict[str, float]:
    """Hold a speed against the device's ceiling, the first system and bf16, as far as they are known."""
    own = _read(_file(plan, system, precision))["TFLOP/s"]
    known = {
        "of peak": _read(plan.folder / "ceilings.json").get(f"{precision} TFLOP/s"),
        "vs baseline": _read(_file(plan, plan.baseline_first[0], precision)).get("TFLOP/s"),
        "vs bf16": _read(_file(plan, system, "bf16")).get("TFLOP/s") if precision != "bf16" else None,
    }
    return {ratio: own / other for ratio, other in known.items() if other}


def _file(plan: Plan, system: str, precision: str) -> Path:
    return plan.folder / f"speed-{precision}-{system}.json"


def _read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else {}


def _waits(benchmark: StepBenchmark) -> dict[str, Any]:
    """Count how often the host waits for the device within a step, and say where most often."""
    if initialize_platform() is Platform.CPU:
        return {"waits": 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            benchmark.step()
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


def profile_slowest(plan: Plan) -> Finding:
    """List the most expensive kernels of the system that gets least out of the device, by what `measure` has left."""
    figures = {system: _read(_file(plan, system, "bf16")) for system in plan.baseline_first}
    measured = {system: float(known["TFLOP/s"]) for system, known in figures.items() if known}
    if not measured:
        raise MoREError("no system was measured: there is none to look into")
    slowest = min(measured, key=measured.__getitem__)
    benchmark = _filled(plan, slowest, "bf16")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if initialize_platform() is Platform.CUDA:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        benchmark.step()
    return Finding({"system": slowest, "kernels": _kernels(profile)})


def _kernels(profile: torch.profiler.profile) -> list[str]:
    events = profile.key_averages()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    time = (lambda e: e.self_device_time_total) if on_device else (lambda e: e.self_cpu_time_total)
    events = sorted(on_device or events, key=time, reverse=True)
    total = sum(map(time, events)) or 1.0
    return [f"{time(e) / 1e3:.2f} ms, {time(e) / total:.0%}, {e.count} x {e.key[:90]}" for e in events[:_KERNELS]]
