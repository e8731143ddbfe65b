"""How many recurrence steps a training step takes, and how many of them carry gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from more_megatron.config import MoREConfig

__all__ = ["Depth", "DepthSampler"]


@dataclass(frozen=True)
class Depth:
    """Recurrence steps of one micro-batch.

    Attributes:
        no_grad_steps: Steps n taken first, without gradient.
        grad_steps: Steps b taken then, with gradient.
    """

    no_grad_steps: int
    grad_steps: int

    @property
    def steps(self) -> int:
        """All steps r = n + b."""
        return self.no_grad_steps + self.grad_steps


class DepthSampler:
    """Draws the depth of each training step or micro-batch.

    The draw is a function of the seed and of where training stands, nothing else: every rank, every pipeline stage,
    a recomputation and a resumed run get the same depth.

    Args:
        config: Model configuration with completed recurrence fields.
        seed: Seed of the run.
    """

    def __init__(self, config: MoREConfig, seed: int) -> None:
        self._sampling = config.recurrence_sampling
        self._per_micro_batch = config.recurrence_sampling_unit == "micro-batch"
        self._mean_steps = config.recurrence_steps
        self._range = (config.recurrence_min_steps, config.recurrence_max_steps)
        self._backprop_steps = config.recurrence_backprop_steps
        self._eval_steps = config.recurrence_eval_steps
        self._seed = seed

    def draw(self, step: int, micro_batch: int = 0) -> Depth:
        """Return the depth of a micro-batch in training.

        Args:
            step: Training steps taken before this one.
            micro_batch: Index of the micro-batch within the step. Without effect if one depth is drawn for a step.
        """
        steps = self._draw_steps(step, micro_batch if self._per_micro_batch else 0)
        grad_steps = min(self._backprop_steps, steps)
        return Depth(no_grad_steps=steps - grad_steps, grad_steps=grad_steps)

    def evaluation(self) -> Depth:
        """Return the depth in evaluation: fixed, and no step carries gradient."""
        return Depth(no_grad_steps=self._eval_steps, grad_steps=0)

    def _draw_steps(self, step: int, micro_batch: int) -> int:
        if self._sampling == "fixed":
            return self._mean_steps
        low, high = self._range
        return int(self._generator(step, micro_batch).integers(low, high + 1))

    def _generator(self, step: int, micro_batch: int) -> np.random.Generator:
        # A counter-based generator: independent draws for every (seed, step, micro-batch) without any state.
        return np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, micro_batch, step]))
