"""What a system says about itself.

A system is one file of this folder that ends in `SYSTEM = ...`: an object of a subclass of `System`. Files of systems
import neither Megatron nor PyTorch at their top; what builds layers is imported where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, ClassVar

from more_megatron.flags import MoREFlags, flag
from more_megatron.systems.export import ATTENTION, DENSE, FEED_FORWARD, MODEL, MOE, Row, states

if TYPE_CHECKING:
    from more_megatron.config import MoREConfig
    from more_megatron.model.costs import Cost
    from more_megatron.model.stack import Stack
    from more_megatron.monitoring.ranges import Ends
    from more_megatron.monitoring.watch import Watch


# Flags of `MoREFlags` that every recurrence reads.
DEPTH = frozenset(
    f"recurrence_{name}"
    for name in (
        *("steps", "sampling", "sampling_unit", "min_steps", "max_steps"),
        *("backprop_steps", "eval_steps", "eval_depths", "curriculum"),
    )
)
# Those that divide the layers of a model into groups.
DIVISION = frozenset(f"recurrence_{name}_layers" for name in ("prelude", "coda", "group"))
# Those that a router reads which is asked in every step.
REPEATED_ROUTER = frozenset(("router_logit_ema", "router_min_entropy", "router_min_entropy_coeff"))
# Flags of Megatron's that a system does not read whose stack draws all weights in its own way.
MEGATRONS_INITIALIZATION = frozenset(("init_method_std", "init_method_xavier_uniform", "embedding_init_method_std"))


class System:
    """One system: what it is made of, what it refuses, what it costs and what its weights are called outside."""

    name: ClassVar[str]  # its name, that of its file
    summary: ClassVar[str]  # what it is, in one line
    is_default: ClassVar[bool] = False  # whether it is the one that is trained if none is named
    # Fields of `MoREFlags` that have an effect on it, `more_variant` aside
    reads: ClassVar[frozenset[str]] = frozenset()
    # Dataclass of the flags that it alone reads: a field is a flag, its docstring the help. `check` refuses values
    Flags: ClassVar[type | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}  # arguments whose default differs from what systems share
    # Default width of the MLP in its recurrent block, in hidden sizes; None without such a block
    block_width: ClassVar[int | None] = None
    # Flags, by name, that let its depth be drawn as that of others and be any in evaluation
    comparable: ClassVar[Mapping[str, str]] = {}
    # Flags, by name, with which it is Megatron's dense model; None where there are none
    plain: ClassVar[Mapping[str, Any] | None] = None
    # Activation function, by its name in transformers, where no flag of Megatron's names another
    activation: ClassVar[str] = "gelu"
    mixes_tokens: ClassVar[bool] = False  # whether the tokens that were sent to an expert depend on each other
    expert_rows: ClassVar[tuple[Row, ...]] = FEED_FORWARD  # rows of its routed experts, and of what they share
    # Fields of config.json that it alone has, and the flags, by name, that they are made from
    fields: ClassVar[Mapping[str, str]] = {}
    # Parameters of its experts that a run with `--finetune` finds in Megatron's experts, and their keys there. Of a
    # gated expansion the half that the gate lets through is taken; what is not named is drawn anew
    former_keys: ClassVar[Mapping[str, str]] = {}

    @property
    def recurrent(self) -> bool:
        """Whether its depth comes from recurrence."""
        return bool(self.reads & DEPTH)

    @property
    def is_megatrons(self) -> bool:
        """Whether it is Megatron's own model with experts."""
        return not self.recurrent and self.expert_rows is FEED_FORWARD

    @property
    def repeats_router(self) -> bool:
        """Whether its routers are asked in every step."""
        return self.reads >= REPEATED_ROUTER

    def own_flags(self) -> tuple[str, ...]:
        """Return the names of the flags that it alone reads."""
        return () if self.Flags is None else tuple(field.name for field in dataclasses.fields(self.Flags))

    def flags(self, args: Any) -> MoREFlags:
        """Return its flags among a run's arguments, those included that it alone reads."""
        bases = (MoREFlags,) if self.Flags is None else (self.Flags, MoREFlags)
        kind: Any = dataclasses.make_dataclass("Flags", [], bases=bases)
        return kind.of(args)

    def without_effect(self, flags: MoREFlags, given: Set[str]) -> Iterator[str]:
        """Yield what is wrong with flags that were given and that the system, under these settings, never reads.

        The user set `given`, among the fields of `MoREFlags`, all systems' own flags and what is `unread`.
        """
        read = {"more_variant", *self.reads, *self.own_flags()}
        for name in sorted(given - read):
            yield f"--more-variant {self.name} never reads {flag(name)}: leave it out"
        yield from flags.without_effect(given & read)

    def unread(self, args: Any) -> Set[str]:
        """Return the flags of Megatron's that it never reads, given a run's arguments."""
        return frozenset()

    def refusals(self, config: MoREConfig) -> Iterator[str]:
        """Yield what the system cannot do of what `config` asks for: each one line that names the flags to change."""
        yield from ()

    def stack(self, config: MoREConfig) -> Stack:
        """Return the layers of the whole model, and which of them are repeated."""
        raise NotImplementedError

    def cost(self, config: MoREConfig, seq_length: int) -> Cost:
        """Return the cost of the stack, without embeddings, final norm and output layer."""
        return self.stack(config).cost(seq_length)

    def model_cost(self, config: MoREConfig, seq_length: int, vocab_size: int, tied: bool) -> Cost:
        """Return the cost of a whole model; `tied`: input and output embeddings are one."""
        return self.stack(config).model_cost(self.cost(config, seq_length), vocab_size, tied)

    def width_flag(self, config: MoREConfig) -> str:
        """Return the field that widens what is repeated, by which systems are brought to equal cost."""
        if self.block_width is not None:
            return "recurrence_ffn_hidden_size"
        return "ffn_hidden_size" if config.num_moe_experts is None else "moe_ffn_hidden_size"

    def losses(self, config: MoREConfig) -> tuple[str, ...]:
        """Return the names of losses that are logged besides those that Megatron asks its MoE tracker for."""
        return ("entropy_loss",) if self.repeats_router and config.router_min_entropy > 0.0 else ()

    def figures(self, config: MoREConfig) -> tuple[str, ...]:
        """Return the names of figures that its parts record; see `more_megatron.monitoring.figures`."""
        if config.num_moe_experts is None or not self.repeats_router:
            return ()
        from more_megatron.blocks.statistics import router_figures

        return router_figures(config.max_steps)

    def health_ranges(self, config: MoREConfig) -> Mapping[str, Ends | None]:
        """Return the healthy ranges of its own figures, and of others where it differs; see `monitoring.ranges`.

        The lowest and the highest value by figure, as `system/lstm gate`; None: there is no range.
        """
        return {}

    def record_health(self, watch: Watch, module: Any, share: float) -> None:
        """Record what is to be known of a module's parameters when a step is watched. Asked for every module.

        `share` is 1 over the number of ranks that hold the same experts.
        """

    def ffn_hidden_size(self, sizes: Any) -> int:
        """Return the width of the MLP in the recurrent block, given the configuration or arguments."""
        assert self.block_width is not None, f"{self.name} has no recurrent block"
        return sizes.recurrence_ffn_hidden_size or self.block_width * sizes.hidden_size

    # What its weights are called outside. `config` is the content of config.json.

    def architecture(self, args: Any) -> dict[str, Any]:
        """Return what decides, besides what all models have, which tensors there are: values by flag."""
        return {}

    def config_fields(self, args: Any) -> dict[str, Any]:
        """Return the values of its `fields`, given a run's arguments."""
        return {field: getattr(self.flags(args), name) for field, name in self.fields.items()}

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that `config_fields` were made from."""
        return {name: config[field] for field, name in self.fields.items()}

    def model_rows(self, config: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the rows outside of layers."""
        return MODEL

    def layer_rows(self, config: Mapping[str, Any], layer: int) -> tuple[Row, ...]:
        """Return the rows of a layer, numbered from 0."""
        return (*ATTENTION, *MOE, *self.expert_rows) if config["moe_layers"][layer] else (*ATTENTION, *DENSE)

    def model_states(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the modules outside of layers that ask a checkpoint for a state beside their parameters."""
        return states(self.model_rows(config))

    def layer_states(self, config: Mapping[str, Any], layer: int) -> tuple[str, ...]:
        """Return the modules of a layer that do; `N ` before a name: one state an expert."""
        return states(self.layer_rows(config, layer))

    def sizes(self, config: Mapping[str, Any]) -> dict[str, int]:
        """Return sizes of its own that rows name."""
        return {}

    def features(self, config: Mapping[str, Any]) -> set[str]:
        """Return features of its own that rows ask for."""
        return set()
