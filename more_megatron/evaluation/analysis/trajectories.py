"""How the states of a recurrence move: where they go, how fast, and whether where they began matters.

Kinds of movement are those that Huginn's authors saw (arXiv 2502.05171, section 7): states that converge, orbit or
slide. Here a rule names them, for each token, from the second half of its trajectory:

- converging: a step of the last quarter is shorter than half a step of the second quarter, or than a thousandth of the
  state;
- sliding: otherwise, if the second half leads at least half as far as its steps are long together;
- orbiting: otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

KINDS = ("converging", "orbiting", "sliding")
_FEWEST_STEPS = 8
_STILL, _SLOWER, _STRAIGHT = 1e-3, 0.5, 0.5
_EPS = 1e-12


@dataclass(frozen=True)
class Trajectories:
    """The states of one recurrence in one text."""

    states: Tensor  # state of each token behind each step, float32 [steps, tokens, h]

    def distances(self) -> np.ndarray:
        """Return how far each state is from the token's last one, in parts of that one's length, [steps, tokens]."""
        last = self.states[-1]
        return ((self.states - last).norm(dim=-1) / last.norm(dim=-1).clamp(min=_EPS)).numpy()

    def kinds(self) -> list[str] | None:
        """Return how each token's state moves; None if there are too few steps to tell."""
        steps = len(self.states)
        if steps < _FEWEST_STEPS:
            return None
        lengths = self.states.diff(dim=0).norm(dim=-1)
        half, quarter = steps // 2, steps // 4
        early, late = lengths[quarter - 1 : half - 1].mean(0), lengths[-quarter:].mean(0)
        is_still = late < _STILL * self.states[-1].norm(dim=-1)
        path = lengths[half - 1 :].sum(0).clamp(min=_EPS)
        straightness = (self.states[-1] - self.states[half - 1]).norm(dim=-1) / path
        slides = torch.where(straightness >= _STRAIGHT, KINDS.index("sliding"), KINDS.index("orbiting"))
        kinds = torch.where(is_still | (late < _SLOWER * early), KINDS.index("converging"), slides)
        return [KINDS[kind] for kind in kinds.tolist()]

    def plane(self) -> tuple[np.ndarray, list[float]]:
        """Return all states in the plane of their two principal components, and the variance that each explains.

        Returns:
            [steps, tokens, 2], and two shares of the variance.
        """
        points = self.states.flatten(0, 1).double()
        points = points - points.mean(0)
        values, vectors = torch.linalg.eigh(points.mT @ points)
        shares = (values[-2:].flip(0) / values.sum().clamp(min=_EPS)).tolist()
        axes = vectors[:, -2:].flip(1)
        return (points @ axes).unflatten(0, self.states.shape[:2]).numpy(), shares


def distances_of_starts(states: Tensor) -> np.ndarray:
    """Return how far apart trajectories from several initial states are behind each step: 0 if the start is forgotten.

    Given states of [starts, steps, tokens, h]: the mean distance of two trajectories in parts of the length of a state,
    mean over tokens, [steps].
    """
    first, second = torch.triu_indices(len(states), len(states), offset=1)
    length = states.norm(dim=-1).mean(0).clamp(min=_EPS)
    apart = torch.stack([(states[i] - states[j]).norm(dim=-1) for i, j in zip(first, second, strict=True)]).mean(0)
    return (apart / length).mean(-1).numpy()
