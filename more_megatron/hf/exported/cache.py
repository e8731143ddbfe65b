"""Places in a cache, by name.

A `DynamicCache` holds one pair of growing tensors for each of its layers. A model of ours needs more pairs than it has
layers: a layer that is looped attends anew in every pass, and blocks and cells inside a layer have states of their own.
Each pair has a name, `layers.3/step.2/attention` for example, and gets a layer of the cache when it is first used.

Tokens may stop before the others of their call. Whoever attends to such a token in a step that it did not take finds
what it left in its last one: for tokens that did not come to a place, it holds what that of the step before holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["Memory", "cache_sizes", "cut", "filled_as", "prepare_cache"]

_STEP = "step."


class _Place(DynamicLayer):
    """A pair of growing tensors. It may end before the text, as long as `first` says: at the last token here."""

    def __init__(self, first: Any = None) -> None:
        super().__init__()
        self.first = first
        self.keys: Any
        self.values: Any

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens of the text. Layers are cut in order, so the first one has been cut."""
        if self.first is None:
            super().crop(*args, **kwargs)
        elif self.keys is not None:
            length = self.first.get_seq_length()
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]


@dataclass(frozen=True)
class Memory:
    """A part of a cache.

    Attributes:
        cache: The whole cache; None without one.
        past: Number of tokens in it before the call.
        slots: Steps of which it keeps keys and values, later ones writing over earlier ones; None: all.
        path: What all names of this part begin with.
        before: What the names of the step before begin with; None if this is no step, or the first.
        shape: (b, s) of the call where tokens may have stopped, else None.
        places: Which of the tokens, b s in number, are written; None: all.
        aside: Where to write what must not come into the cache; None: into the cache.
    """

    cache: Cache | None
    past: int = 0
    slots: int | None = None
    path: str = ""
    before: str | None = None
    shape: tuple[int, int] | None = None
    places: Tensor | None = None
    aside: dict[str, _Place] | None = field(default=None, repr=False)

    def at(self, name: str) -> Memory:
        """Return the part of a layer or block."""
        before = None if self.before is None else f"{self.before}{name}/"
        return replace(self, path=f"{self.path}{name}/", before=before)

    def at_step(self, step: int) -> Memory:
        """Return the part of a step of a recurrence."""
        slot = step if self.slots is None else step % self.slots
        before = f"{self.path}{_STEP}{slot - 1}/" if slot > 0 else None
        return replace(self, path=f"{self.path}{_STEP}{slot}/", before=before)

    def select(self, shape: tuple[int, int], places: Tensor | None) -> Memory:
        """Return the same part for some tokens of a call."""
        return self if places is None else replace(self, shape=shape, places=places)

    def write_aside(self, aside: dict[str, _Place]) -> Memory:
        """Return the same part, which reads the cache but writes elsewhere."""
        return replace(self, aside=aside)

    def holds(self, name: str) -> bool:
        """Return whether there is anything under a name."""
        return self.cache is not None and self.path + name in _places(self.cache)

    def held(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return what is under a name, [b, any, T, any] each; None if there is nothing."""
        if self.cache is None or not self.holds(name):
            return None
        layer: Any = self.cache.layers[_places(self.cache)[self.path + name]]
        return layer.keys, layer.values

    def extend(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, any, s, any] to what is under a name and return all of it, [b, any, T, any].

        Where tokens have stopped, [1, any, n, any] are written to the places of the n others.
        """
        if self.cache is None:
            return keys, values
        place = self._place(self.cache, self.path + name)
        length = place.get_seq_length()
        if self.places is None and length == self.past:
            return place.update(keys, values)
        before = None if self.before is None else self._place(self.cache, self.before + name)
        found = [
            self._written(held, earlier, new)
            for held, earlier, new in zip(_pair(place), _pair(before), (keys, values), strict=True)
        ]
        if place.keys is None:
            return place.update(*found)
        place.keys, place.values = found
        return place.keys, place.values

    def _written(self, held: Tensor | None, earlier: Tensor | None, new: Tensor) -> Tensor:
        """Return what a place holds, [b, any, T, any], with new tokens, [b, any, s, any], or some, [1, any, n, any].

        `earlier` is what the place of the step before holds, which is complete.
        """
        length = 0 if held is None else held.size(-2)
        known = [] if held is None else [held[..., : self.past, :]]
        if length < self.past and earlier is not None:
            known.append(earlier[..., length : self.past, :])
        if self.places is None or self.shape is None:
            return torch.cat((*known, new), dim=-2)
        batch, tokens = self.shape
        source = held if length > self.past else earlier
        if source is None:
            current = new.new_zeros(batch * tokens, new.size(1), new.size(3))
        else:
            current = source[..., self.past :, :].transpose(1, 2).flatten(0, 1)
        current = current.index_copy(0, self.places, new[0].transpose(0, 1))
        return torch.cat((*known, current.unflatten(0, (batch, tokens)).transpose(1, 2)), dim=-2)

    def _place(self, cache: Cache, name: str) -> Any:
        """Return the layer of a name, a new one if there is none."""
        places = _places(cache)
        if self.aside is not None:
            if name not in self.aside:
                made = self.aside[name] = _Place()
                if name in places:
                    made.update(*_pair(cache.layers[places[name]]))
            return self.aside[name]
        number = places.setdefault(name, len(places))
        if number == len(cache.layers):
            cache.layers.append(_Place(cache.layers[0] if number > 0 else None))
        return cache.layers[number]


def _pair(place: Any) -> tuple[Any, Any]:
    return (None, None) if place is None else (place.keys, place.values)


def prepare_cache(cache: Cache, num_steps: int | None, slots: int | None) -> None:
    """Let a cache have places by name.

    `num_steps` is None if the model has no recurrence, `slots` if the keys and values of all steps are kept.

    Raises:
        ValueError: If the cache cannot grow, or was filled with other numbers of steps.
    """
    if not all(isinstance(layer, _Place) or type(layer) is DynamicLayer for layer in cache.layers):
        raise ValueError(f"a {type(cache).__name__} cannot hold the states of a MoRE model: use a DynamicCache")
    if cache.get_seq_length() == 0:
        cache.layers.clear()
        _places(cache).clear()
    else:
        for name, filled, asked in zip(
            ("num_steps", "cache_steps"), vars(cache)["more_steps"], (num_steps, slots), strict=True
        ):
            if filled != asked:
                raise ValueError(
                    f"the cache was filled with {name}={filled}, and this call has {name}={asked}: "
                    "use the same number or start with an empty cache"
                )
    vars(cache)["more_steps"] = (num_steps, slots)


@contextmanager
def filled_as(cache: Cache, num_steps: int) -> Iterator[None]:
    """Let calls with another number of steps read a cache. What they append must be cut off again."""
    filled = vars(cache)["more_steps"]
    vars(cache)["more_steps"] = (num_steps, filled[1])
    try:
        yield
    finally:
        vars(cache)["more_steps"] = filled


def cut(cache: Cache, length: int) -> None:
    """Cut a cache to a number of tokens. To cut off none means different things to releases of transformers."""
    surplus = cache.get_seq_length() - length
    if surplus > 0:
        cache.crop(-surplus)


def cache_sizes(cache: Cache) -> dict[str, int]:
    """Return the bytes of a cache that steps of recurrences fill, and of its other places."""
    sizes = {"recurrent": 0, "other": 0}
    for name, number in _places(cache).items():
        part = "recurrent" if f"/{_STEP}" in name else "other"
        for tensor in _pair(cache.layers[number]):
            sizes[part] += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return sizes


def _places(cache: Cache) -> dict[str, int]:
    """Return the layer of a cache that each name has."""
    return vars(cache).setdefault("more_places", {})
