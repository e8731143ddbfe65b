"""The fields of `config.json`: what they mean, and what may stand in them.

`MoREConfig` and both directions of the conversion use this one description. Systems have fields of their own beside
these (`System.fields`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Config = Any
"""A `MoREConfig`, or whatever has its fields as attributes. The class itself imports the systems."""

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a word",
    list: "a list of true and false",
}


@dataclass(frozen=True)
class Field:
    """One field."""

    kind: type  # bool, int, float, str, or list for one of booleans
    default: Any  # its value if none is given, or a function of the fields before it
    meaning: str  # what it is
    low: float | None = None  # smallest number allowed
    high: float | None = None  # largest number allowed
    above: float | None = None  # number that it must exceed
    choices: tuple[str, ...] = ()  # words allowed; empty: all
    optional: bool = False  # whether it may be None
    of_calls: bool = False  # whether it is about calls of the model, and not about the model

    def fault(self, value: Any) -> str | None:
        """Return what is wrong with a value, None if nothing is."""
        if value is None and self.optional:
            return None
        if not self._has_kind(value):
            return f"must be {_WORDS[self.kind]}"
        if self.choices and value not in self.choices:
            return f"does not exist: choose one of {', '.join(self.choices)}"
        if self.low is not None and value < self.low:
            return f"must be at least {self.low}"
        if self.high is not None and value > self.high:
            return f"must be at most {self.high}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above}"
        return None

    def _has_kind(self, value: Any) -> bool:
        if self.kind is list:
            return isinstance(value, list | tuple) and all(isinstance(item, bool) for item in value)
        if isinstance(value, bool) or self.kind is not float:
            return isinstance(value, self.kind) and isinstance(value, bool) == (self.kind is bool)
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _size(default: Any, meaning: str, **limits: Any) -> Field:
    return Field(int, default, meaning, low=1, **limits)


def _choice(default: str | None, meaning: str, *choices: str, optional: bool = False) -> Field:
    return Field(str, default, meaning, choices=choices, optional=optional)


_RULE = "Turns router logits into scores."
_STRETCH = "Factor by which the context is stretched as in Llama 3.1, from 8192 positions; None: not."

FIELDS: dict[str, Field] = {
    "vocab_size": _size(32000, "Rows of the embeddings, padding of the vocabulary included."),
    "hidden_size": _size(512, "Size of a hidden state."),
    "num_hidden_layers": _size(12, "Number of layers that have weights of their own."),
    "num_attention_heads": _size(8, "Number of query heads."),
    "num_key_value_heads": _size(lambda found: found["num_attention_heads"], "Number of key and value heads."),
    "head_dim": _size(lambda found: max(found["hidden_size"] // found["num_attention_heads"], 1), "Size of a head."),
    "intermediate_size": _size(2048, "Width of the MLP in layers without experts."),
    "moe_layers": Field(list, lambda found: [True] * found["num_hidden_layers"], "Whether each layer has experts."),
    "num_experts": _size(8, "Number of routed experts in a layer; None where no layer has any.", optional=True),
    "num_experts_per_tok": _size(1, "Number of experts a token is sent to."),
    "moe_intermediate_size": _size(2048, "Width of an expert that is an MLP."),
    "shared_expert_intermediate_size": _size(None, "Width of the shared expert; None without one.", optional=True),
    "shared_expert_gate": Field(bool, False, "Whether the output of the shared expert is gated."),
    "hidden_act": Field(str, "silu", "Activation function of MLPs, by its name in transformers."),
    "gated_mlp": Field(bool, True, "Whether MLPs are gated, as in SwiGLU."),
    "norm_type": _choice("rmsnorm", "Norm of the layers.", "rmsnorm", "layernorm"),
    "norm_eps": Field(float, 1e-5, "Added to the variance in norms.", low=0.0),
    "qk_norm": Field(bool, False, "Whether queries and keys are normed."),
    "attention_bias": Field(bool, False, "Whether the projections to queries, keys and values have biases."),
    "linear_bias": Field(bool, False, "Whether the other linear maps, experts and router have biases."),
    "position_embedding": _choice("rope", "Where positions come in.", "rope", "none", "learned"),
    "rope_theta": Field(float, 10000.0, "Base of the rotary embedding.", above=0.0),
    "rotary_percent": Field(float, 1.0, "Part of each head that is rotated.", above=0.0, high=1.0),
    "rotary_interleaved": Field(bool, False, "Whether neighbouring channels rotate together, not the two halves."),
    "rope_scaling_factor": Field(float, None, _STRETCH, above=0.0, optional=True),
    "max_position_embeddings": _size(512, "Longest sequence of training; the number of learned positions."),
    "router_score_function": _choice("softmax", _RULE, "softmax", "sigmoid", "sqrtsoftplus"),
    "router_pre_softmax": Field(bool, False, "Whether the softmax comes before the choice of experts."),
    "router_scaling_factor": Field(float, None, "Factor on routing probabilities; None: 1.", above=0.0, optional=True),
    "router_num_groups": _size(None, "Number of groups of experts in group-limited routing.", optional=True),
    "router_group_topk": _size(None, "Number of groups a token may choose experts from.", optional=True),
    "router_expert_bias": Field(bool, False, "Whether a bias for each expert takes part in the choice."),
    "router_dtype": _choice("fp32", "Type the router computes in; None: the model's.", "fp32", "fp64", optional=True),
    "mean_recurrence": _size(4, "Recurrence steps taken if a call does not say how many."),
    "state_std": Field(float, 0.02, "Standard deviation of initial states.", low=0.0),
    "noise_seed": Field(int, 1234, "Seed of initial states: the seed of the training run."),
    "initializer_range": Field(float, 0.02, "Standard deviation of new weights.", low=0.0),
    "router_aux_loss_coef": Field(float, 0.001, "Coefficient of the load-balancing loss.", low=0.0),
    "output_router_logits": Field(bool, False, "Whether calls return router logits and their loss.", of_calls=True),
    "use_cache": Field(bool, True, "Whether calls return a cache.", of_calls=True),
    "tie_word_embeddings": Field(bool, False, "Whether input and output embeddings are one."),
}

LOGIT_EMA = Field(float, 0.0, "Weight of the former logits in the routing of a step.", low=0.0, high=1.0)
"""Field `router_logit_ema` of systems whose routers are asked in every step."""


def complete_fields(fields: Mapping[str, Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value for every field: the given one, or the default; either may be a function of the fields before it.

    A None that the field does not allow asks for the default, as in other configurations of transformers.
    """
    found: dict[str, Any] = {}
    for name, field in fields.items():
        value = given.get(name)
        if value is None and not (field.optional and name in given):
            value = field.default
        value = value(found) if callable(value) else value
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def check_fields(fields: Mapping[str, Field], values: Mapping[str, Any]) -> None:
    """Check each value, and that they agree with each other.

    Raises:
        ValueError: If one is missing, of the wrong type or out of range, or two contradict each other.
    """
    for name, field in fields.items():
        if name not in values and not field.of_calls:
            raise ValueError(f"it does not say {name}")
        value = values.get(name, field.default)
        fault = field.fault(value)
        if fault is not None:
            raise ValueError(f"{name} {value!r} {fault}")
    for contradiction in _contradictions(values):
        raise ValueError(contradiction)


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    layers, heads, groups = (
        values[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    )
    if len(values["moe_layers"]) != layers:
        yield f"moe_layers names {len(values['moe_layers'])} layers of {layers}"
    if heads % groups != 0:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
    if not any(values["moe_layers"]):
        return
    experts, topk = values["num_experts"], values["num_experts_per_tok"]
    groups, limit = values["router_num_groups"], values["router_group_topk"]
    if experts is None:
        yield "num_experts None must be an integer: moe_layers names layers with experts"
    if topk > experts:
        yield f"num_experts_per_tok {topk} must be at most {experts}, the number of experts"
    if (groups is None) != (limit is None):
        yield "router_num_groups and router_group_topk must be given together"
    if groups is not None and (experts % groups != 0 or limit > groups or topk % limit != 0):
        yield (
            f"router_num_groups {groups} and router_group_topk {limit} do not divide "
            f"num_experts {experts} and num_experts_per_tok {topk}"
        )
    if values["shared_expert_gate"] and values["shared_expert_intermediate_size"] is None:
        yield "shared_expert_gate true needs shared_expert_intermediate_size"
