"""Figures that systems report while they train: means over the global batch, the same under every layout.

A system names its figures (`System.figures`), so that all ranks know them, those too whose stage has none. Whoever
computes one calls `record_figure`; what is recorded stays on the device until the log is due, and is then summed up
over all ranks at once. A name with a slash, `router entropy/step 2`, is one of many: it goes to TensorBoard and
Weights & Biases only, all others also to the log line.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from more_megatron.monitoring.watch import Key, sum_and_number, watch_of_step


class Figures:
    """Sums of what was recorded since it was last cleared; names are the same on every rank."""

    def __init__(self, names: Iterable[str]) -> None:
        self._columns = {name: column for column, name in enumerate(names)}

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    @functools.cached_property
    def _sums(self) -> torch.Tensor:
        """Sum of the values of each figure, and how many there were, float64 [2, figures].

        Made when first used: only then a rank has chosen its device.
        """
        return torch.zeros(2, len(self._columns), dtype=torch.float64, device=torch.cuda.current_device())

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add values of this rank, of any shape, one of each token, row or whatever the mean is taken over.

        Does not wait for the device. Tensor-parallel ranks may hold parts of the sequence or all of it: either way the
        mean is the same.
        """
        assert name in self._columns, f"the system does not name the figure {name!r} among its figures"
        self._sums[:, self._columns[name]] += sum_and_number(values)

    def means(self) -> dict[str, float]:
        """Return the mean of each figure that was recorded, over all ranks. All ranks call it."""
        sums = self._sums.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        totals, numbers = sums.tolist()
        return {name: totals[index] / numbers[index] for name, index in self._columns.items() if numbers[index] > 0}

    def clear(self) -> None:
        """Forget what was recorded."""
        self._sums.zero_()


def write_scalars(values: Mapping[str, float], iteration: int, board: Any, wandb: Any) -> None:
    """Write values by name to TensorBoard and to Weights & Biases, to those of them that a rank has."""
    for name, value in values.items():
        if board:
            board.add_scalar(name, value, iteration)
        if wandb:
            wandb.log({name: value}, iteration)


_figures: Figures | None = None


def report_to(figures: Figures | None) -> None:
    """Make `record_figure` add to these figures from now on; None: to none."""
    global _figures
    _figures = figures


def is_reported(name: str) -> bool:
    """Return whether a run reports a figure; what is computed for it alone can be left out if not."""
    return _figures is not None and name in _figures


def record_figure(name: str, values: torch.Tensor, *, is_watched: bool = True) -> None:
    """Record values of a figure in a run that reports figures; arguments as for `Figures.add`.

    Called in training only, and once for each forward pass: not when it is recomputed. A step that is watched sees it,
    too, if `is_watched`.
    """
    if _figures is not None:
        _figures.add(name, values)
    watch = watch_of_step() if is_watched else None
    if watch is not None:
        watch.add_mean(Key("system", name), values)
