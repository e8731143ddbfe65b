"""How Megatron's parameters are named and laid out in a Hugging Face model: one row a parameter, for each system.

Every conversion is a view, a split or a copy, so that both directions keep every bit. The sizes in the table:

    V vocabulary   P positions   h hidden   q heads x d   k groups x d   qkv q + 2 k   d head size
    f dense MLP    N experts     m expert MLP             e shared expert              R MLP of a recurrent block
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import prod
from typing import Any

import torch

from more_megatron.errors import MoREError

__all__ = ["EXPERTS", "LAYERS", "Entry", "Layout", "Row", "entries", "extra_states"]

Config = Mapping[str, Any]
Shape = tuple[int, ...]


class Layout(Enum):
    """How one tensor of Megatron's is made of tensors of the Hugging Face model."""

    WHOLE = auto()
    """One tensor; the shapes may differ by a view."""

    HALVES = auto()
    """Two tensors below each other: a gate and what it gates."""

    QKV = auto()
    """Three tensors interleaved: for each query group its queries, then its key, then its value."""


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        megatron: Its key in a checkpoint, within the layer or the model.
        hf: Its name within the layer or the model; `{a,b}` names several that Megatron keeps in one.
        shape: Megatron's, of sizes from the list above: `2*f h` has two dimensions.
        view: Shape in the Hugging Face model where it is another view of a whole tensor.
        layout: How the tensors of several names are put together.
        when: Features a model must have for the row to apply; `!` before one that it must not have.
        fp32: Whether it stays in float32, whatever the rest is cast to.
    """

    megatron: str
    hf: str
    shape: str
    view: str = ""
    layout: Layout = Layout.WHOLE
    when: str = ""
    fp32: bool = False


MODEL = (
    Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V h"),
    Row("embedding.position_embeddings.weight", "model.embed_positions.weight", "P h", when="learned_positions"),
    Row("decoder.final_layernorm.weight", "model.norm.weight", "h"),
    Row("decoder.final_layernorm.bias", "model.norm.bias", "h", when="layernorm"),
    Row("output_layer.weight", "lm_head.weight", "V h", when="!tied"),
)

ATTENTION = (
    Row("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "h"),
    Row("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias", "h", when="layernorm"),
    Row("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight", "qkv h", layout=Layout.QKV),
    Row("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", "qkv", layout=Layout.QKV, when="qkv_bias"),
    Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "h q"),
    Row("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "h", when="bias"),
    Row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "d", when="qk_norm"),
    Row("self_attention.q_layernorm.bias", "self_attn.q_norm.bias", "d", when="qk_norm layernorm"),
    Row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "d", when="qk_norm"),
    Row("self_attention.k_layernorm.bias", "self_attn.k_norm.bias", "d", when="qk_norm layernorm"),
)

DENSE = (
    Row("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "h"),
    Row("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias", "h", when="layernorm"),
    Row("mlp.linear_fc1.weight", "mlp.{gate,up}_proj.weight", "2*f h", layout=Layout.HALVES, when="gated"),
    Row("mlp.linear_fc1.bias", "mlp.{gate,up}_proj.bias", "2*f", layout=Layout.HALVES, when="gated bias"),
    Row("mlp.linear_fc1.weight", "mlp.up_proj.weight", "f h", when="!gated"),
    Row("mlp.linear_fc1.bias", "mlp.up_proj.bias", "f", when="!gated bias"),
    Row("mlp.linear_fc2.weight", "mlp.down_proj.weight", "h f"),
    Row("mlp.linear_fc2.bias", "mlp.down_proj.bias", "h", when="bias"),
)

# What every layer with experts has, whatever its experts are.
MOE = (
    Row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "h"),
    Row("pre_mlp_layernorm.bias", "post_attention_layernorm.bias", "h", when="layernorm"),
    Row("mlp.router.weight", "mlp.gate.weight", "N h"),
    Row("mlp.router.bias", "mlp.gate.bias", "N", when="bias"),
    Row("mlp.router.expert_bias", "mlp.gate.expert_bias", "N", when="expert_bias", fp32=True),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.{gate,up}_proj.weight",
        "2*e h",
        layout=Layout.HALVES,
        when="shared_expert gated",
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.up_proj.weight",
        "e h",
        when="shared_expert !gated",
    ),
    Row("mlp.shared_experts.linear_fc2.weight", "mlp.shared_expert.down_proj.weight", "h e", when="shared_expert"),
    Row("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1 h", when="shared_expert_gate"),
)

# Megatron's own experts.
FEED_FORWARD = (
    Row("mlp.experts.experts.linear_fc1.weight", "mlp.experts.gate_up_proj", "N 2*m h", when="gated"),
    Row("mlp.experts.experts.linear_fc1.bias", "mlp.experts.gate_up_proj_bias", "N 2*m", when="gated bias"),
    Row("mlp.experts.experts.linear_fc1.weight", "mlp.experts.up_proj", "N m h", when="!gated"),
    Row("mlp.experts.experts.linear_fc1.bias", "mlp.experts.up_proj_bias", "N m", when="!gated bias"),
    Row("mlp.experts.experts.linear_fc2.weight", "mlp.experts.down_proj", "N h m"),
    Row("mlp.experts.experts.linear_fc2.bias", "mlp.experts.down_proj_bias", "N h", when="bias"),
)

# System: the parameters of its experts and of the block that they share.
EXPERTS: dict[str, tuple[Row, ...]] = {
    "moe": FEED_FORWARD,
    "recurrent_moe": FEED_FORWARD,
    "recurrent_experts": (
        Row("mlp.experts.block.adapter", "mlp.experts.adapter", "N h 2*h"),
        Row("mlp.experts.block.qkv", "mlp.experts.qkv", "N qkv h"),
        Row("mlp.experts.block.proj", "mlp.experts.proj", "N h q"),
        Row("mlp.experts.block.fc1", "mlp.experts.fc1", "N 2 R h"),
        Row("mlp.experts.block.fc2", "mlp.experts.fc2", "N h R"),
        Row("mlp.experts.block.norm_1", "mlp.experts.norm_1", "N*h", view="N h"),
        Row("mlp.experts.block.norm_2", "mlp.experts.norm_2", "N*h", view="N h"),
        Row("mlp.experts.block.norm_3", "mlp.experts.norm_3", "N*h", view="N h"),
        Row("mlp.experts.block.norm_4", "mlp.experts.norm_4", "N*h", view="N h"),
    ),
    "shared_block": (
        Row("mlp.experts.proj_in", "mlp.experts.proj_in", "N h h"),
        Row("mlp.experts.proj_out", "mlp.experts.proj_out", "N h h"),
        Row("mlp.recurrent_block.adapter", "mlp.recurrent_block.adapter", "1 h 2*h", view="h 2*h"),
        Row("mlp.recurrent_block.qkv", "mlp.recurrent_block.qkv", "1 qkv h", view="qkv h"),
        Row("mlp.recurrent_block.proj", "mlp.recurrent_block.proj", "1 h q", view="h q"),
        Row("mlp.recurrent_block.fc1", "mlp.recurrent_block.fc1", "1 2 R h", view="2 R h"),
        Row("mlp.recurrent_block.fc2", "mlp.recurrent_block.fc2", "1 h R", view="h R"),
        Row("mlp.recurrent_block.norm_1", "mlp.recurrent_block.norm_1", "h"),
        Row("mlp.recurrent_block.norm_2", "mlp.recurrent_block.norm_2", "h"),
        Row("mlp.recurrent_block.norm_3", "mlp.recurrent_block.norm_3", "h"),
        Row("mlp.recurrent_block.norm_4", "mlp.recurrent_block.norm_4", "h"),
    ),
    "shared_block_ffn": (
        Row("mlp.experts.fc1", "mlp.experts.fc1", "N 2*h h"),
        Row("mlp.experts.fc2", "mlp.experts.fc2", "N h 2*h"),
        Row("mlp.recurrent_block.adapter", "mlp.recurrent_block.adapter", "h 2*h"),
        Row("mlp.recurrent_block.attention.linear_qkv.weight", "mlp.recurrent_block.qkv", "qkv h"),
        Row("mlp.recurrent_block.attention.linear_qkv.bias", "mlp.recurrent_block.qkv_bias", "qkv", when="qkv_bias"),
        Row("mlp.recurrent_block.attention.linear_proj.weight", "mlp.recurrent_block.proj", "h q"),
        Row("mlp.recurrent_block.mlp.linear_fc1.weight", "mlp.recurrent_block.fc1", "2*R h", view="2 R h"),
        Row("mlp.recurrent_block.mlp.linear_fc2.weight", "mlp.recurrent_block.fc2", "h R"),
        Row("mlp.recurrent_block.norm_1.weight", "mlp.recurrent_block.norm_1", "h"),
        Row("mlp.recurrent_block.norm_1.bias", "mlp.recurrent_block.norm_1_bias", "h", when="layernorm"),
        Row("mlp.recurrent_block.norm_2.weight", "mlp.recurrent_block.norm_2", "h"),
        Row("mlp.recurrent_block.norm_2.bias", "mlp.recurrent_block.norm_2_bias", "h", when="layernorm"),
        Row("mlp.recurrent_block.norm_3.weight", "mlp.recurrent_block.norm_3", "h"),
        Row("mlp.recurrent_block.norm_3.bias", "mlp.recurrent_block.norm_3_bias", "h", when="layernorm"),
        Row("mlp.recurrent_block.norm_4.weight", "mlp.recurrent_block.norm_4", "h"),
        Row("mlp.recurrent_block.norm_4.bias", "mlp.recurrent_block.norm_4_bias", "h", when="layernorm"),
    ),
}

# Modules that ask a checkpoint for a state beside their parameters, which is empty outside FP8: linear layers under
# both backends, norms and attention under Transformer Engine. `N ` before a name: one state an expert.
_STATES_OF_MODEL = ("decoder.final_layernorm",)
_STATES_OF_ATTENTION = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
)
_STATES_OF_DENSE = ("mlp.linear_fc1", "mlp.linear_fc2")
_STATES_OF_MOE = ("pre_mlp_layernorm", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_STATES_OF_EXPERTS: dict[str, tuple[str, ...]] = {
    "moe": ("N mlp.experts.experts.linear_fc1", "N mlp.experts.experts.linear_fc2"),
    "recurrent_moe": ("N mlp.experts.experts.linear_fc1", "N mlp.experts.experts.linear_fc2"),
    "shared_block_ffn": (
        "mlp.recurrent_block.attention.linear_qkv",
        "mlp.recurrent_block.attention.core_attention",
        "mlp.recurrent_block.attention.linear_proj",
        "mlp.recurrent_block.mlp.linear_fc1",
        "mlp.recurrent_block.mlp.linear_fc2",
        *(f"mlp.recurrent_block.norm_{number}" for number in range(1, 5)),
    ),
}

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
        MoREError: If the system is not in the table.
    """
    features, sizes = _features(config), _sizes(config)
    before, after = MODEL[:2], MODEL[2:]
    found = [entry for row in before for entry in _apply(row, None, features, sizes)]
    for layer, is_moe in enumerate(config["moe_layers"]):
        rows = (*ATTENTION, *MOE, *_experts(config)) if is_moe else (*ATTENTION, *DENSE)
        found += [entry for row in rows for entry in _apply(row, layer, features, sizes)]
    return found + [entry for row in after for entry in _apply(row, None, features, sizes)]


def extra_states(config: Config) -> Iterator[tuple[str, int | None, bool]]:
    """Yield the modules that ask a checkpoint for a state beside their parameters, a superset over the backends.

    Args:
        config: Content of `config.json`.

    Yields:
        Key of the module as in `Entry.key`, number of the layer, and whether there is a state for each expert.
    """
    yield from ((name, None, False) for name in _STATES_OF_MODEL)
    for layer, is_moe in enumerate(config["moe_layers"]):
        names = _STATES_OF_ATTENTION + (
            _STATES_OF_MOE + _STATES_OF_EXPERTS.get(config["variant"], ()) if is_moe else _STATES_OF_DENSE
        )
        for name in names:
            yield LAYERS + name.removeprefix("N "), layer, name.startswith("N ")


def _experts(config: Config) -> tuple[Row, ...]:
    variant = config["variant"]
    if variant not in EXPERTS:
        raise MoREError(f"system {variant} cannot be converted: the table knows {', '.join(EXPERTS)}")
    return EXPERTS[variant]


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
    return tuple(prod(sizes[size] for size in dimension.split("*")) for dimension in text.split())


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
        "1": 1,
        "2": 2,
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
