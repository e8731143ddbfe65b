"""What is seen of one training step in N: sums on the device, added up over all ranks when the step is over.

While a step is watched, what is to be seen calls `current_watch` and adds to it; at all other times that is None and
nothing is computed or kept. What is added are sums and numbers, so that a figure is the mean over the global batch
under every layout, and nobody waits for a device before the step is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

__all__ = ["Key", "Watch", "current_watch", "sum_and_number", "watch_of_step", "watching"]


@dataclass(frozen=True, order=True)
class Key:
    """What a sum is of."""

    concern: str  # "recurrence", "routing", "gradient", "loss", "depth" or "system"
    name: str  # the figure
    place: str = ""  # where in the model: "layer 3", "layers 3-6"; empty for the whole model
    step: int = 0  # recurrence step, from 1; 0 where there is none

    @property
    def tag(self) -> str:
        """Its name at the writers, `health/` left out."""
        parts = (self.concern, self.place, self.name, f"step {self.step}" if self.step else "")
        return "/".join(part for part in parts if part)


@torch.no_grad()
def sum_and_number(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of values of any shape, and how many there are: float64, [2]."""
    values = values.detach().double()
    return torch.stack([values.sum(), values.new_full((), values.numel())])


class Watch:
    """Sums over what one training step computes."""

    def __init__(self) -> None:
        self._sums: dict[Key, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, key: Key, values: torch.Tensor) -> None:
        """Add values, of the same shape whenever the key is the same."""
        values = values.detach().double()
        self._sums[key] = self._sums[key] + values if key in self._sums else values

    def add_mean(self, key: Key, values: torch.Tensor, share: float = 1.0) -> None:
        """Add values of any shape to the mean of a figure; `share` is 1 over the number of ranks that add the same."""
        self.add(key, share * sum_and_number(values))

    def totals(self) -> dict[Key, np.ndarray]:
        """Return all sums over all ranks. Every rank calls it; waits for the device.

        Ranks of one pipeline stage have the same keys, other stages have others.
        """
        keys = sorted(self._sums)
        flat = torch.cat([self._sums[key].flatten() for key in keys])
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(flat, group=stage)
        parts = np.split(flat.cpu().numpy(), np.cumsum([self._sums[key].numel() for key in keys])[:-1])
        return _of_all_stages({key: part.reshape(self._sums[key].shape) for key, part in zip(keys, parts, strict=True)})


def _of_all_stages(totals: dict[Key, np.ndarray]) -> dict[Key, np.ndarray]:
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return totals
    stages: list[dict[Key, np.ndarray]] = [{}] * group.size()
    torch.distributed.all_gather_object(stages, totals, group=group)
    merged: dict[Key, np.ndarray] = {}
    for stage in stages:
        for key, values in stage.items():
            merged[key] = merged[key] + values if key in merged else values
    return merged


_current: Watch | None = None


def watch_of_step() -> Watch | None:
    """Return the watch of the step under way; None if it is not watched."""
    return _current


def current_watch() -> Watch | None:
    """Return the watch of the step under way; None if it is not watched, or if a forward pass is only recomputed."""
    # Recomputation takes place inside of a backward pass: what was seen is not seen a second time.
    return None if torch._C._current_graph_task_id() != -1 else _current


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Make `current_watch` return this watch inside the block."""
    global _current
    _current = watch
    try:
        yield
    finally:
        _current = None
