"""What a call keeps of its recurrences."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Records"]


@dataclass
class Records:
    """What a call keeps of its recurrences, by their place: a layer may be computed again for its gradients.

    Attributes:
        keep_states: Whether states are kept.
        steps: Steps that each token took, [b, s], by recurrence, where tokens stop by themselves.
        states: State behind each step of each recurrence, [b, s, h], by recurrence and step.
    """

    keep_states: bool = False
    steps: dict[int, Tensor] = field(default_factory=dict)
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def repeat_last(self, index: int, last: int, num_steps: int) -> None:
        """Let a recurrence that ended with some step have the states of all steps."""
        if self.keep_states:
            self.states.update({(index, step): self.states[index, last] for step in range(last + 1, num_steps)})

    def exit_steps(self) -> Tensor | None:
        """Return the steps that each token took, [recurrences, b, s]; None if they all took the same."""
        return torch.stack([self.steps[index].cpu() for index in sorted(self.steps)]) if self.steps else None

    def recurrent_states(self) -> Tensor | None:
        """Return the states, [recurrences, steps, b, s, h]; None if they were not to be kept or nothing recurs."""
        if not self.states:
            return None
        first = next(iter(self.states.values()))
        recurrences = len({index for index, _ in self.states})
        states = torch.stack([self.states[place].to(first.device) for place in sorted(self.states)])
        return states.unflatten(0, (recurrences, -1))
