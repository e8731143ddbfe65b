"""Times training steps of several systems at equal cost, in one process and in turn.

A machine's speed drifts, so systems are measured in rounds, each once a round, and compared within a round: what is
reported is the median of the ratios.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelConfig

from more_megatron.config import MoREConfig
from more_megatron.evaluation.comparison.matching import system_cost
from more_megatron.model.costs import Cost
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch

__all__ = [
    "StepBenchmark",
    "SystemTiming",
    "forward",
    "peak_bytes",
    "reset_peak",
    "step_time_by_depth",
    "time_systems",
]


@dataclass(frozen=True)
class SystemTiming:
    """What a system took.

    Attributes:
        name: Name of the system.
        cost: Cost of the model.
        flops_per_token: Operations a token of a training step.
        seconds: Time of a step in each round.
        peak_bytes: Most memory that the process (or the GPU) held during a step.
        step_bytes: By how much that was above what it held before.
    """

    name: str
    cost: Cost
    flops_per_token: float
    seconds: list[float]
    peak_bytes: int
    step_bytes: int

    def achieved_flops(self, tokens: int) -> list[float]:
        """Return operations a second in each round, for steps of `tokens` tokens."""
        return [self.flops_per_token * tokens / seconds for seconds in self.seconds]


class StepBenchmark:
    """A model of one system and a batch of random tokens.

    Args:
        model_config: Megatron's model configuration with a `MoREConfig`.
        seq_length: Length of a sequence.
        batch_size: Sequences a step.
    """

    def __init__(self, model_config: GPTModelConfig, seq_length: int, batch_size: int) -> None:
        self.config: MoREConfig = model_config.transformer
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self._model: GPTModel = model_config.get_builder_cls()(model_config).build_model(groups)
        device = torch.cuda.current_device()
        self._model = self._model.cuda(device).to(self.config.params_dtype).train()
        self._vocab_size, self._seq_length = model_config.vocab_size, seq_length
        self.fill(batch_size)
        self.cost = system_cost(model_config, seq_length)

    def fill(self, batch_size: int) -> None:
        """Draw a batch of another size."""
        shape = (batch_size, self._seq_length)
        self._tokens = torch.randint(self._vocab_size, shape, device=torch.cuda.current_device())

    def step(self, depth: Depth) -> float:
        """Take one forward and backward pass and return its seconds."""
        for parameter in self._model.parameters():
            parameter.grad = None
        # As Megatron's schedules do: the first pass of a step quantizes the weights for FP8.
        self._model.set_is_first_microbatch()
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses = forward(self._model, self._tokens, self._tokens, depth, tuple(range(len(self._tokens))))
        losses.float().mean().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def forward(
    model: GPTModel,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    depth: Depth | None,
    sample_ids: tuple[int, ...] = (),
) -> torch.Tensor:
    """Return the loss of each token, [b, s], or without labels the logits, [b, s, vocabulary].

    Args:
        model: Whole model.
        tokens: [b, s].
        labels: [b, s] or None.
        depth: Recurrence steps; None: those of evaluation.
        sample_ids: Position of each sequence in the stream of samples.
    """
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    extra = {} if depth is None else {"extra_block_kwargs": MicroBatch(depth, sample_ids).block_kwargs()}
    return model(tokens, positions, None, labels=labels, **extra)


def time_systems(
    benchmarks: Mapping[str, StepBenchmark], depths: Mapping[str, Depth], rounds: int, warmup: int
) -> list[SystemTiming]:
    """Time each system once a round; its memory is that of the last round before those that are timed.

    Args:
        benchmarks: Systems by name.
        depths: Recurrence steps of each; those without recurrence leave them be.
        rounds: Rounds that count.
        warmup: Rounds before them that do not. There is one at least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in benchmarks}
    peaks, rises = dict.fromkeys(benchmarks, 0), dict.fromkeys(benchmarks, 0)
    for _ in range(max(warmup, 1)):
        for name, benchmark in benchmarks.items():
            reset_peak()
            before = peak_bytes()
            benchmark.step(depths[name])
            peaks[name] = peak_bytes()
            rises[name] = peaks[name] - before
    for _ in range(rounds):
        for name, benchmark in benchmarks.items():
            seconds[name].append(benchmark.step(depths[name]))
    return [
        SystemTiming(
            name,
            benchmark.cost,
            benchmark.cost.training_flops(depths[name].no_grad_steps, depths[name].grad_steps),
            seconds[name],
            peaks[name],
            rises[name],
        )
        for name, benchmark in benchmarks.items()
    ]


def step_time_by_depth(benchmark: StepBenchmark, steps: list[int], rounds: int) -> dict[int, float]:
    """Return the median seconds of a training step for each number of recurrence steps, all with gradient."""
    for count in steps:
        benchmark.step(Depth(0, count))
    seconds: dict[int, list[float]] = {count: [] for count in steps}
    for _ in range(rounds):
        for count in steps:
            seconds[count].append(benchmark.step(Depth(0, count)))
    return {count: statistics.median(times) for count, times in seconds.items()}


def reset_peak() -> None:
    """Begin to measure the most memory that the process (or the GPU) holds."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (clear := Path("/proc/self/clear_refs")).exists():
        # What was freed and is kept for the next allocation would hide that allocation.
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")


def peak_bytes() -> int:
    """Return the most memory held since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
