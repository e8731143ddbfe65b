"""MoEUT: a group of layers repeated, SwitchHead attention and sigma-MoE in peri-layernorm layers.

Csordas et al., arXiv 2405.16039. `--num-layers` is the size of the group, `--recurrence-steps` how often it runs.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.blocks.refusals import expert_refusals, loop_refusals
from more_megatron.errors import MoREError
from more_megatron.flags import MoREFlags, check_ranges, flag
from more_megatron.systems.base import DEPTH, MEGATRONS_INITIALIZATION, System
from more_megatron.systems.export import MODEL, MOE, Row, states

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.ranges import Ends

# H heads, E experts of a head.
_ATTENTION = (
    Row("input_layernorm.weight", "input_layernorm.weight", "h"),
    Row("input_layernorm.bias", "input_layernorm.bias", "h", when="layernorm"),
    Row("self_attention.query_key.weight", "self_attn.query_key.weight", "2*q h"),
    Row("self_attention.value_router.weight", "self_attn.value_router.weight", "H*E h", when="head_experts"),
    Row("self_attention.output_router.weight", "self_attn.output_router.weight", "H*E h"),
    Row("self_attention.value.weight", "self_attn.value.weight", "H*E d h", when="head_experts"),
    Row("self_attention.value.weight", "self_attn.value.weight", "q h", when="!head_experts"),
    Row("self_attention.output.weight", "self_attn.output.weight", "H*E h d", when="head_experts"),
    Row("self_attention.output.weight", "self_attn.output.weight", "h q", when="!head_experts"),
)
_EXPERTS = (
    Row("mlp.experts.keys", "mlp.experts.keys", "N m h"),
    Row("mlp.experts.values", "mlp.experts.values", "N h m"),
)


@dataclass
class MoEUTFlags:
    """The experts of attention heads, and how the use of all experts is balanced."""

    switchhead_num_experts: int = 8
    """Experts of each attention head for its values, and as many for its outputs. 1: dense, with gated heads."""

    switchhead_topk: int = 2
    """Experts for values, and for outputs, that a head uses for a token."""

    switchhead_balance_coeff: float = 0.001
    """Coefficient of the entropy of the routers of attention heads, of values and of outputs each."""

    switchhead_expert_dropout: float = 0.0
    """Probability that an attention head cannot choose an expert for a token."""

    moeut_balance_coeff: float = 0.01
    """Coefficient of the entropy of the routers of MoE layers."""

    moeut_expert_dropout: float = 0.0
    """Probability that a token cannot choose an expert of an MoE layer."""

    def check(self) -> None:
        """Check the fields."""
        check_ranges(self, dict.fromkeys(("switchhead_balance_coeff", "moeut_balance_coeff"), "[0, inf)"))
        check_ranges(self, dict.fromkeys(("switchhead_expert_dropout", "moeut_expert_dropout"), "[0, 1)"))
        check_ranges(self, {"switchhead_num_experts": "[1, inf)"})
        if self.switchhead_num_experts > 1 and not 1 <= self.switchhead_topk <= self.switchhead_num_experts:
            raise MoREError(
                f"--switchhead-topk {self.switchhead_topk} must be from 1 to --switchhead-num-experts "
                f"{self.switchhead_num_experts}"
            )


class MoEUT(System):
    """A group of peri-layernorm layers repeated; its increments of the first steps are constants."""

    name = "moeut"
    summary = "a group of layers repeated: SwitchHead attention, sigma-MoE"
    reads = DEPTH
    Flags = MoEUTFlags
    defaults: ClassVar[Mapping[str, Any]] = {
        "normalization": "LayerNorm",
        "rotary_percent": 0.5,
        "moe_ffn_hidden_size": 128,
        "moe_shared_expert_intermediate_size": 0,
        "moe_router_score_function": "sigmoid",
    }

    fields: ClassVar[Mapping[str, str]] = {
        "num_head_experts": "switchhead_num_experts",
        "num_head_experts_per_tok": "switchhead_topk",
        "head_balance_coef": "switchhead_balance_coeff",
        "balance_coef": "moeut_balance_coeff",
    }

    @property
    def repeats_router(self) -> bool:
        return True

    def without_effect(self, flags: MoREFlags, given: Set[str]) -> Iterator[str]:
        yield from super().without_effect(flags, given)
        of_experts = {name for name in self.own_flags() if name.startswith("switchhead")} - {"switchhead_num_experts"}
        if getattr(flags, "switchhead_num_experts", None) == 1:
            for name in sorted(given & of_experts):
                yield f"{flag(name)} has no effect while --switchhead-num-experts is 1: leave it out"

    def unread(self, args: Any) -> Set[str]:
        return MEGATRONS_INITIALIZATION

    def refusals(self, config: "MoREConfig") -> Iterator[str]:
        yield from loop_refusals(config)
        yield from expert_refusals(config, ffn_hidden_size=None)
        yield from _layer_refusals(config)

    def losses(self, config: "MoREConfig") -> tuple[str, ...]:
        """Return the names of losses that are logged: minus the entropies, at least -log of the number of experts."""
        heads = () if config.switchhead_num_experts == 1 else ("value_balance_loss", "output_balance_loss")
        return ("expert_balance_loss", *heads)

    def health_ranges(self, config: "MoREConfig") -> "Mapping[str, Ends | None]":
        """Return the healthy ranges of its figures: of sigmoids, and of many small experts in one batch, none."""
        from more_megatron.monitoring.ranges import OF_SOFTMAX

        return dict.fromkeys((*OF_SOFTMAX, "routing/dead experts"))

    def figures(self, config: "MoREConfig") -> tuple[str, ...]:
        from more_megatron.blocks.statistics import router_figures
        from more_megatron.blocks.switchhead import ROUTER_KINDS

        heads = () if config.switchhead_num_experts == 1 else ROUTER_KINDS
        return router_figures(config.max_steps, ("", *heads))

    def stack(self, config: "MoREConfig") -> "Stack":
        from more_megatron.blocks.backends import backend_of
        from more_megatron.blocks.peri_layer import peri_layer
        from more_megatron.model.initialization import draw_as_moeut
        from more_megatron.model.loops import ResidualLoop
        from more_megatron.model.stack import Group, Loop, Stack

        layers = (peri_layer(config),) * config.num_layers
        groups = (Group(layers, Loop(ResidualLoop)),)
        return Stack(config, groups, backend_of(config).norm(), head_bias=True, initialize=draw_as_moeut)

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        return (*MODEL, Row("output_layer.bias", "lm_head.bias", "V"))

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        return (*_ATTENTION, *MOE, *_EXPERTS)

    def layer_states(self, config: Mapping[str, Any], layer: int) -> tuple[str, ...]:
        linear = ("query_key", "core_attention", *(("value", "output") if config["num_head_experts"] == 1 else ()))
        return (*(f"self_attention.{name}" for name in linear), *states(MOE))

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        return {"H": config["num_attention_heads"], "E": config["num_head_experts"]}

    def features(self, config: Mapping[str, Any]) -> set[str]:
        return {"head_experts"} if config["num_head_experts"] > 1 else set()


def _layer_refusals(config: "MoREConfig") -> Iterator[str]:
    if config.num_moe_experts is None:
        yield "is a mixture of experts: give --num-experts"
    if config.moe_layer_freq not in (1, [1] * config.num_layers):
        yield "has experts in every layer: leave out --moe-layer-freq"
    if config.num_query_groups != config.num_attention_heads:
        yield "gives every head keys and values of its own: leave out --group-query-attention"
    recomputed = config.recompute_modules if config.recompute_granularity == "selective" else None
    if "layernorm" in (recomputed or ()):
        yield "keeps its norms, which several parts read: leave layernorm out of --recompute-modules"
    if config.moe_shared_expert_overlap:
        yield "has a shared expert that reads what the others do not: leave out --moe-shared-expert-overlap"
    for name, is_set in (
        ("--qk-layernorm", config.qk_layernorm),
        ("--qk-l2-norm", config.qk_l2_norm),
        ("--add-qkv-bias", config.add_qkv_bias),
        ("--attention-output-gate", config.attention_output_gate),
        ("--fine-grained-activation-offloading", config.fine_grained_activation_offloading),
    ):
        if is_set:
            yield f"has an attention of its own, which does not know {name}: leave it out"


SYSTEM = MoEUT()
