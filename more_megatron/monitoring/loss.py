"""Loss and gradient norm over the last steps: trend, variation, spikes, what the learning rate has to do with it.

And the loss at several depths: flat in r, it says that the state is ignored (arXiv 2502.05171, section 4.3).

Definitions after section 5.1 of the research guide, with a window of 1,000 steps. What the guide calls variance is the
spread of the smoothed loss; here it is taken around the line through it, so that a loss that falls is not called
unstable for falling.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from more_megatron.monitoring.watch import Key

_CONCERN, _DEPTH = "loss", "depth"
_WINDOW, _SMOOTHING = 1000, 100
# Losses before a spike that say how much is usual, and the last of them that say what is.
_USUAL, _FEWEST = 100, 10
_DEVIATIONS, _LEAST_RISE = 6.0, 1.0
_GRADIENT_SPIKE = 10.0

_by_depth: dict[int, float] = {}


class _Step(NamedTuple):
    iteration: int
    loss: Any  # a number, or a tensor as long as nobody has waited for it
    grad_norm: float | None
    learning_rate: float


class LossHistory:
    """The last steps of a run. Losses stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._steps: deque[_Step] = deque(maxlen=_WINDOW)
        self._pending: list[_Step] = []

    def add(self, iteration: int, loss: torch.Tensor, grad_norm: float | None, learning_rate: float) -> None:
        """Add a training step, without waiting for the device."""
        self._pending.append(_Step(iteration, loss.detach().reshape(()), grad_norm, learning_rate))

    def settle(self) -> list[str]:
        """Fetch the losses of the steps since the last call, and return a line for each that is far above those before.

        Waits for the device.
        """
        if not self._pending:
            return []
        losses = torch.stack([step.loss.float() for step in self._pending]).tolist()
        spikes = []
        for step, loss in zip(self._pending, losses, strict=True):
            if loss > (limit := self._limit()):
                spikes.append(
                    f"loss is {loss:.3g} at iteration {step.iteration}, healthy is at most {limit:.3g}: "
                    "a spike; look at the data of that step, lower --lr or --clip-grad"
                )
            self._steps.append(step._replace(loss=loss))
        self._pending.clear()
        return spikes

    def first_non_finite(self) -> int | None:
        """Return the first training step of the window whose loss or gradient norm is not finite; None if all are."""
        bad = (step for step in self._steps if not all(map(math.isfinite, (step.loss, step.grad_norm or 0.0))))
        return next((step.iteration for step in bad), None)

    def _limit(self) -> float:
        """Return the loss above which the next one is a spike: the median before it and six standard deviations.

        Deviations are those of the changes from step to step, which a loss that falls does not widen.
        """
        before = [step.loss for step in list(self._steps)[-_USUAL:] if math.isfinite(step.loss)]
        if len(before) < _FEWEST:
            return math.inf
        changes = np.diff(before)
        # Median absolute deviation of a difference of two losses, as a standard deviation of one.
        deviation = 1.4826 / math.sqrt(2.0) * float(np.median(np.abs(changes - np.median(changes))))
        return statistics.median(before[-_FEWEST:]) + max(_LEAST_RISE, _DEVIATIONS * deviation)

    def figures(self) -> Iterator[tuple[Key, float]]:
        """Yield the figures of the window."""
        if not self._steps:
            return
        losses = np.array([step.loss for step in self._steps])
        yield Key(_CONCERN, "loss"), float(losses[-1])
        norms = [step.grad_norm for step in self._steps if step.grad_norm is not None]
        if norms:
            yield Key("gradient", "norm"), norms[-1]
            yield Key("gradient", "mean norm"), float(np.mean(norms))
            usual = _GRADIENT_SPIKE * statistics.median(norms)
            yield Key("gradient", "spikes"), float(sum(norm > usual for norm in norms))
        if len(losses) > 2 * _SMOOTHING:
            smooth = np.convolve(losses, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="valid")
            steps = np.arange(len(smooth))
            slope, start = np.polyfit(steps, smooth, 1)
            yield Key(_CONCERN, "trend"), float(1000 * slope)
            # The bend of a loss at the beginning of a run is no unrest.
            if len(losses) == _WINDOW:
                yield Key(_CONCERN, "variation"), float(np.std(smooth - start - slope * steps))
        rates = np.array([step.learning_rate for step in self._steps])[:-1]
        changes = np.diff(losses)
        if len(changes) > 2 and rates.std() > 0 and changes.std() > 0:
            yield Key(_CONCERN, "learning rate correlation"), float(np.corrcoef(rates, changes)[0, 1])


def record_depth_losses(losses: Mapping[int, float]) -> None:
    """Take the losses of one validation, in nats, by recurrence steps r; the next report of health has them.

    Called after each validation at `--recurrence-eval-depths`, on ranks of the last pipeline stage.
    """
    _by_depth.clear()
    _by_depth.update(losses)


def depth_figures() -> Iterator[tuple[Key, float]]:
    """Yield the losses that were recorded since the last call; where all are finite, what the best depth gains over the
    smallest, and how far the losses lie apart, in parts of the largest.
    """
    for steps, loss in sorted(_by_depth.items()):
        yield Key(_DEPTH, "loss", step=steps), loss
    if len(_by_depth) > 1 and all(map(math.isfinite, _by_depth.values())):
        smallest, largest = min(_by_depth.values()), max(_by_depth.values())
        yield Key(_DEPTH, "gain"), _by_depth[min(_by_depth)] - smallest
        if largest > 0.0:
            yield Key(_DEPTH, "spread"), (largest - smallest) / largest
    _by_depth.clear()
