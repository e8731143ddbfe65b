"""Times training steps of several systems at equal cost, in one process and in turn.

A machine's speed drifts, so systems are measured in rounds, each once a round, and compared within a round: what is
reported is the median of the ratios.
"""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from more_megatron.evaluation.matching import Described
from more_megatron.evaluation.runs import fresh_model
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepTiming:
    """What training steps of a system took."""

    name: str
    model: Described
    tokens: int  # of a step
    seconds: list[float]  # time of a step in each round
    peak_bytes: int  # most memory that the process (or the GPU) held during a step
    step_bytes: int  # by how much that was above what it held before

    @property
    def median_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second."""
        return self.tokens / self.median_seconds

    @property
    def achieved_flops(self) -> float:
        """Operations a second."""
        return self.model.flops * self.tokens_per_second

    def ratio_to(self, other: StepTiming) -> float:
        """Return the median of the operations a second over those of another system in the same round."""
        cost = self.model.flops * self.tokens / (other.model.flops * other.tokens)
        return statistics.median(cost * theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))


class StepBenchmark:
    """A model and a batch of random tokens."""

    def __init__(self, described: Described, batch_size: int) -> None:
        self.described = described
        self._model = fresh_model(described.config)
        self.fill(batch_size)

    def fill(self, batch_size: int) -> None:
        """Draw a batch of another size."""
        shape = (batch_size, self.described.args.seq_length)
        self.tokens = torch.randint(self.described.config.vocab_size, shape, device=torch.cuda.current_device())

    def step(self, depth: Depth | None = None) -> float:
        """Take one forward and backward pass, at its own depth or another, and return its seconds."""
        for parameter in self._model.parameters():
            parameter.grad = None
        # As Megatron's schedules do: the first pass of a step quantizes the weights for FP8.
        self._model.set_is_first_microbatch()
        samples = tuple(range(len(self.tokens)))

        def passes() -> None:
            losses = forward(self._model, self.tokens, self.tokens, depth or self.described.depth, samples)
            losses.float().mean().backward()

        return seconds_of(passes)

    def memory(self) -> tuple[int, int]:
        """Return the most bytes that are held during a step, and how many more those are than before."""
        reset_peak()
        before = peak_bytes()
        self.step()
        peak = peak_bytes()
        return peak, peak - before


def seconds_of(work: Callable[[], Any]) -> float:
    """Return what work takes until the device has done it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def forward(
    model: GPTModel,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    depth: Depth | None,
    sample_ids: tuple[int, ...] = (),
) -> torch.Tensor:
    """Return the loss of each token, [b, s], or without labels the logits, [b, s, vocabulary], of a whole model.

    Given are tokens and labels, [b, s], and the position of each sequence in the stream of samples; without a depth the
    steps are those of evaluation.
    """
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    extra = {} if depth is None else {"extra_block_kwargs": MicroBatch(depth, sample_ids).block_kwargs()}
    return model(tokens, positions, None, labels=labels, **extra)


def time_systems(benchmarks: Mapping[str, StepBenchmark], rounds: int, warmup: int) -> list[StepTiming]:
    """Time each system once a round, at its depth.

    At least one round warms up and does not count; a system's memory is measured in the last of these.
    """
    for _ in range(max(warmup, 1)):
        memory = {name: benchmark.memory() for name, benchmark in benchmarks.items()}
    times = [{name: benchmark.step() for name, benchmark in benchmarks.items()} for _ in range(rounds)]
    return [
        StepTiming(name, each.described, each.tokens.numel(), [seconds[name] for seconds in times], *memory[name])
        for name, each in benchmarks.items()
    ]


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
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0
