"""Universal Transformer (Dehghani et al., arXiv 1807.03819) as a causal language model, as Tensor2Tensor computes it.

    s <- s + Pos + Time_t,   s <- s + MHA(LN s),   s <- s + FFN(LN s)

One group of layers is repeated, with position and time signals in front of every pass. Each position halts by itself.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from more_megatron.blocks.refusals import loop_refusals
from more_megatron.flags import MoREFlags, check_ranges, flag
from more_megatron.systems.base import DEPTH, MEGATRONS_INITIALIZATION, REPEATED_ROUTER, System
from more_megatron.systems.export import ATTENTION, DENSE_WITH_BIASES, MODEL, MOE, SANDWICH, Row

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.ranges import Ends

# Read only while positions halt.
_OF_HALTING = ("halting_epsilon", "halting_output", "ponder_coeff")


@dataclass
class UniversalFlags:
    """How positions halt, and the forms of the layer."""

    halting: Literal["act", "none"] = "act"
    """How positions of a Universal Transformer end: each by itself, after at most --recurrence-max-steps (default:
    --recurrence-steps) in training and --recurrence-eval-steps in evaluation; or none, all after as many steps as other
    recurrences take."""

    halting_epsilon: float = 0.01
    """A position halts when the sum of its halting probabilities exceeds one minus this."""

    halting_output: Literal["accumulated", "basic"] = "accumulated"
    """Output of a position: the sum of its states, weighted by the halting probabilities; or, as in Tensor2Tensor, in
    every step moved by the weight towards the new state."""

    ponder_coeff: float = 0.01
    """Coefficient of the ponder cost: steps until a position halts plus the remainder of its probabilities."""

    universal_post_norm: bool = False
    """Norms behind the residual sums, as in the paper, not in front of attention and feed-forward part."""

    universal_time_signal: Literal["learned", "sinusoid"] = "learned"
    """Signal of the number of the step: a learned table, or the sinusoid, which has no largest step."""

    @property
    def mean_steps(self) -> int:
        """Number of steps in training: the limit, where positions halt by themselves."""
        flags: Any = self
        if self.halting == "act" and flags.recurrence_max_steps is not None:
            return flags.recurrence_max_steps
        return super().mean_steps  # type: ignore[misc]

    def check(self) -> None:
        """Check the fields, and settle what Megatron has no flag for."""
        import torch
        from megatron.core.utils import init_method_normal

        check_ranges(self, {"halting_epsilon": "[0, 1)", "ponder_coeff": "[0, inf)"})
        config: Any = self
        # What Megatron takes where no flag names another.
        if config.activation_func is torch.nn.functional.gelu:
            config.activation_func = torch.nn.functional.relu
        if config.embedding_init_method_std == config.init_method_std:
            config.embedding_init_method = init_method_normal(config.hidden_size**-0.5)


class UniversalTransformer(System):
    """A group of layers of the original transformer, repeated until each position has halted."""

    name = "universal"
    summary = "Universal Transformer: a shared layer with position and time signals, ACT halting"
    reads = DEPTH | REPEATED_ROUTER
    Flags = UniversalFlags
    activation = "relu"
    comparable: ClassVar[Mapping[str, str]] = {"halting": "none", "universal_time_signal": "sinusoid"}
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_experts": None,
        "untie_embeddings_and_output_weights": False,
        "position_embedding_type": "none",
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-6,
        "swiglu": False,
    }

    fields: ClassVar[Mapping[str, str]] = {
        **{name: name for name in ("halting", "halting_epsilon", "halting_output")},
        "ponder_coef": "ponder_coeff",
        "time_signal": "universal_time_signal",
        "post_norm": "universal_post_norm",
        "training_steps": "recurrence_steps",
    }

    def without_effect(self, flags: MoREFlags, given: Set[str]) -> Iterator[str]:
        own: Any = flags
        if own.halting == "none":
            for name in sorted(given & set(_OF_HALTING)):
                yield f"{flag(name)} has no effect while --halting is none: give act, or leave the flag out"
        else:
            yield from _without_effect_on_halting(own, given)
            given = given - {"recurrence_max_steps"}
        yield from super().without_effect(flags, given)

    def unread(self, args: Any) -> Set[str]:
        # A head of its own would read them.
        has_head = args.untie_embeddings_and_output_weights
        return frozenset() if has_head else MEGATRONS_INITIALIZATION - {"embedding_init_method_std"}

    def refusals(self, config: Any) -> Iterator[str]:
        yield from loop_refusals(config)
        if config.add_bias_linear:
            yield "has biases in its feed-forward part as it is, and none elsewhere: leave out --enable-bias-linear"
        if config.hidden_size % 2 != 0:
            yield f"has as many sines as cosines in its signals: --hidden-size {config.hidden_size} must be even"
        if config.universal_time_signal == "learned" and config.deepest_evaluation > config.max_steps:
            yield (
                f"learns a time signal for the {config.max_steps} steps of training, and is to be evaluated at "
                f"{config.deepest_evaluation}: lower --recurrence-eval-steps and --recurrence-eval-depths, train with "
                "more, or give --universal-time-signal sinusoid"
            )

    def stack(self, config: Any) -> "Stack":
        from more_megatron.blocks.backends import backend_of
        from more_megatron.blocks.classic_layers import classic_layers
        from more_megatron.model.halting import Halting, halting_cost
        from more_megatron.model.loops import ResidualLoop, Signals, signals_cost
        from more_megatron.model.stack import Group, Loop, Stack

        steps = config.max_steps if config.universal_time_signal == "learned" else None
        parts: dict[str, Any] = {"signals": functools.partial(Signals, learned_steps=steps)}
        cost = signals_cost(config, steps)
        if config.halting == "act":
            parts["halting"] = functools.partial(
                Halting,
                epsilon=config.halting_epsilon,
                accumulates=config.halting_output == "accumulated",
                ponder_coeff=config.ponder_coeff,
            )
            cost += halting_cost(config)
        loop = Loop(functools.partial(ResidualLoop, **parts), cost)
        return Stack(
            config,
            (Group(classic_layers(config, post_norm=config.universal_post_norm), loop),),
            norm=None if config.universal_post_norm else backend_of(config).norm(),
            embedding_scale=math.sqrt(config.hidden_size),
        )

    def figures(self, config: Any) -> tuple[str, ...]:
        from more_megatron.model.halting import HALTING_FIGURES

        return (*super().figures(config), *(HALTING_FIGURES if config.halting == "act" else ()))

    def health_ranges(self, config: "MoREConfig") -> "Mapping[str, Ends]":
        """Return the healthy ranges of its figures: signals that are added in every pass make all states alike."""
        return {"recurrence/token correlation": (None, 0.998), "system/steps to halt": (1.05, None)}

    def architecture(self, args: Any) -> dict[str, Any]:
        flags: Any = self.flags(args)
        names = ("halting", "universal_post_norm", "universal_time_signal")
        learned = {"recurrence_max_steps": flags.max_steps} if flags.universal_time_signal == "learned" else {}
        return {name: getattr(flags, name) for name in names} | learned

    def config_fields(self, args: Any) -> dict[str, Any]:
        flags: Any = self.flags(args)
        return super().config_fields(args) | {"training_steps": flags.max_steps}

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        rows = [row for row in MODEL if not (config["post_norm"] and "final_layernorm" in row.megatron)]
        if config["time_signal"] == "learned":
            rows.append(Row("decoder.loops.0.signals.time", "model.loops.0.time", "T h"))
        if config["halting"] == "act":
            rows.append(Row("decoder.loops.0.halting.weight", "model.loops.0.halting.weight", "1 h"))
            rows.append(Row("decoder.loops.0.halting.bias", "model.loops.0.halting.bias", "1"))
        return tuple(rows)

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        feed_forward = (*MOE, *self.expert_rows) if config["moe_layers"][layer] else DENSE_WITH_BIASES
        rows = (*ATTENTION, *feed_forward)
        return (*filter(_is_no_norm_in_front, rows), *SANDWICH) if config["post_norm"] else rows

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        return {"T": config["training_steps"]}


def _is_no_norm_in_front(row: Row) -> bool:
    return not row.hf.startswith(("input_layernorm.", "post_attention_layernorm."))


def _without_effect_on_halting(flags: Any, given: Set[str]) -> Iterator[str]:
    """Yield the flags of depth that were given and mean nothing where each position chooses its own."""
    unread = {"recurrence_sampling"} if flags.recurrence_sampling != "fixed" else set()
    if flags.recurrence_max_steps is not None:
        unread |= {"recurrence_steps", "recurrence_curriculum"}
    for name in sorted(unread & given):
        yield (
            f"{flag(name)} has no effect while each position halts by itself, after at most --recurrence-max-steps: "
            "leave it out, or give --halting none"
        )


SYSTEM = UniversalTransformer()
