"""How many recurrence steps a training step takes, and how many of them carry gradient."""

import math
from dataclasses import dataclass

import numpy as np

from more_megatron.config import MoREConfig

# Spread of the logarithm of the Poisson rate, Huginn's (arXiv 2502.05171, section 3.3).
_LOG_RATE_STD = 0.5


@dataclass(frozen=True)
class Depth:
    """Recurrence steps of one micro-batch."""

    no_grad_steps: int  # steps n taken first, without gradient
    grad_steps: int  # steps b taken then, with gradient

    @property
    def steps(self) -> int:
        """All steps r = n + b."""
        return self.no_grad_steps + self.grad_steps


class DepthSampler:
    """Draws the depth of each training step or micro-batch.

    The draw is a function of the seed and of where training stands, nothing else: every rank, every pipeline stage,
    a recomputation and a resumed run get the same depth.
    """

    def __init__(self, config: MoREConfig) -> None:
        self._config = config
        self._curriculum = config.curriculum

    def draw(self, step: int, micro_batch: int = 0) -> Depth:
        """Return the depth of a micro-batch in training.

        Args:
            step: Training steps taken before this one.
            micro_batch: Index of the micro-batch within the step. Without effect if one depth is drawn for a step.
        """
        per_micro_batch = self._config.recurrence_sampling_unit == "micro-batch"
        # A counter-based generator: independent draws for every (seed, step, micro-batch) without any state.
        counter = [0, 0, micro_batch if per_micro_batch else 0, step]
        generator = np.random.Generator(np.random.Philox(key=self._config.seed, counter=counter))
        mean = self._config.mean_steps if self._curriculum is None else self._curriculum.at(step)
        return self._divided(self._draw_steps(mean, generator))

    def means(self, step: int, micro_batches: int) -> tuple[float, float]:
        """Return the steps without and with gradient of a training step, averaged over its micro-batches."""
        count = 1 if self._config.recurrence_sampling_unit == "step" else micro_batches
        depths = [self.draw(step, index) for index in range(count)]
        return sum(depth.no_grad_steps for depth in depths) / count, sum(depth.grad_steps for depth in depths) / count

    def evaluation(self, steps: int | None = None) -> Depth:
        """Return the depth in evaluation, by default that of the configuration: no step carries gradient."""
        return Depth(no_grad_steps=steps or self._config.evaluation_steps, grad_steps=0)

    def expected(self) -> Depth:
        """Return the depth at the mean number of steps, which a typical training step has in the end."""
        return self._divided(self._config.mean_steps)

    def _divided(self, steps: int) -> Depth:
        grad_steps = min(self._config.recurrence_backprop_steps or steps, steps)
        return Depth(no_grad_steps=steps - grad_steps, grad_steps=grad_steps)

    def _draw_steps(self, mean: int, generator: np.random.Generator) -> int:
        low, high = self._config.step_range(mean)
        match self._config.recurrence_sampling:
            case "fixed":
                return mean
            case "uniform":
                return int(generator.integers(low, high + 1))
            case _:
                return min(max(_poisson_lognormal(mean, generator), low), high)


def _poisson_lognormal(mean: int, generator: np.random.Generator) -> int:
    """Draw 1 + Poisson(rate) with a log-normal rate of the given mean: Huginn's `poisson-lognormal-filling`."""
    rate = generator.lognormal(math.log(mean) - _LOG_RATE_STD**2 / 2, _LOG_RATE_STD)
    return 1 + int(generator.poisson(rate))
