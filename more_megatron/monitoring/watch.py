"""What is seen of one training step in N: sums on the device, added up over all ranks when the step is over.

While a step is watched, what is to be seen calls `current_watch` and adds to it; at all other times that is None and
nothing is computed or kept. What is added are sums and numbers, so that a figure is the mean over the global batch
under every layout, and nobody waits for a device before the step is over.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state


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
    """What one training step computes: figures that are means, and sums from which others are made."""

    def __init__(self) -> None:
        self._sums: dict[Key, torch.Tensor] = {}
        self._means: dict[Key, torch.Tensor] = {}  # sum and number of each, [2]

    @torch.no_grad()
    def add(self, key: Key, values: torch.Tensor) -> None:
        """Add values to a sum, of the same shape whenever the key is the same."""
        self._sums[key] = self._sums.get(key, 0.0) + values.detach().double()

    def add_mean(self, key: Key, values: torch.Tensor, share: float = 1.0) -> None:
        """Add values of any shape to the mean of a figure; `share` is 1 over the number of ranks that add the same."""
        self._means[key] = self._means.get(key, 0.0) + share * sum_and_number(values)

    def totals(self) -> tuple[dict[Key, float], dict[Key, np.ndarray]]:
        """Return means and sums over all ranks. Every rank calls it; waits for the device."""
        means, sums = map(_over_ranks, (self._means, self._sums))
        return {key: float(total / number) for key, (total, number) in means.items() if number > 0}, sums


def _over_ranks(sums: dict[Key, torch.Tensor]) -> dict[Key, np.ndarray]:
    """Return sums over all ranks. Those of one pipeline stage have the same keys, other stages have others."""
    keys, of_stage = sorted(sums), {}
    if keys:
        flat = torch.cat([sums[key].flatten() for key in keys])
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(flat, group=stage)
        parts = flat.cpu().split([sums[key].numel() for key in keys])
        of_stage = {key: part.view(sums[key].shape).numpy() for key, part in zip(keys, parts, strict=True)}
    group = parallel_state.get_pipeline_model_parallel_group()
    stages: list[dict[Key, np.ndarray]] = [{}] * group.size()
    torch.distributed.all_gather_object(stages, of_stage, group=group)
    keys = sorted({*itertools.chain(*stages)})
    return {key: np.sum([stage[key] for stage in stages if key in stage], axis=0) for key in keys}


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
