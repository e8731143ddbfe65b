"""Huginn-0125's form, `huginn_raven`: recpre/raven_modeling_minimal.py of seal-rg/recurrent-pretraining reads it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from more_megatron.errors import MoREError
from more_megatron.systems.export import Layout, Row
from more_megatron.systems.forms import Form

if TYPE_CHECKING:
    import torch


_STATE_STD = math.sqrt(2 / 5)
# Fields of config.json, what they are called in ours, and the default of the authors' RavenConfig.
_FIELDS: dict[str, tuple[str | None, Any]] = {
    "n_embd": ("hidden_size", 5280),
    "n_heads": ("num_attention_heads", 55),
    "n_layers": ("num_hidden_layers", 8),
    "block_size": ("max_position_embeddings", 4096),
    "vocab_size": ("vocab_size", 65536),
    "intermediate_size": ("intermediate_size", 17920),
    "norm_eps": ("norm_eps", 1e-6),
    "rope_base": ("rope_theta", 50000),
    "mean_recurrence": ("mean_recurrence", 32),
    "n_layers_in_prelude": ("prelude_layers", 2),
    "n_layers_in_recurrent_block": (None, 4),
    "n_layers_in_coda": ("coda_layers", 2),
    "qk_bias": ("attention_bias", True),
    "tie_embeddings": ("tie_word_embeddings", True),
}
# Fields that the authors' code knows under one value only, or that say how it was trained.
_FIXED = {
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {
        "AutoConfig": "raven_config_minimal.RavenConfig",
        "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
    },
    "bias": False,
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "sampling_scheme": "poisson-lognormal-filling",
    "activation_checkpoint_impl": "per-iteration",
}
# Of these, what makes another model.
_OF_THE_MODEL = ("bias", "block_class_name", "norm_class_name", "mlp_class_name", "nonlin_name", "injection_type")
_OTHER_NAMES = {"hidden_size": "n_embd", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
_OTHER_NAMES |= {"tie_word_embeddings": "tie_embeddings"}


class HuginnRaven(Form):
    """The published form of Huginn-0125."""

    name = "huginn"
    system = "huginn"
    model_type = "huginn_raven"
    note = (
        "Lay `raven_config_minimal.py` and `raven_modeling_minimal.py` of "
        "[seal-rg/recurrent-pretraining](https://github.com/seal-rg/recurrent-pretraining) beside these files: "
        "`transformers` before 5 then loads the model with `trust_remote_code=True`."
    )

    def faults(self, config: Mapping[str, Any]) -> Iterator[str]:
        heads, size = config["num_attention_heads"], config["head_dim"]
        for word, is_held in (
            ("experts", not any(config["moe_layers"])),
            (f"norms of the kind {config['norm_type']}", config["norm_type"] == "rmsnorm"),
            ("norms of queries and keys", not config["qk_norm"]),
            ("biases of linear layers", not config["linear_bias"]),
            ("grouped queries", config["num_key_value_heads"] == heads),
            (
                f"{heads} heads of {size} in a hidden size of {config['hidden_size']}",
                heads * size == config["hidden_size"],
            ),
            (f"an MLP with {config['hidden_act']}", config["hidden_act"] == "silu" and config["gated_mlp"]),
            (f"positions of the kind {config['position_embedding']}", config["position_embedding"] == "rope"),
            ("rotary positions of the two halves of a head", config["rotary_interleaved"]),
            ("rotary positions on a part of a head", config["rotary_percent"] == 1.0),
            ("a stretched context", config["rope_scaling_factor"] is None),
            (f"the injection {config['injection']}", config["injection"] == "linear"),
            (f"initial states of deviation {config['state_std']}", abs(config["state_std"] - _STATE_STD) < 1e-3),
        ):
            if not is_held:
                yield f"it has no place for {word}"

    def to_form(self, config: Mapping[str, Any], args: Any) -> dict[str, Any]:
        core = config["num_hidden_layers"] - config["prelude_layers"] - config["coda_layers"]
        backprop = getattr(args, "recurrence_backprop_steps", None) or config["mean_recurrence"]
        return {
            **_FIXED,
            **{theirs: config[ours] for theirs, (ours, _) in _FIELDS.items() if ours},
            "padded_vocab_size": config["vocab_size"],
            "padding_multiple": 1,
            "num_key_value_heads": config["num_key_value_heads"],
            "head_dim": config["head_dim"],
            "n_layers_in_recurrent_block": core,
            "mean_backprop_depth": min(backprop, config["mean_recurrence"]),
            "torch_dtype": config["dtype"],
        }

    def from_form(self, found: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {_OTHER_NAMES.get(name, name): value for name, value in found.items()}
        values = {name: default for name, (_, default) in _FIELDS.items()} | renamed
        for name in _OF_THE_MODEL:
            if values.get(name, _FIXED[name]) != _FIXED[name]:
                raise MoREError(f"{name} {values[name]} is not what Huginn-0125 has, {_FIXED[name]}")
        for name, (_, default) in _FIELDS.items():
            kind = bool if isinstance(default, bool) else (int, float)
            if not isinstance(values[name], kind) or isinstance(values[name], bool) != isinstance(default, bool):
                raise MoREError(f"{name} {values[name]!r} must be {'true or false' if kind is bool else 'a number'}")
        around = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
        layers = sum(values[name] for name in around)
        return {
            "variant": self.system,
            **{ours: values[theirs] for theirs, (ours, _) in _FIELDS.items() if ours},
            "num_hidden_layers": layers,
            "moe_layers": [False] * layers,
            "num_experts": None,
            "moe_intermediate_size": values["intermediate_size"],
            "rotary_interleaved": True,
            "injection": "linear",
            "state_std": round(_STATE_STD, 3),
        }

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        adapter = f"decoder.loops.{int(config['prelude_layers'] > 0)}.adapter"
        ours, embedding, head = "embedding.word_embeddings.weight", "transformer.wte.weight", "lm_head.weight"
        return (
            Row(ours, f"{{{embedding},{head}}}", "V h", layout=Layout.TWICE, when="tied"),
            Row(ours, embedding, "V h", when="!tied"),
            Row(adapter, "transformer.adapter.weight", "h 2*h"),
            Row("decoder.final_layernorm.weight", "transformer.ln_f.weight", "h"),
            Row("output_layer.weight", head, "V h", when="!tied"),
        )

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        qkv = "self_attention.linear_qkv"
        return (
            Row(f"{qkv}.layer_norm_weight", "norm_1.weight", "h"),
            Row(f"{qkv}.weight", "attn.Wqkv.weight", "qkv h", layout=Layout.QKV_IN_ONE),
            Row(f"{qkv}.bias", "attn.qk_bias", "qkv", view="2 1 n d", layout=Layout.QK_BIAS, when="qkv_bias"),
            Row("self_attention.linear_proj.weight", "attn.proj.weight", "h q"),
            Row("post_attention_norm.weight", "norm_2.weight", "h"),
            Row("mlp.linear_fc1.layer_norm_weight", "norm_3.weight", "h"),
            Row("mlp.linear_fc1.weight", "mlp.fc.weight", "2*f h"),
            Row("mlp.linear_fc2.weight", "mlp.proj.weight", "h f"),
            Row("post_mlp_norm.weight", "norm_4.weight", "h"),
        )

    def layer_prefix(self, config: Mapping[str, Any], layer: int) -> str:
        prelude, layers = config["prelude_layers"], config["num_hidden_layers"]
        coda = layers - config["coda_layers"]
        if layer < prelude:
            return f"transformer.prelude.{layer}."
        return f"transformer.core_block.{layer - prelude}." if layer < coda else f"transformer.coda.{layer - coda}."

    def buffers(self, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return cosine and sine of the rotary angles, float32 [1, positions, 1, planes, 2]."""
        import torch

        size, positions = config["head_dim"], config["max_position_embeddings"]
        frequencies = 1.0 / (config["rope_theta"] ** (torch.arange(0, size, 2)[: size // 2].float() / size))
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        return {"freqs_cis": torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None].contiguous()}


FORM = HuginnRaven()
