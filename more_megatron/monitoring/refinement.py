"""Figures of a state that is refined in steps: how far each step moves it, and whether steps agree."""

from __future__ import annotations

from collections.abc import Callable

import torch

from more_megatron.monitoring.figures import is_reported, record_figure

__all__ = ["REFINEMENT_FIGURES", "Refinement"]

REFINEMENT_FIGURES = ("refinement gate", "refinement size", "refinement consistency")
_EPS = 1e-12


class Refinement:
    """Watches the steps of one forward pass.

    The figures are means over tokens and steps: of the gate; of the length of a change in parts of the length of the
    state; and of the cosine between a change and the one before it.
    """

    def __init__(self) -> None:
        self._gates: list[torch.Tensor] = []
        self._products: list[torch.Tensor] = []
        self._former: torch.Tensor | None = None

    @staticmethod
    def is_reported() -> bool:
        """Return whether a run reports these figures."""
        return is_reported(REFINEMENT_FIGURES[0])

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
        if not self._products:
            return
        products = torch.stack(self._products, dim=1)
        if group is not None:
            torch.distributed.all_reduce(products, group=group)
        state, change, agreement = of_rows(products).unbind(-1)
        lengths = change.clamp(min=_EPS).sqrt()
        gates, sizes = of_rows(torch.stack(self._gates, dim=1)), lengths / state.clamp(min=_EPS).sqrt()
        cosines = agreement[:, 1:] / (lengths[:, 1:] * lengths[:, :-1])
        for name, values in zip(REFINEMENT_FIGURES, (gates, sizes, cosines), strict=True):
            record_figure(name, values)
