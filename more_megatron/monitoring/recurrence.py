"""Whether a recurrence is alive: how its states move, whether tokens stay apart, whether the state is read at all.

Lengths are root mean squares over channels, `|s| / sqrt(h)`, so that they do not depend on the width; figures of a step
are means over tokens. Sources: Huginn's monitors (Geiping et al., arXiv 2502.05171, section 4.3, `recpre/monitor.py`)
for length, change, distance to the input and correlation; the guide's section 5.2 for mean change, trend and share of
the last step; Parcae (arXiv 2604.12946) for the norms of the adapter's halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from more_megatron.monitoring.watch import Key, Watch, current_watch

__all__ = ["TO_INPUT", "States", "record_adapter", "recurrence_figures", "watch_states"]

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
        """Add up unit vectors: their mean pairwise product is the square of their sum, but for each with itself."""
        centred = state - self._over_channels(state.mean(1)).unsqueeze(1)
        width = state.size(1) * (1 if self._split is None else self._split.size())
        length = self._over_channels(centred.square().mean(1)).mul(width).sqrt()
        total = (centred / length.clamp(min=_EPS).unsqueeze(1)).double().sum(0)
        if self._split is None:
            total = total * self._share
        else:
            rank, ranks = self._split.rank(), self._split.size()
            total = torch.nn.functional.pad(total, (rank * len(total), (ranks - 1 - rank) * len(total)))
        self.watch.add(self._key("directions"), total)
        self.watch.add(self._key("tokens"), self._share * torch.full((1,), len(state), device=state.device))

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


def recurrence_figures(totals: dict[Key, np.ndarray]) -> Iterator[tuple[Key, float]]:
    """Yield the figures of all recurrences, given the sums over all ranks."""
    by_place: dict[str, dict[Key, np.ndarray]] = {}
    for key, sums in totals.items():
        if key.concern == _CONCERN:
            by_place.setdefault(key.place, {})[key] = sums
    for place, of_place in by_place.items():
        yield from _of_place(place, of_place)


def _of_place(place: str, sums: dict[Key, np.ndarray]) -> Iterator[tuple[Key, float]]:
    special = ("last change", "directions", "tokens")
    means = {key: float(total[0] / total[1]) for key, total in sums.items() if key.name not in special and total[1] > 0}
    yield from means.items()
    moved = [means[key] for key in sorted(means, key=lambda key: key.step) if key.name == "change" and key.step > 1]
    if moved:
        # The first step leaves the random state, however far that may be.
        yield Key(_CONCERN, "second step", place), means[Key(_CONCERN, "relative change", place, 2)]
        yield Key(_CONCERN, "mean change", place), float(np.mean(moved))
    if len(moved) > 1:
        yield Key(_CONCERN, "change trend", place), float(np.polyfit(np.arange(len(moved)), moved, 1)[0])
    last = sums.get(Key(_CONCERN, "last change", place))
    if last is not None and last[0] > 0:
        yield Key(_CONCERN, "last step share", place), float(np.sqrt(last[1] / last[0]))
    tokens = sums.get(Key(_CONCERN, "tokens", place))
    if tokens is not None and tokens[0] > 1:
        count, total = float(tokens[0]), sums[Key(_CONCERN, "directions", place)]
        yield Key(_CONCERN, "token correlation", place), float((total @ total - count) / (count * (count - 1)))
