"""Places in a cache, by name.

A `DynamicCache` holds one pair of growing tensors for each of its layers. A model of ours needs more pairs than it has
layers: a layer that is looped attends anew in every pass, and blocks and cells inside a layer have states of their own.
Each pair has a name, `layers.3/step.2/attention` for example, and gets a layer of the cache when it is first used.

Tokens may stop before the others of their call. Whoever attends to such a token in a step that it did not take finds
what it left in its last one: for tokens that did not come to a place, it holds what that of the step before holds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

_STEP = "step."


class _Place(DynamicLayer):
    """A pair of growing tensors. It may end before the text, as long as `first` says: at the last token here."""

    keys: Any
    values: Any

    def __init__(self, first: Any = None) -> None:
        super().__init__()
        self.first = first

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens of the text. Layers are cut in order, so the first one has been cut."""
        if self.first is None:
            super().crop(*args, **kwargs)
        elif self.keys is not None:
            length = self.first.get_seq_length()
            self.keys, self.values = self.keys[..., :length, :], self.values[..., :length, :]


@dataclass(frozen=True)
class Memory:
    """A part of a cache."""

    cache: Any  # the whole cache; None without one
    shape: tuple[int, int]  # (b, s) of the call
    past: int = 0  # number of tokens in it before the call
    slots: int | None = None  # steps of which it keeps keys and values, later ones writing over earlier ones; None: all
    path: str = ""  # what all names of this part begin with
    before: str | None = None  # what the names of the step before begin with; None if this is no step, or the first
    places: Tensor | None = None  # which of the call's tokens, b s in number, are written; None: all

    def at(self, name: str) -> Memory:
        """Return the part of a layer or block."""
        before = None if self.before is None else f"{self.before}{name}/"
        return replace(self, path=f"{self.path}{name}/", before=before)

    def at_step(self, step: int) -> Memory:
        """Return the part of a step of a recurrence."""
        slot = step if self.slots is None else step % self.slots
        before = f"{self.path}{_STEP}{slot - 1}/" if slot > 0 else None
        return replace(self, path=f"{self.path}{_STEP}{slot}/", before=before)

    def copy(self) -> Memory:
        """Return the same part of a cache that holds the same, and grows apart from this one."""
        if self.cache is None:
            return self
        made = DynamicCache()
        made.layers = [copy.copy(layer) for layer in self.cache.layers]
        _places(made).update(_places(self.cache))
        return replace(self, cache=made)

    def held(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return what is under a name, [b, any, T, any] each; None if there is nothing."""
        number = None if self.cache is None else _places(self.cache).get(self.path + name)
        return None if number is None else _pair(self.cache.layers[number])

    def extend(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [b, any, s, any] to what is under a name and return all of it, [b, any, T, any].

        Where tokens have stopped, [1, any, n, any] are written to the places of the n others.
        """
        if self.cache is None:
            return keys, values
        place = _place(self.cache, self.path + name)
        if self.places is None and place.get_seq_length() == self.past:
            return place.update(keys, values)
        before = None if self.before is None else _place(self.cache, self.before + name)
        keys, values = map(self._written, _pair(place), _pair(before), (keys, values))
        if place.keys is None:
            return place.update(keys, values)
        place.keys, place.values = keys, values
        return keys, values

    def _written(self, held: Tensor | None, earlier: Tensor | None, new: Tensor) -> Tensor:
        """Return what a place holds with new tokens; `earlier` is what that of the step before holds, all of them."""
        length = 0 if held is None else held.size(-2)
        if earlier is not None and length <= self.past:
            held = earlier if held is None else torch.cat((held, earlier[..., length:, :]), dim=-2)
        if self.places is not None:
            if held is None or held.size(-2) == self.past:  # A first step, which padding does not take.
                flat = new.new_zeros(self.shape[0] * self.shape[1], new.size(1), new.size(3))
            else:
                flat = held[..., self.past :, :].transpose(1, 2).flatten(0, 1)
            flat = flat.index_copy(0, self.places, new[0].transpose(0, 1))
            new = flat.unflatten(0, self.shape).transpose(1, 2)
        return new if held is None else torch.cat((held[..., : self.past, :], new), dim=-2)


def _place(cache: Any, name: str) -> Any:
    """Return the layer of a name, a new one if there is none."""
    number = _places(cache).setdefault(name, len(_places(cache)))
    if number == len(cache.layers):
        cache.layers.append(_Place(cache.layers[0] if number > 0 else None))
    return cache.layers[number]


def _pair(place: Any) -> tuple[Any, Any]:
    return (None, None) if place is None else (place.keys, place.values)


def _places(cache: Any) -> dict[str, int]:
    """Return the layer of a cache that each name has."""
    return vars(cache).setdefault("more_places", {})


def prepare_cache(cache: Any, num_steps: int | None, slots: int | None) -> None:
    """Let a cache have places by name.

    `num_steps` is None if the model has no recurrence, `slots` if the keys and values of all steps are kept.

    Raises:
        ValueError: If the cache cannot grow, or was filled by another kind of model or with other numbers of steps.
    """
    known = isinstance(cache, Cache) and all(type(layer) in (_Place, DynamicLayer) for layer in cache.layers)
    if not known:
        raise ValueError(f"a {type(cache).__name__} cannot hold the states of a MoRE model: use a DynamicCache")
    asked = {"num_steps": num_steps, "cache_steps": slots}
    if cache.get_seq_length() == 0:
        cache.layers.clear()
        _places(cache).clear()
    elif not hasattr(cache, "more_steps"):
        raise ValueError("the cache was filled by another kind of model: start with an empty one")
    else:
        for (name, wanted), filled in zip(asked.items(), cache.more_steps, strict=True):
            if filled != wanted:
                raise ValueError(
                    f"the cache was filled with {name}={filled}, and this call has {name}={wanted}: "
                    "use the same number or start with an empty cache"
                )
    cache.more_steps = tuple(asked.values())


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
        sizes[part] += sum(tensor.nbytes for tensor in _pair(cache.layers[number]) if tensor is not None)
    return sizes
