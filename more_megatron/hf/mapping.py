"""How Megatron's parameters are laid out in a Hugging Face model, from the rows of the systems' name tables.

Every conversion is a view, a split or a copy, so that both directions keep every bit.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from more_megatron.errors import MoREError
from more_megatron.systems import get_system
from more_megatron.systems.export import Layout, Row
from more_megatron.systems.forms import OURS, Form

Config = Mapping[str, Any]
Shape = tuple[int, ...]

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Entry:
    """One parameter of a model, in both worlds."""

    key: str  # Megatron's key; `decoder.layers.` is followed by the rest of the name, without the number of the layer
    layer: int | None  # number of the layer, from 0; None outside of layers
    shape: Shape  # Megatron's shape, of one layer
    names: tuple[str, ...]  # names in the Hugging Face model
    shapes: tuple[Shape, ...]  # shape under each name
    layout: Layout  # how the tensors under these names are put together
    groups: int  # number of query groups
    qkv: tuple[int, int, int]  # rows of queries, keys and values
    fp32: bool  # whether it stays in float32, whatever the rest is cast to

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the Hugging Face tensors of Megatron's, in the order of `names`.

        Raises:
            MoREError: If they have no place for a part of it that is not zero.
        """
        parts = [tensor]
        if self.layout is Layout.HALVES:
            parts = list(tensor.chunk(2))
        elif self.layout is Layout.TWICE:
            parts = [tensor] * len(self.names)
        elif self.layout is not Layout.WHOLE:
            parts = self._split_qkv(tensor)
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _split_qkv(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        rows = [size // self.groups for size in self.qkv]
        parts = [part.flatten(0, 1) for part in tensor.unflatten(0, (self.groups, -1)).split(rows, dim=1)]
        if self.layout is Layout.QKV_IN_ONE:
            return [torch.cat(parts)]
        if self.layout is Layout.QK_BIAS:
            if parts.pop().any():
                raise MoREError(f"{self.key} has biases of values that are not zero: the form has no place for them")
            return [torch.stack(parts)]
        return parts

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return Megatron's tensor, given those under `names`.

        Raises:
            MoREError: If they should be the same and are not.
        """
        if self.layout is Layout.TWICE and not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise MoREError(f"{' and '.join(self.names)} are one parameter, and they differ")
        if self.layout in (Layout.WHOLE, Layout.TWICE):
            return tensors[0].reshape(self.shape)
        if self.layout is Layout.HALVES:
            return torch.cat(list(tensors))
        return self._merge_qkv(tensors)

    def _merge_qkv(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.layout is Layout.QKV_IN_ONE:
            tensors = tensors[0].split(self.qkv)
        elif self.layout is Layout.QK_BIAS:
            queries, keys = tensors[0].flatten(1)
            tensors = (queries, keys, torch.zeros_like(keys))
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def entries(config: Config, form: Form = OURS) -> list[Entry]:
    """Return every parameter of a model, in the order of its computation.

    Args:
        config: Content of our `config.json`.
        form: Whose names and layouts the Hugging Face side has.

    Raises:
        MoREError: If there is no such system.
    """
    system = get_system(config["variant"])
    features, sizes = _features(config) | system.features(config), _sizes(config) | system.sizes(config)
    places: list[tuple[Row, int | None, str]] = [(row, None, "") for row in form.model_rows(config)]
    inputs = sum(row.megatron.startswith("embedding.") for row, *_ in places)
    places[inputs:inputs] = [
        (row, layer, form.layer_prefix(config, layer))
        for layer in range(config["num_hidden_layers"])
        for row in form.layer_rows(config, layer)
    ]
    return [_entry(*place, sizes) for place in places if _is_there(place[0], features)]


def extra_states(config: Config) -> Iterator[tuple[str, int | None, bool]]:
    """Yield the modules that ask a checkpoint for a state beside their parameters, a superset over the backends.

    Yields:
        Key of the module as in `Entry.key`, number of the layer, and whether there is a state for each expert.
    """
    system = get_system(config["variant"])
    yield from ((name, None, False) for name in system.model_states(config))
    for layer in range(config["num_hidden_layers"]):
        for name in system.layer_states(config, layer):
            yield LAYERS + name.removeprefix("N "), layer, name.startswith("N ")


def _is_there(row: Row, features: set[str]) -> bool:
    return all((word.removeprefix("!") in features) != word.startswith("!") for word in row.when.split())


def _entry(row: Row, layer: int | None, prefix: str, sizes: dict[str, int]) -> Entry:
    names = tuple(prefix + name for name in _names(row.hf))
    shape, view = _shape(row.shape, sizes), _shape(row.view or row.shape, sizes)
    qkv = (sizes["q"], sizes["k"], sizes["k"])
    # Rows under each name.
    rows = {Layout.HALVES: (shape[0] // 2,) * 2, Layout.QKV: qkv}.get(row.layout, (view[0],) * len(names))
    shapes = tuple((number, *view[1:]) for number in rows)
    key = row.megatron if layer is None else LAYERS + row.megatron
    return Entry(key, layer, shape, names, shapes, row.layout, sizes["groups"], qkv, row.fp32)


def _names(pattern: str) -> tuple[str, ...]:
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern)
    return (pattern,) if found is None else tuple(found[1] + name + found[3] for name in found[2].split(","))


def _shape(text: str, sizes: dict[str, int]) -> Shape:
    """Return a shape, given the sizes that the text names beside numbers."""
    return tuple(
        prod(int(size) if size.isdecimal() else sizes[size] for size in dimension.split("*"))
        for dimension in text.split()
    )


def _features(config: Config) -> set[str]:
    found = {
        "tied": config["tie_word_embeddings"],
        "learned_positions": config["position_embedding"] == "learned",
        "layernorm": config["norm_type"] == "layernorm",
        "qk_norm": config["qk_norm"],
        "qkv_bias": config["attention_bias"],
        "bias": config["linear_bias"],
        "gated": config["gated_mlp"],
        "shared_expert": config["shared_expert_intermediate_size"] is not None,
        "shared_expert_gate": config["shared_expert_gate"],
        "expert_bias": config["router_expert_bias"],
    }
    return {name for name, present in found.items() if present}


def _sizes(config: Config) -> dict[str, int]:
    heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    return {
        "V": config["vocab_size"],
        "P": config["max_position_embeddings"],
        "h": config["hidden_size"],
        "d": head,
        "n": heads,
        "q": heads * head,
        "k": groups * head,
        "qkv": (heads + 2 * groups) * head,
        "f": config["intermediate_size"] or 0,
        "N": config["num_experts"] or 0,
        "m": config["moe_intermediate_size"],
        "e": config["shared_expert_intermediate_size"] or 0,
        "R": config.get("recurrent_intermediate_size") or 0,
        "groups": groups,
    }
