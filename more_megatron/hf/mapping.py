"""How Megatron's parameters are laid out in a Hugging Face model, from the rows of the systems' name tables.

Every conversion is a view, a split or a copy, so that both directions keep every bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from more_megatron.systems import get_system
from more_megatron.systems.export import Layout, Row

__all__ = ["LAYERS", "Entry", "entries", "extra_states"]

Config = Mapping[str, Any]
Shape = tuple[int, ...]

LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Entry:
    """One parameter of a model, in both worlds.

    Attributes:
        key: Megatron's key; `decoder.layers.` is followed by the rest of the name, without the number of the layer.
        layer: Number of the layer, from 0; None outside of layers.
        shape: Megatron's shape, of one layer.
        names: Names in the Hugging Face model.
        shapes: Shape under each name.
        layout: How the tensors under these names are put together.
        groups: Number of query groups.
        fp32: Whether it stays in float32, whatever the rest is cast to.
    """

    key: str
    layer: int | None
    shape: Shape
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layout: Layout
    groups: int
    fp32: bool

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the Hugging Face tensors of Megatron's, in the order of `names`."""
        parts = [tensor]
        if self.layout is Layout.HALVES:
            parts = list(tensor.chunk(2))
        elif self.layout is Layout.QKV:
            rows = [shape[0] // self.groups for shape in self.shapes]
            parts = list(tensor.unflatten(0, (self.groups, -1)).split(rows, dim=1))
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def merge(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return Megatron's tensor, given those under `names`."""
        if self.layout is Layout.WHOLE:
            return tensors[0].reshape(self.shape)
        if self.layout is Layout.HALVES:
            return torch.cat(list(tensors))
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def entries(config: Config) -> list[Entry]:
    """Return every parameter of a model, in the order of its computation.

    Args:
        config: Content of `config.json`.

    Raises:
        MoREError: If there is no such system.
    """
    system = get_system(config["variant"])
    features, sizes = _features(config) | system.features(config), _sizes(config) | system.sizes(config)
    rows = [(row, None) for row in system.model_rows(config)]
    is_behind = [not row.megatron.startswith("embedding.") for row, _ in rows]
    first_behind = is_behind.index(True)
    of_layers = [
        (row, layer) for layer in range(config["num_hidden_layers"]) for row in system.layer_rows(config, layer)
    ]
    ordered = [*rows[:first_behind], *of_layers, *rows[first_behind:]]
    return [entry for row, layer in ordered for entry in _apply(row, layer, features, sizes)]


def extra_states(config: Config) -> Iterator[tuple[str, int | None, bool]]:
    """Yield the modules that ask a checkpoint for a state beside their parameters, a superset over the backends.

    Args:
        config: Content of `config.json`.

    Yields:
        Key of the module as in `Entry.key`, number of the layer, and whether there is a state for each expert.
    """
    system = get_system(config["variant"])
    yield from ((name, None, False) for name in system.model_states(config))
    for layer in range(config["num_hidden_layers"]):
        for name in system.layer_states(config, layer):
            yield LAYERS + name.removeprefix("N "), layer, name.startswith("N ")


def _apply(row: Row, layer: int | None, features: set[str], sizes: dict[str, int]) -> Iterator[Entry]:
    """Yield the entry of a row, if the model has what the row is about."""
    if not all((word.removeprefix("!") in features) != word.startswith("!") for word in row.when.split()):
        return
    names = _names(row.hf)
    shape, view = _shape(row.shape, sizes), _shape(row.view or row.shape, sizes)
    first = {Layout.WHOLE: view[:1], Layout.HALVES: (shape[0] // 2,) * 2, Layout.QKV: (sizes["q"], *[sizes["k"]] * 2)}
    shapes = tuple((rows, *view[1:]) for rows in first[row.layout])
    key, prefix = (row.megatron, "") if layer is None else (LAYERS + row.megatron, f"model.layers.{layer}.")
    yield Entry(
        key, layer, shape, tuple(prefix + name for name in names), shapes, row.layout, sizes["groups"], row.fp32
    )


def _names(pattern: str) -> list[str]:
    found = re.fullmatch(r"(.*)\{(.*)\}(.*)", pattern)
    return [pattern] if found is None else [found[1] + name + found[3] for name in found[2].split(",")]


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
