"""Places in a cache, by name.

A `DynamicCache` holds one pair of growing tensors for each of its layers. A model of ours needs more pairs than it has
layers: a layer that is looped attends anew in every pass, and blocks and cells inside a layer have states of their own.
Each pair has a name, `layers.3/pass.2/attention` for example, and gets a layer of the cache when it is first used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

__all__ = ["Memory", "prepare_cache"]


@dataclass(frozen=True)
class Memory:
    """A part of a cache.

    Attributes:
        cache: The whole cache; None without one.
        path: What all names of this part begin with.
    """

    cache: Cache | None
    path: str = ""

    def at(self, name: str) -> Memory:
        """Return the part of a layer, pass or block."""
        return replace(self, path=f"{self.path}{name}/")

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
        """Append [b, any, s, any] to what is under a name and return all of it, [b, any, T, any]."""
        if self.cache is None:
            return keys, values
        places = _places(self.cache)
        place = places.setdefault(self.path + name, len(places))
        self.cache.layers.extend(DynamicLayer() for _ in range(place + 1 - len(self.cache.layers)))
        return self.cache.update(keys, values, place)


def prepare_cache(cache: Cache, num_steps: int | None) -> None:
    """Let a cache have places by name.

    Args:
        cache: The cache of a call.
        num_steps: Recurrence steps of the call; None if the model has no recurrence.

    Raises:
        ValueError: If the cache cannot grow, or was filled with another number of steps.
    """
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        raise ValueError(f"a {type(cache).__name__} cannot hold the states of a MoRE model: use a DynamicCache")
    filled = vars(cache).get("more_steps", num_steps)
    if filled != num_steps:
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"the cache was filled with num_steps={filled}, and this call has num_steps={num_steps}: "
                "use the same number or start with an empty cache"
            )
        cache.layers.clear()
        _places(cache).clear()
    vars(cache)["more_steps"] = num_steps


def _places(cache: Cache) -> dict[str, int]:
    """Return the layer of a cache that each name has."""
    return vars(cache).setdefault("more_places", {})
