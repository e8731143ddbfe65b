"""Whether a recurrence is alive: how its states move, whether tokens stay apart, whether the state is read at all.

Lengths are root mean squares over channels, `|s| / sqrt(h)`, so that they do not depend on the width; figures of a step
are means over tokens. Sources: Huginn's monitors (Geiping et al., arXiv 2502.05171, section 4.3, `recpre/monitor.py`)
for length, change, distance to the input and correlation; the guide's section 5.2 for mean change, trend and share of
the last step; Parcae (arXiv 2604.12946) for the norms of the adapter's halves.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from more_megatron.monitoring.figures import record_figure
from more_megatron.monitoring.watch import Key, Watch, current_watch

REFINEMENT_FIGURES = ("refinement gate", "refinement size", "refinement consistency")

_CONCERN = "recurrence"
# Of a recurrence that injects its input in every step, and of one that starts from it.
TO_INPUT, _TO_START = "distance to input", "distance to start"
_EPS = 1e-12
# Squarings of the Gram matrix: 2^10 steps of the power iteration.
_SQUARINGS = 10


@dataclass(eq=False)
class States:
    """Sees the states of one recurrence in one forward pass, one after the other."""

    watch: Watch
    place: str  # where in the model the recurrence is
    steps: int  # r
    # What is injected in every step, of the shape of a state; None in a residual recurrence, whose state has the input
    inputs: torch.Tensor | None = None
    is_padding: torch.Tensor | None = None  # True for rows that belong to no token, [rows, 1]
    group: torch.distributed.ProcessGroup | None = None  # ranks that hold the same rows; None if no others do
    split: bool = False  # whether these ranks hold other channels of the rows

    def __post_init__(self) -> None:
        # Where there is padding the device is waited for, but once and not in every step.
        self._kept = None if self.is_padding is None else (~self.is_padding.flatten()).nonzero().flatten()
        ranks = 1 if self.group is None else self.group.size()
        self._share = 1.0 / ranks
        self._split = self.group if self.split and ranks > 1 else None
        self._count = 0
        self._former: torch.Tensor | None = None
        self._start: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, state: torch.Tensor) -> None:
        """See the initial state, and then the state after each step, [..., h]."""
        state = self._rows(state)
        if self._former is None:
            self._start = state
        else:
            self._count += 1
            self._see_step(state, state - self._former)
        self._former = state
        if self._count == self.steps:
            self._see_last(state)
            self._former = self._start = None

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().flatten(0, -2).float()
        return x if self._kept is None else x.index_select(0, self._kept)

    def _see_step(self, state: torch.Tensor, change: torch.Tensor) -> None:
        squares = self._over_channels(torch.stack([state.square().mean(1), change.square().mean(1)]))
        length, moved = squares.sqrt()
        self._add("state norm", length, self._count)
        self._add("change", moved, self._count)
        self._add("relative change", moved / length.clamp(min=_EPS), self._count)
        if self._count == self.steps:
            self.watch.add(self._key("last change"), self._share * squares.double().sum(1))

    def _see_last(self, state: torch.Tensor) -> None:
        entered = self._start if self.inputs is None else self._rows(self.inputs)
        assert entered is not None, "no initial state was seen"
        distance = self._over_channels((state - entered).square().mean(1)).sqrt()
        self._add(_TO_START if self.inputs is None else TO_INPUT, distance)
        self._add("steps", torch.full_like(distance, self.steps))
        self._see_directions(state)

    def _see_directions(self, state: torch.Tensor) -> None:
        """Add up unit vectors: their mean pairwise product is the square of their sum, but for each with itself.

        Behind the sum is their number.
        """
        centred = state - self._over_channels(state.mean(1)).unsqueeze(1)
        width = state.size(1) * (1 if self._split is None else self._split.size())
        length = self._over_channels(centred.square().mean(1)).mul(width).sqrt()
        total = (centred / length.clamp(min=_EPS).unsqueeze(1)).double().sum(0)
        if self._split is None:
            total = total * self._share
        else:
            rank, ranks = self._split.rank(), self._split.size()
            total = torch.nn.functional.pad(total, (rank * len(total), (ranks - 1 - rank) * len(total)))
        self.watch.add(self._key("directions"), torch.cat([total, total.new_full((1,), self._share * len(state))]))

    def _over_channels(self, means: torch.Tensor) -> torch.Tensor:
        """Return means over all channels, given those over this rank's."""
        if self._split is not None:
            torch.distributed.all_reduce(means, group=self._split)
            means = means / self._split.size()
        return means

    def _key(self, name: str, step: int = 0) -> Key:
        return Key(_CONCERN, name, self.place, step)

    def _add(self, name: str, values: torch.Tensor, step: int = 0) -> None:
        self.watch.add_mean(self._key(name, step), values, share=self._share)


def watch_states(place: str, steps: int, inputs: torch.Tensor | None = None, **layout: Any) -> States | None:
    """Return what sees the states of a recurrence that begins; None if nobody watches. Arguments as for `States`."""
    watch = current_watch()
    return None if watch is None else States(watch, place, steps, inputs, **layout)


class Refinement:
    """Watches the steps of one forward pass in which a gate decides how much of the new is taken.

    The figures are means over tokens and steps: of the gate; of the length of a change in parts of the length of the
    state; and of the cosine between a change and the one before it.
    """

    def __init__(self) -> None:
        self._gates: list[torch.Tensor] = []
        self._products: list[torch.Tensor] = []
        self._former: torch.Tensor | None = None

    @torch.no_grad()
    def add(self, before: torch.Tensor, after: torch.Tensor, gate: torch.Tensor) -> None:
        """Take note of a step: the state before and after it, or this rank's columns of them, [rows, n], and its gate.

        The gate, [rows, 1], says how much of the new was taken.
        """
        before = before.detach().float()
        change = after.detach().float() - before
        former = change if self._former is None else self._former
        pairs = ((before, before), (change, change), (change, former))
        self._products.append(torch.stack([torch.linalg.vecdot(*pair) for pair in pairs], dim=1))
        self._gates.append(gate.detach().flatten())
        self._former = change

    @torch.no_grad()
    def record(
        self, of_rows: Callable[[torch.Tensor], torch.Tensor], group: torch.distributed.ProcessGroup | None
    ) -> None:
        """Record the figures of what `of_rows` takes out of [rows, ...], given the ranks that hold the columns."""
        products = torch.stack(self._products, dim=1)
        if group is not None:
            torch.distributed.all_reduce(products, group=group)
        state, change, agreement = of_rows(products).unbind(-1)
        lengths = change.clamp(min=_EPS).sqrt()
        gates, sizes = of_rows(torch.stack(self._gates, dim=1)), lengths / state.clamp(min=_EPS).sqrt()
        cosines = agreement[:, 1:] / (lengths[:, 1:] * lengths[:, :-1])
        for name, values in zip(REFINEMENT_FIGURES, (gates, sizes, cosines), strict=True):
            record_figure(name, values)


@torch.no_grad()
def record_adapter(watch: Watch, place: str, halves: tuple[torch.Tensor, torch.Tensor], share: float) -> None:
    """Record the spectral norms of the two halves of adapters, of the state and of the input: means over adapters.

    Halves are [..., h, h] each; `share` is 1 over the number of ranks that hold the same ones.
    """
    for name, half in zip(("adapter state norm", "adapter input norm"), halves, strict=True):
        norms = _spectral_norms(half.detach().float().flatten(0, -3))
        watch.add_mean(Key(_CONCERN, name, place), norms, share=share)


def _spectral_norms(matrices: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value of each matrix, [n], given [n, h, h].

    By squaring the Gram matrix: products alone, which a GPU computes hundreds of times faster than a decomposition.
    """
    power = matrices.mT @ matrices
    for _ in range(_SQUARINGS):
        power = power / power.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        power = power @ power
    # The longest column points along the first singular vector.
    column = power.square().sum(dim=1).argmax(dim=1)
    vector = power[torch.arange(len(power), device=power.device), :, column].unsqueeze(2)
    vector = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp(min=1e-30)
    return torch.linalg.vector_norm(matrices @ vector, dim=(1, 2))


def recurrence_figures(means: dict[Key, float], sums: dict[Key, np.ndarray]) -> Iterator[tuple[Key, float]]:
    """Yield the figures of all recurrences that follow from means and sums over all ranks."""
    for place in sorted({key.place for key in sums if key.concern == _CONCERN}):
        yield from _of_place(place, means, sums)


def _of_place(place: str, means: dict[Key, float], sums: dict[Key, np.ndarray]) -> Iterator[tuple[Key, float]]:
    key = functools.partial(Key, _CONCERN, place=place)
    # The first step leaves the random state, however far that may be.
    changes = (key("change", step=step) for step in itertools.count(2))
    moved = [means[change] for change in itertools.takewhile(means.__contains__, changes)]
    if moved:
        yield key("second step"), means[key("relative change", step=2)]
        yield key("mean change"), float(np.mean(moved))
    if len(moved) > 1:
        yield key("change trend"), float(np.polyfit(np.arange(len(moved)), moved, 1)[0])
    former, last = sums[key("last change")]
    if former > 0:
        yield key("last step share"), float(np.sqrt(last / former))
    *total, count = sums[key("directions")]
    if count > 1:
        yield key("token correlation"), float((np.dot(total, total) - count) / (count * (count - 1)))
