"""Flags of the MoRE group that say how a run trains and not what a model is: no checkpoint sets them."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["TrainingFlags"]


@dataclass
class TrainingFlags:
    """How a run trains, and how its health is watched."""

    loss_on_answers: bool = False
    """Count the loss of answers only, where a dataset has a mask of them; problems of a row do not see each other.
    Implies --calculate-per-token-loss."""

    seq_length_curriculum: str | None = None
    """Length of training rows by iteration, as in 0:128,10000:256; samples of --seq-length are cut into these."""

    health_interval: int = 100
    """Watch recurrence, routing, gradients and loss in every N-th step, and warn of what is not healthy. 0: never."""

    health_stop: Literal["none", "non-finite", "collapse", "any"] = "non-finite"
    """What ends a run: nothing; numbers that are not finite, of which nothing is saved; a collapse as well, or any
    warning, after a checkpoint was saved."""

    health_ranges: str | None = None
    """YAML file with ranges that replace those of docs/health.md: `routing/load cv: [0, 0.5]`, null for an open end."""
