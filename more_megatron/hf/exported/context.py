"""What every layer is told about one call of the model."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise import state_noise
from .records import Records
from .rotary import Rotation

__all__ = ["CallContext"]


@dataclass(frozen=True)
class CallContext:
    """What every layer and loop knows about one call of the model.

    Attributes:
        positions: Position of each token, [b or 1, s].
        rotation: Cosine and sine of its angles; None without rotary embedding.
        padding: True for padding, [b, T]; None without any.
        documents: Number of each token's document in its row, [b, T]; None if a row is one document.
        past: Number of tokens in the cache.
        num_steps: Recurrence steps.
        noise_seed: Seed of initial states.
        state_std: Standard deviation of initial states.
        input_states: Initial states of the first tokens, [states, b, up to s, h]; None for noise.
        embeddings: What the first layer is given, [b, s, h]. For loops only: layers may be recomputed.
        losses: Loops append what is to be added to the loss in training. For loops only.
        records: What the call keeps of its recurrences.
    """

    positions: Tensor
    rotation: Rotation | None
    padding: Tensor | None
    documents: Tensor | None
    past: int
    num_steps: int
    noise_seed: int
    state_std: float
    input_states: Tensor | None
    embeddings: Tensor | None = None
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    records: Records = dataclasses.field(default_factory=Records)

    @property
    def mask(self) -> Tensor | None:
        """The keys that each token sees, [b, 1, s, T]; None where the plain causal kernel does."""
        plain = self.padding is None and self.documents is None and (self.past == 0 or self.positions.size(1) == 1)
        return None if plain else self.visible

    @functools.cached_property
    def visible(self) -> Tensor:
        """The keys that each token sees, True for these, [b or 1, 1, s, T].

        A token sees itself even if it is padding: a row of a softmax must not be empty.
        """
        length, device = self.positions.size(1), self.positions.device
        query = torch.arange(self.past, self.past + length, device=device).unsqueeze(1)
        key = torch.arange(self.past + length, device=device)
        visible = (key <= query)[None, None]
        if self.documents is not None:
            own = self.documents[:, self.past :]
            visible = visible & (own.unsqueeze(2) == self.documents.unsqueeze(1)).unsqueeze(1)
        if self.padding is not None:
            visible = visible & ~self.padding[:, None, None] | (key == query)
        return visible

    def initial_state(self, index: int, like: Tensor, layer: int | None = None) -> Tensor:
        """Return the state that a recurrence starts from, shaped and typed as `like`, [b, s, h].

        Args:
            index: Which of the model's recurrences, from 0.
            like: A tensor of that shape.
            layer: Layer in the noise's coordinates, from 1. Default: `index + 1`.
        """
        given = None if self.input_states is None else self.input_states[index].to(like)
        if given is not None and given.size(1) == like.size(1):
            return given
        number = index + 1 if layer is None else layer
        noise = state_noise(self.positions, like.size(-1), self.noise_seed, number, self.state_std)
        noise = noise.to(like.dtype).expand_as(like)
        return noise if given is None else torch.cat((given, noise[:, given.size(1) :]), dim=1)

    def to(self, device: torch.device, **kwargs: Any) -> CallContext:
        """Return a copy on another device, which is how accelerate hands arguments to layers that live there."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(move(part) for part in value)
            return value.to(device, **kwargs) if isinstance(value, Tensor) else value

        return CallContext(**{field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)})
