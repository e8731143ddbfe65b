"""The loss at several depths. Flat in r, it says that the state is ignored (arXiv 2502.05171, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from more_megatron.monitoring.watch import Key

__all__ = ["depth_figures", "record_depth_losses"]

_CONCERN = "depth"
_losses: dict[int, float] = {}


def record_depth_losses(losses: Mapping[int, float]) -> None:
    """Take the losses of one validation, in nats, by recurrence steps r; the next report of health has them."""
    _losses.clear()
    _losses.update(losses)


def depth_figures() -> Iterator[tuple[Key, float]]:
    """Yield the losses that were recorded since the last call; where all are finite, what the best depth gains over the
    smallest, and how far the losses lie apart, in parts of the largest.
    """
    for steps, loss in sorted(_losses.items()):
        yield Key(_CONCERN, "loss", step=steps), loss
    if len(_losses) > 1 and all(map(math.isfinite, _losses.values())):
        smallest, largest = min(_losses.values()), max(_losses.values())
        yield Key(_CONCERN, "gain"), _losses[min(_losses)] - smallest
        if largest > 0.0:
            yield Key(_CONCERN, "spread"), (largest - smallest) / largest
    _losses.clear()
