"""How weights are called outside: the rows of the name table, and those that several systems have.

A row names one parameter in both worlds. The sizes in the table:

    V vocabulary   P positions   h hidden   q heads x d   k groups x d   qkv q + 2 k   d head size   n heads
    f dense MLP    N experts     m expert MLP             e shared expert              R MLP of a recurrent block

A system may add sizes of its own (`System.sizes`), and features that rows ask for (`System.features`).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Layout(Enum):
    """How one tensor of Megatron's is made of tensors of the Hugging Face model."""

    WHOLE = auto()  # one tensor; the shapes may differ by a view
    HALVES = auto()  # two tensors below each other: a gate and what it gates
    QKV = auto()  # three tensors interleaved: for each query group its queries, then its key, then its value
    QKV_IN_ONE = auto()  # one tensor: all queries, then all keys, then all values
    QK_BIAS = auto()  # one tensor, [2, 1, heads, d]: the biases of queries and of keys; those of values are zero
    TWICE = auto()  # the same tensor under each name; to read, one of them is enough


@dataclass(frozen=True)
class Row:
    """One parameter."""

    megatron: str  # its key in a checkpoint, within the layer or the model
    hf: str  # its name within the layer or the model; `{a,b}` names several that Megatron keeps in one
    shape: str  # Megatron's, of sizes from the list above: `2*f h` has two dimensions
    view: str = ""  # shape in the Hugging Face model where it is another view of a whole tensor
    layout: Layout = Layout.WHOLE  # how the tensors of several names are put together
    when: str = ""  # features a model must have for the row to apply; `!` before one that it must not have
    fp32: bool = False  # whether it stays in float32, whatever the rest is cast to


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

# The same where the MLP has biases whatever other linear maps have.
DENSE_WITH_BIASES = tuple(dataclasses.replace(row, when=row.when.removesuffix("bias").strip()) for row in DENSE)

# What every layer with experts has, whatever its experts are.
MOE = (
    Row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "h"),
    Row("pre_mlp_layernorm.bias", "post_attention_layernorm.bias", "h", when="layernorm"),
    Row("mlp.router.weight", "mlp.gate.weight", "N h"),
    Row("mlp.router.bias", "mlp.gate.bias", "N", when="bias"),
    Row("mlp.router.expert_bias", "mlp.gate.expert_bias", "N", when="expert_bias", fp32=True),
    *(
        Row(f"mlp.shared_experts.{megatron}", f"mlp.{hf}.weight", shape, layout=layout, when=when)
        for megatron, hf, shape, layout, when in (
            ("linear_fc1.weight", "shared_expert.{gate,up}_proj", "2*e h", Layout.HALVES, "shared_expert gated"),
            ("linear_fc1.weight", "shared_expert.up_proj", "e h", Layout.WHOLE, "shared_expert !gated"),
            ("linear_fc2.weight", "shared_expert.down_proj", "h e", Layout.WHOLE, "shared_expert"),
            ("gate_weight", "shared_expert_gate", "1 h", Layout.WHOLE, "shared_expert_gate"),
        )
    ),
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

# A feed-forward network with biases for each expert, beside a cell.
CELL_FEED_FORWARD = (
    Row("mlp.experts.ffn.fc1.weight", "mlp.experts.fc1", "N m h"),
    Row("mlp.experts.ffn.fc1.bias", "mlp.experts.fc1_bias", "N m"),
    Row("mlp.experts.ffn.fc2.weight", "mlp.experts.fc2", "N h m"),
    Row("mlp.experts.ffn.fc2.bias", "mlp.experts.fc2_bias", "N h"),
)

# The norms of a sandwich layer behind its two parts.
SANDWICH = (
    Row("post_attention_norm.weight", "attention_output_norm.weight", "h"),
    Row("post_attention_norm.bias", "attention_output_norm.bias", "h", when="layernorm"),
    Row("post_mlp_norm.weight", "mlp_output_norm.weight", "h"),
    Row("post_mlp_norm.bias", "mlp_output_norm.bias", "h", when="layernorm"),
)


def block_rows(megatron: str, hf: str, groups: str) -> tuple[Row, ...]:
    """Return the rows of the recurrent blocks of all experts (`N`), or of the one that they share (`1`)."""
    shapes = {"adapter": "h 2*h", "qkv": "qkv h", "proj": "h q", "fc1": "2 R h", "fc2": "h R"}
    norms = ("h", "") if groups == "1" else (f"{groups}*h", f"{groups} h")
    return (
        *(
            Row(f"{megatron}.{name}", f"{hf}.{name}", f"{groups} {shape}", view=shape if groups == "1" else "")
            for name, shape in shapes.items()
        ),
        *(Row(f"{megatron}.{norm}", f"{hf}.{norm}", *norms) for norm in (f"norm_{number}" for number in range(1, 5))),
    )


def adapter_rows(config: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return the rows of the adapters of looped groups, which Megatron's keys number among all groups of a stack.

    Without `group_layers` in config.json there is one looped group.
    """
    if config["injection"] != "linear":
        return ()
    prelude, core = config["prelude_layers"], config["num_hidden_layers"] - config["coda_layers"]
    core -= prelude
    groups, first = core // (config.get("group_layers") or core), int(prelude > 0)
    return tuple(
        Row(f"decoder.loops.{first + number}.adapter", f"model.loops.{number}.adapter.weight", "h 2*h")
        for number in range(groups)
    )


def states(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return the modules of rows that ask a checkpoint for a state beside their parameters.

    It is empty outside FP8. Linear layers ask under both backends, norms and attention under Transformer Engine. `N `
    before a name: one state an expert.
    """
    found: dict[str, None] = {}
    for row in rows:
        module = row.megatron.rpartition(".")[0]
        path, _, name = module.rpartition(".")
        if name.startswith("linear_") or "norm" in name:
            found[f"N {module}" if row.shape.startswith("N ") else module] = None
        if name == "linear_qkv":
            found[f"{path}.core_attention"] = None
    return tuple(found)
