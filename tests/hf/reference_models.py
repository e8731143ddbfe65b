"""Small models as Megatron computes them, and the same ones in transformers."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel

from more_megatron.hf.exported.configuration_more import MoREConfig
from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.system import find_system, system_names
from more_megatron.hf.mapping import entries
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.systems import get_system
from tests.helpers.models import build_model, small_config, start_ranks

SYSTEMS = system_names()

VOCABULARY, LENGTH, BATCH, HIDDEN, LAYERS = 40, 24, 2, 32, 2
STEPS = (1, 4, 8)
# Megatron's parameters and results on the way between processes.
Result = tuple[dict[str, np.ndarray], dict[int, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One model."""

    name: str  # what is special about it
    variant: str  # name of the system
    megatron: dict[str, Any] = field(default_factory=dict)  # fields of the training code's configuration
    gpt: dict[str, Any] = field(default_factory=dict)  # arguments of Megatron's `GPTModel`
    hf: dict[str, Any] = field(default_factory=dict)  # fields of the configuration in transformers


def _top1(variant: str) -> Case:
    return Case("top-1", variant, {"moe_router_topk": 1}, hf={"router_pre_softmax": True})


def free(variant: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a configuration in transformers without those that a system knows under one value only."""
    return {name: value for name, value in fields.items() if name not in find_system(variant).fixed}


# Fields of the training code, by those in transformers of the same meaning.
_SAME = {"num_key_value_heads": "num_query_groups", "qk_norm": "qk_layernorm"}


def _top2(variant: str) -> Case:
    """Two experts a token, and everything else different from the default too."""
    fixed = {_SAME.get(name) for name in find_system(variant).fixed}
    megatron = {
        "moe_router_topk": 2,
        "num_query_groups": 2,
        "kv_channels": 12,
        "qk_layernorm": True,
        "rotary_interleaved": True,
        "moe_shared_expert_intermediate_size": 24,
        "moe_shared_expert_gate": True,
        "recurrence_state_std": 0.5,
        "recurrence_ffn_hidden_size": None if get_system(variant).block_width is None else 40,
        "seed": 77,
    }
    in_transformers = {
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "qk_norm": True,
        "rotary_interleaved": True,
        "rotary_percent": 0.5,
        "rope_theta": 500,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gate": True,
        "recurrent_intermediate_size": 40,
        "state_std": 0.5,
        "noise_seed": 77,
    }
    return Case(
        "top-2",
        variant,
        {name: value for name, value in megatron.items() if name not in fixed},
        {"rotary_percent": 0.5, "rotary_base": 500},
        free(variant, in_transformers),
    )


def _layernorm(variant: str) -> Case:
    return Case(
        "LayerNorm and learned positions",
        variant,
        {"normalization": "LayerNorm", "add_qkv_bias": True, "qk_layernorm": True},
        {"position_embedding_type": "learned_absolute"},
        {
            "norm_type": "layernorm",
            "attention_bias": True,
            "qk_norm": True,
            "position_embedding": "learned",
            "router_pre_softmax": True,
        },
    )


_UNIVERSAL = {
    "num_moe_experts": None,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": False,
    "activation_func": torch.nn.functional.gelu,
}
_UNIVERSAL_IN_TRANSFORMERS = {
    "moe_layers": [False] * LAYERS,
    "norm_type": "layernorm",
    "norm_eps": 1e-6,
    "gated_mlp": False,
    "hidden_act": "relu",
    "position_embedding": "none",
    "tie_word_embeddings": True,
}

CASES = (
    *(make(variant) for variant in SYSTEMS for make in (_top1, _top2)),
    Case(
        "groups of experts",
        "recurrent_experts",
        {
            "moe_router_topk": 2,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": 2,
            "moe_router_group_topk": 1,
            "moe_router_topk_scaling_factor": 1.5,
        },
        hf={
            "num_experts_per_tok": 2,
            "router_score_function": "sigmoid",
            "router_expert_bias": True,
            "router_num_groups": 2,
            "router_group_topk": 1,
            "router_scaling_factor": 1.5,
        },
    ),
    Case(
        "logit average and scale",
        "recurrent_moe",
        {"router_logit_ema": 0.6, "recurrence_residual_scale": 0.5, "moe_layer_freq": [0, 1]},
        hf={
            "router_pre_softmax": True,
            "router_logit_ema": 0.6,
            "residual_scale": 0.5,
            "moe_layers": [False, True],
        },
    ),
    Case(
        "biases, no gate, tied",
        "moe",
        {
            "moe_router_topk": 2,
            "add_bias_linear": True,
            "gated_linear_unit": False,
            "activation_func": torch.nn.functional.gelu,
            "moe_layer_freq": [1, 0],
        },
        {"share_embeddings_and_output_weights": True, "rope_scaling": True, "rope_scaling_factor": 4.0},
        {
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "linear_bias": True,
            "gated_mlp": False,
            "hidden_act": "gelu",
            "moe_layers": [True, False],
            "tie_word_embeddings": True,
            "rope_scaling_factor": 4.0,
        },
    ),
    Case(
        "whole, dense",
        "loop",
        {"num_layers": 2, "num_moe_experts": None},
        hf={"moe_layers": [False, False]},
    ),
    Case(
        "in place",
        "loop",
        {"num_layers": 3, "router_logit_ema": 0.5, "recurrence_prelude_layers": 1, "recurrence_group_layers": 1},
        hf={
            "num_hidden_layers": 3,
            "router_pre_softmax": True,
            "router_logit_ema": 0.5,
            "prelude_layers": 1,
            "group_layers": 1,
        },
    ),
    *(
        Case(
            f"core, {injection}",
            variant,
            {
                "num_layers": 3,
                "num_moe_experts": None,
                "recurrence_prelude_layers": prelude,
                "recurrence_coda_layers": 1 - prelude,
                "recurrence_injection": injection,
                "recurrence_state_std": 0.632,
                "rotary_interleaved": True,
                "add_qkv_bias": True,
                "layernorm_epsilon": 1e-6,
            },
            {"share_embeddings_and_output_weights": True, "rotary_base": 50000},
            {
                "num_hidden_layers": 3,
                "moe_layers": [False] * 3,
                "prelude_layers": prelude,
                "coda_layers": 1 - prelude,
                "injection": injection,
                "state_std": 0.632,
                "rotary_interleaved": True,
                "attention_bias": True,
                "norm_eps": 1e-6,
                "rope_theta": 50000,
                "tie_word_embeddings": True,
            },
        )
        for variant in ("loop", "huginn")
        for injection, prelude in (("linear", 1), ("add", 0))
    ),
    Case(
        "prelude, core, coda",
        "huginn",
        {"num_layers": 4, "moe_router_topk": 2, "moe_layer_freq": [0, 1, 1, 0], "router_logit_ema": 0.5},
        {"position_embedding_type": "learned_absolute"},
        {
            "num_hidden_layers": 4,
            "num_experts_per_tok": 2,
            "moe_layers": [False, True, True, False],
            "router_logit_ema": 0.5,
            "prelude_layers": 1,
            "coda_layers": 1,
            "position_embedding": "learned",
        },
    ),
    Case(
        "nothing injected",
        "huginn",
        {"num_layers": 3, "recurrence_injection": "none", "normalization": "LayerNorm"},
        hf={
            "num_hidden_layers": 3,
            "router_pre_softmax": True,
            "prelude_layers": 1,
            "coda_layers": 1,
            "injection": "none",
            "norm_type": "layernorm",
        },
    ),
    *(
        Case(
            f"{time}, {'behind' if post_norm else 'in front'}, {halting}",
            "universal",
            {
                **_UNIVERSAL,
                "universal_time_signal": time,
                "universal_post_norm": post_norm,
                **({"halting": "none"} if halting == "none" else {"halting_output": halting}),
            },
            {"position_embedding_type": "none", "share_embeddings_and_output_weights": True},
            {
                **_UNIVERSAL_IN_TRANSFORMERS,
                "time_signal": time,
                "post_norm": post_norm,
                **({"halting": "none"} if halting == "none" else {"halting_output": halting}),
            },
        )
        for time, post_norm, halting in (
            ("learned", False, "accumulated"),
            ("learned", True, "none"),
            ("sinusoid", True, "accumulated"),
            ("sinusoid", False, "basic"),
        )
    ),
    *(
        Case(
            f"{experts} experts a head",
            "moeut",
            {"moe_router_topk": 2, "switchhead_num_experts": experts, "kv_channels": 12, "normalization": "LayerNorm"},
            {"rotary_percent": 0.5},
            {
                "num_experts_per_tok": 2,
                "num_head_experts": experts,
                "head_dim": 12,
                "norm_type": "layernorm",
                "rotary_percent": 0.5,
            },
        )
        for experts in (1, 4)
    ),
    _layernorm("shared_block"),
    _layernorm("shared_block_ffn"),
)


def tokens() -> torch.Tensor:
    """Return a text, [b, s]."""
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def compute(names: list[tuple[str, str]]) -> list[Result]:
    """Return the parameters of Megatron's models and their logits at each number of steps; runs in a rank.

    Args:
        names: System and name of the cases.
    """
    start_ranks()
    by_name = {(case.variant, case.name): case for case in CASES}
    return [_compute(by_name[name]) for name in names]


def _compute(case: Case) -> Result:
    defaults = {"hidden_size": HIDDEN, "num_layers": LAYERS, "recurrence_steps": max(STEPS)}
    config = small_config(case.variant, **{**defaults, **case.megatron})
    model = build_model(config, LENGTH, VOCABULARY, **case.gpt).eval()
    _redraw(model, 0.2)
    ids = tokens()
    positions = torch.arange(LENGTH).expand_as(ids)
    with torch.no_grad():
        logits = {
            steps: model(ids, positions, None, extra_block_kwargs=MicroBatch(Depth(steps, 0)).block_kwargs())
            for steps in STEPS
        }
    return _global_tensors(model), {steps: value.numpy() for steps, value in logits.items()}


@torch.no_grad()
def _redraw(module: torch.nn.Module, std: float) -> None:
    """Draw all weights anew: large enough for every part to have its say, norms that are not the identity."""
    generator = torch.Generator().manual_seed(7)
    buffers = [(name, buffer) for name, buffer in module.named_buffers() if name.endswith("expert_bias")]
    for name, tensor in [*module.named_parameters(), *buffers]:
        noise = torch.randn(tensor.shape, generator=generator) * std
        is_norm = "norm" in name and not name.endswith("bias")
        # Positions that halt late, some never.
        tensor.copy_(noise + (1.0 if is_norm else -2.0 if name.endswith("halting.bias") else 0.0))


@torch.no_grad()
def _global_tensors(model: GPTModel) -> dict[str, np.ndarray]:
    """Return the tensors that a checkpoint of the model holds, by key."""
    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    tensors: dict[str, torch.Tensor] = {}
    for part in _sharded_tensors(sharded):
        tensor = tensors.setdefault(part.key, torch.empty(part.global_shape))
        tensor[part.global_slice()] = part.data
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def _sharded_tensors(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _sharded_tensors(branch)


def load(case: Case, parameters: dict[str, np.ndarray]) -> MoREForCausalLM:
    """Return the model in transformers with Megatron's parameters."""
    config = _hf_config(case.variant, **case.hf)
    state = {}
    for entry in entries(config.to_dict()):
        tensor = torch.from_numpy(_of_layer(parameters, entry.key, entry.layer))
        state.update(zip(entry.names, entry.split(tensor), strict=True))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = MoREForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _of_layer(parameters: dict[str, np.ndarray], key: str, layer: int | None) -> np.ndarray:
    """Return a tensor of one layer; layers that differ in kind have keys of their own."""
    if layer is None or key in parameters:
        return parameters[key] if layer is None else parameters[key][layer]
    return parameters[re.sub("layers", f"layers.{layer}", key, count=1)]


def _hf_config(variant: str, **fields: Any) -> MoREConfig:
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_experts": 4,
        # As in `small_config`.
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "norm_type": "rmsnorm",
        "rotary_percent": 1.0,
        "max_position_embeddings": LENGTH,
    }
    return MoREConfig(variant=variant, **{**defaults, **fields})


def random_model(variant: str, **fields: Any) -> MoREForCausalLM:
    """Return a model with two experts a token and weights large enough for every part to have its say.

    Args:
        variant: Name of the system.
        fields: What differs in its configuration.
    """
    defaults = {"num_experts_per_tok": 2, "num_key_value_heads": 2, "mean_recurrence": 3, "state_std": 0.5}
    model = MoREForCausalLM(_hf_config(variant, **free(variant, {**defaults, **fields}))).eval()
    _redraw(model, 0.15)
    return model
