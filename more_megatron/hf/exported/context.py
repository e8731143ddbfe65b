"""What every layer is told about one call of the model, and what the call keeps on its way."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Rotation, RowMask, rotate, rotation
from .cache import Memory
from .fields import Config
from .noise import state_noise
from .options import CallOptions
from .routing import RouterLogits


@dataclass
class Records:
    """What a call keeps; of recurrences by their place: a layer may be computed again for its gradients."""

    keep_states: bool = False  # whether states of recurrences are kept
    hidden_states: list[Tensor] | None = None  # what each layer was given, in every pass, [b, s, h]; None: not kept
    # Router logits, [b s, N] or [b s, heads, N], with layer, step and router; None: not kept
    decisions: list[tuple[Tensor, int, int, str]] | None = None
    # What is to be added to the loss in training, by loops alone
    losses: list[Tensor] = dataclasses.field(default_factory=list)
    # Steps that each token took, [b, s], by recurrence, where tokens stop by themselves
    steps: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    # State behind each step of each recurrence, [b, s, h], by recurrence and step
    states: dict[tuple[int, int], Tensor] = dataclasses.field(default_factory=dict)

    def see_states(self, states: Tensor) -> None:
        """Keep hidden states, [b, s, h]."""
        if self.hidden_states is not None:
            self.hidden_states.append(states)

    def outputs(self, batch: int) -> dict[str, Any]:
        """Return what was kept of a number of sequences, by the fields of `MoREModelOutput`."""
        steps = states = None
        if self.steps:
            steps = torch.stack([self.steps[index].cpu() for index in sorted(self.steps)])
        if self.states:
            first = next(iter(self.states.values()))
            states = torch.stack([self.states[place].to(first.device) for place in sorted(self.states)])
            states = states.unflatten(0, (len({index for index, _ in self.states}), -1))
        return {
            "hidden_states": None if self.hidden_states is None else tuple(self.hidden_states),
            "router_logits": None if self.decisions is None else RouterLogits.of(self.decisions, batch),
            "losses": tuple(self.losses) or None,
            "recurrent_states": states,
            "exit_steps": steps,
        }


@dataclass(frozen=True)
class CallContext:
    """What every layer and loop knows about one call of the model."""

    config: Config
    options: CallOptions
    memory: Memory  # the whole cache, and the size of the call
    records: Records  # what the call keeps
    positions: Tensor  # position of each token, [b or 1, s]
    padding: Tensor | None = None  # True for padding, [b, T]; None without any
    documents: Tensor | None = None  # number of each token's document in its row, [b, T]; None if a row is one document
    # Returns logits, given what the last norm is applied to, for criteria that read them
    read: Callable[[Tensor], Tensor] | None = None
    # What the result of a recurrence inside a layer is added to, [b, s, h], where a criterion reads logits
    stream: Tensor | None = None
    # Which tokens of the call these are where others have stopped, n of b s; None: all. Then the first two
    # dimensions of what a token has are [1, n] in the place of [b, s]
    places: Tensor | None = None
    whole: CallContext | None = None  # the context of all tokens where others have stopped

    @functools.cached_property
    def rotation(self) -> Rotation | None:
        """Cosine and sine of the angles of each token; None without rotary embedding."""
        return rotation(self.config, self.positions)

    @functools.cached_property
    def mask(self) -> Tensor | RowMask | None:
        """The keys that each token sees, [b, 1, s, T]; None where the plain causal kernel does."""
        if self.places is not None and self.whole is not None:
            batch, length = self.memory.shape
            visible = self.whole.visible.expand(batch, -1, -1, -1)
            return RowMask(visible.flatten(0, 2)[self.places], self.places // length)
        is_simple = self.memory.past == 0 or self.positions.size(1) == 1
        plain = self.padding is None and self.documents is None and is_simple
        return None if plain else self.visible

    @functools.cached_property
    def visible(self) -> Tensor:
        """The keys that each token sees, True for these, [b or 1, 1, s, T].

        A token sees itself even if it is padding: a row of a softmax must not be empty.
        """
        past, device = self.memory.past, self.positions.device
        key = torch.arange(past + self.positions.size(1), device=device)
        query = key[past:].unsqueeze(1)
        visible = (key <= query)[None, None]
        if self.documents is not None:
            own = self.documents[:, past:]
            visible = visible & (own.unsqueeze(2) == self.documents.unsqueeze(1)).unsqueeze(1)
        if self.padding is not None:
            visible = visible & ~self.padding[:, None, None] | (key == query)
        return visible

    def rotate(self, x: Tensor) -> Tensor:
        """Return queries or keys, [b, ..., s, d], at their positions."""
        return rotate(x, self.rotation, self.config.rotary_interleaved)

    def initial_state(self, index: int, like: Tensor, layer: int | None = None) -> Tensor:
        """Return the state that a recurrence, counted from 0, starts from, shaped and typed as `like`, [b, s, h].

        `layer` is that in the noise's coordinates, from 1; by default `index + 1`.
        """
        states = self.options.input_states
        given = self._last_state(index) if states is None else states[index].to(like)
        if given is not None and given.size(1) == like.size(1):
            return given
        number = index + 1 if layer is None else layer
        std = self.config.state_std * self.options.init_scale
        noise = state_noise(self.positions, like.size(-1), self.config.noise_seed, number, std)
        noise = noise.to(like.dtype).expand_as(like)
        return noise if given is None else torch.cat((given, noise[:, given.size(1) :]), dim=1)

    def _last_state(self, index: int) -> Tensor | None:
        """Return the last state of the token before the first of the call, [b, 1, h]; None if there is none."""
        held = self.memory.held(f"states.{index}") if self.options.warm_start else None
        if held is None:
            return None
        states = held[0][:, 0]
        if self.padding is None:
            return states[:, -1:]
        # The last that is no padding.
        last = (~self.padding[:, : states.size(1)]).long().cumsum(-1).argmax(-1)
        return states[torch.arange(len(last), device=last.device), last].unsqueeze(1)

    def real_tokens(self) -> Tensor:
        """Return the places of the tokens of the call that are no padding; of all if they are nothing else."""
        places = torch.arange(math.prod(self.memory.shape), device=self.positions.device)
        real = places if self.padding is None else places[~self.padding[:, self.memory.past :].flatten()]
        return real if len(real) > 0 else places

    def select(self, places: Tensor) -> CallContext:
        """Return the context of some tokens of the call, given their places among all, b s."""

        def rows(part: Tensor) -> Tensor:
            return part.expand(self.memory.shape[0], -1, *part.shape[2:]).flatten(0, 1)[places].unsqueeze(0)

        stream = None if self.stream is None else rows(self.stream)
        return dataclasses.replace(self, positions=rows(self.positions), stream=stream, places=places, whole=self)

    def beside(self, part: Tensor | None) -> CallContext:
        """Return the context of a recurrence whose result is added to a part, [b, s, h], and to the stream before."""
        criterion = self.options.criterion
        if part is None or criterion is None or not criterion.reads_logits:
            return self
        return dataclasses.replace(self, stream=part if self.stream is None else self.stream + part)

    def to(self, device: torch.device, **kwargs: Any) -> CallContext:
        """Return a copy on another device, which is how accelerate hands arguments to layers that live there."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, part in parts.items():
            if isinstance(part, Tensor | CallContext):
                parts[name] = part.to(device, **kwargs)
        return CallContext(**parts)


def find_places(
    positions: Tensor | None, attention_mask: Tensor | None, memory: Memory, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return padding, documents and positions as `CallContext` has them, given positions, [b, s], and mask, [b, T].

    Raises:
        ValueError: If one has not that shape.
    """
    (batch, length), past = memory.shape, memory.past
    padding = _find_padding(attention_mask, (batch, past + length), device)
    if positions is None:
        tokens = torch.ones(1, past + length, dtype=torch.bool, device=device) if padding is None else ~padding
        return padding, None, (tokens.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
    if positions.shape not in ((1, length), (batch, length)):
        raise ValueError(f"position_ids has shape {tuple(positions.shape)}, and not (b, s) = {(batch, length)}")
    return padding, _find_documents(positions.expand(batch, -1), padding, memory), positions.long()


def _find_padding(attention_mask: Tensor | None, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, and not (b, T) = {shape}")
    padding = (attention_mask == 0).to(device)
    # A tracer cannot look into a mask.
    return padding if torch.compiler.is_compiling() or bool(padding.any()) else None


def _find_documents(positions: Tensor, padding: Tensor | None, memory: Memory) -> Tensor | None:
    """Return the number of each token's document, [b, T], where a row holds several.

    A document begins where a position is not the one after the position before it. Packing collators send such
    positions, and transformers' own models keep these documents apart, too. The cache keeps the positions of the
    tokens before these if they are of several documents.
    """
    if memory.past > 0 and memory.held("positions") is None:
        return None
    kept = positions[:, None, :, None]
    every = positions if memory.past == 0 else memory.extend("positions", kept, kept)[0][:, 0, :, 0]
    begins = torch.zeros_like(every, dtype=torch.bool)
    begins[:, 1:] = every[:, 1:] != every[:, :-1] + 1
    if padding is not None:
        begins &= ~padding
        begins[:, 1:] &= ~padding[:, :-1]
    if memory.past == 0:
        if not torch.compiler.is_compiling() and not bool(begins.any()):
            return None
        memory.extend("positions", kept, kept)
    return begins.long().cumsum(-1)
