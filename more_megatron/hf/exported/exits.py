"""Adaptive exit: when a token's recurrence has gone far enough.

A criterion compares what two successive steps lead to. Write your own as a subclass and give an instance of it in the
place of a name: `model.generate(..., criterion=MyCriterion(), exit_threshold=0.1)`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Criterion:
    """A distance between what two successive steps lead to; a token stops when it is strictly below a threshold.

    Attributes:
        threshold: The threshold if a call names none.
        reads_logits: Whether it reads logits, and not states. Where a recurrence is not followed by others, these are
            what the model would say if the recurrence ended now; else what it would say without those.
    """

    threshold: float
    reads_logits: bool = False

    def measure(self, seen: Tensor, former: Tensor | None) -> Tensor:
        """Return what the next step is compared with, [n, any].

        Args:
            seen: States or logits of n tokens, [n, any], in float32 or float64. In front of the first step these are
                the initial states, or logits of zero.
            former: What was measured a step before; None in front of the first step.
        """
        return seen

    def distance(self, former: Tensor, now: Tensor) -> Tensor:
        """Return the distance between what was measured in two successive steps, [n]."""
        raise NotImplementedError

    def stops(self, former: Tensor, now: Tensor, threshold: float) -> Tensor:
        """Return which tokens stop, [n]."""
        return self.distance(former, now) < threshold


class KLDivergence(Criterion):
    """Divergence of the predictions of a step from those of the step before, `KL(former || now)`."""

    threshold = 1e-3
    reads_logits = True

    def measure(self, seen: Tensor, former: Tensor | None) -> Tensor:
        return seen.log_softmax(-1)

    def distance(self, former: Tensor, now: Tensor) -> Tensor:
        # Rounding must not make it negative.
        return (former.exp() * (former - now)).sum(-1).clamp(min=0.0)


class EntropyDifference(Criterion):
    """Change of the entropy of the predictions, in nats."""

    threshold = 1e-3
    reads_logits = True

    def measure(self, seen: Tensor, former: Tensor | None) -> Tensor:
        logs = seen.log_softmax(-1)
        return -(logs.exp() * logs).sum(-1, keepdim=True)

    def distance(self, former: Tensor, now: Tensor) -> Tensor:
        return (now - former).abs().squeeze(-1)


class LatentDifference(Criterion):
    """Norm of the change of the state, relative to the norm of the state."""

    threshold = 0.03

    def distance(self, former: Tensor, now: Tensor) -> Tensor:
        return (now - former).norm(dim=-1) / now.norm(dim=-1).clamp(min=torch.finfo(now.dtype).tiny)


class Cosine(Criterion):
    """One minus the cosine of the angle between two states."""

    threshold = 1e-3

    def distance(self, former: Tensor, now: Tensor) -> Tensor:
        # Rounding must not make it negative.
        return (1.0 - torch.cosine_similarity(former, now, dim=-1)).clamp(min=0.0)


class ArgmaxStability(Criterion):
    """Steps in a row that predicted the same token. It is no distance: a token stops at the threshold or above."""

    threshold = 5
    reads_logits = True

    def measure(self, seen: Tensor, former: Tensor | None) -> Tensor:
        """Return the token that is predicted, -1 in front of the first step, and the steps it has not changed for."""
        token = seen.argmax(-1).to(seen.dtype)
        if former is None:
            return torch.stack((torch.full_like(token, -1.0), torch.zeros_like(token)), dim=-1)
        return torch.stack((token, torch.where(token == former[:, 0], former[:, 1] + 1.0, 0.0)), dim=-1)

    def stops(self, former: Tensor, now: Tensor, threshold: float) -> Tensor:
        return now[:, 1] >= threshold


CRITERIA: dict[str, type[Criterion]] = {
    "kl": KLDivergence,
    "entropy-diff": EntropyDifference,
    "latent-diff": LatentDifference,
    "argmax-stability": ArgmaxStability,
    "cosine": Cosine,
}
