"""What a system says to the model in transformers.

A system is one file in this folder, named as `--more-variant` names it, with a line `SYSTEM = MySystem()`. It imports
torch, transformers and the files beside it, by `from .attention import MoREAttention` and the like: transformers finds
files by such lines, and an export has exactly those that its system leads to. Nothing else knows the system by name.

- Other experts: a module named by `System.experts_class`, in a feed-forward part named by `System.moe_class`, which is
  `MoREMoE`, `RecurringMoE` if something recurs in it (sequential_experts.py), or a subclass of them (gru_experts.py).
- Another layer (norms, residuals, attention): a subclass of `MoRELayer`, named by `System.layer_class`
  (recurrent_moe.py). A layer that returns the logits of several routers names them in `routers`.
- Layers that are repeated: `System.loop_class` is a subclass of `Loop` (stack.py), which has the adapter, the time
  signals or the halting as parameters, `model.loops.0.adapter.weight` for example. It says where the state begins
  (`first_state`) and what enters a pass (`enter`). Keys and values, router logits and hidden states of each pass are
  kept apart for it. `DividedSystem` has a prelude, groups that are repeated, and a coda.
- Whatever recurs does so in `recur(step, state, rows)` (recurrence.py), which knows what a call wants of it: the states
  of all steps, for example.
- Initial states: `context.initial_state(index, like)`, where `System.num_states` says how many there are.
- What grows with the text: `memory.extend(name, keys, values)` appends to [b, any, s, any] and returns all of it; names
  are free, `memory.at(name)` makes a room. Anything kept elsewhere breaks generation with a cache.
- Padding and documents of packed rows: `context.mask` for attention, `context.padding` and `context.documents` for what
  runs along a sequence.
- Fields of `config.json`: `System.fields` for its own, `System.defaults` where it differs from all others.
- Losses: loops append to `context.records.losses`; `System.router_loss` makes a loss of router logits.

tests/hf iterates over this folder: a new system is tested by being here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .experts import FeedForwardExperts, MoREMoE
from .fields import FIELDS, Config, Field, check_fields
from .layer import MoRELayer
from .options import WITHOUT_STEPS, CallOptions
from .parts import MoREMLP, build_norm
from .routing import RouterLogits, load_balancing_loss
from .stack import Group, InjectedLoop, Loop


class System:
    """Megatron's mixture of experts. Attributes that differ are given by their names, or by a subclass."""

    moe_class: type[MoREMoE] = MoREMoE  # feed-forward part of layers with experts
    experts_class: Callable[[Config], nn.Module] = FeedForwardExperts  # the routed experts in it
    layer_class: type[MoRELayer] = MoRELayer
    loop_class: type[Loop] | None = None  # what repeats the layers; None: nothing
    recurrent: bool = True  # whether the number of steps means anything
    traceable: bool = True  # whether `torch.export` can follow it: no loop is as long as the data say
    scales_embeddings: bool = False  # whether embeddings are multiplied by the root of their size
    dense_bias: bool | None = None  # whether layers without experts have biases there; None: as the configuration says
    head_bias: bool = False  # whether the output layer has a bias
    fields: Mapping[str, Field] = {}  # fields of `config.json` beside those of every model
    defaults: Mapping[str, Any] = {}  # defaults of the others where they differ
    fixed: Mapping[str, Any] = {}  # fields of the others that have one value, or one that follows from the rest

    def __init__(self, **own: Any) -> None:
        vars(self).update(own)

    @property
    def all_fields(self) -> dict[str, Field]:
        """Fields of `config.json`, its own behind those of every model."""
        return {**FIELDS, **self.fields}

    def check_config(self, values: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if a configuration lacks a field, or what is in its fields cannot be."""
        check_fields(self.all_fields, values)
        self.check(values)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the fields of a configuration, each right by itself, cannot be in this system."""
        for name, value in self.fixed.items():
            wanted = value(values) if callable(value) else value
            if values[name] != wanted:
                raise ValueError(f"{name} {values[name]} must be {wanted} in this system")

    def check_call(self, config: Config, options: CallOptions, embeddings: Tensor) -> None:
        """Raise a `ValueError` if an option has no effect, or initial states do not fit embeddings, [b, s, h]."""
        number = self.num_states(config)
        needs = {
            "criterion": (self.recurrent, WITHOUT_STEPS),
            "cache_steps": (self.caches_steps(config), "the cache of this system does not grow with the steps"),
            "warm_start": (number > 0, "the recurrences of this system start from their input"),
            "input_states": (number > 0, "this system has no initial states"),
        }
        for name, (has_effect, reason) in needs.items():
            value = getattr(options, name)
            if not has_effect and value is not None and value is not False:
                raise ValueError(f"{name} has no effect: {reason}")
        if options.input_states is not None:
            found, wanted = tuple(options.input_states.shape), (number, *embeddings.shape)
            if len(found) != 4 or found[:2] + found[3:] != wanted[:2] + wanted[3:] or not 1 <= found[2] <= wanted[2]:
                raise ValueError(f"input_states has shape {found}, and not {wanted}")

    def groups(self, config: Config) -> Sequence[Group]:
        """Return the groups of the stack, in order; together they are all layers."""
        return (Group(range(config.num_hidden_layers), self.loop_class),)

    def num_states(self, config: Config) -> int:
        """Return how many initial states a call may give."""
        return 0

    def caches_steps(self, config: Config) -> bool:
        """Return whether a cache has keys and values of each step."""
        return any(group.loop is not None for group in self.groups(config))

    def build_layer(self, config: Config, layer_idx: int) -> MoRELayer:
        """Return a layer."""
        if config.moe_layers[layer_idx]:
            mlp: nn.Module = self.moe_class(config, layer_idx, self.experts_class)
        else:
            mlp = MoREMLP(config, config.intermediate_size, self.dense_bias)
        return self.layer_class(config, layer_idx, mlp)

    def build_final_norm(self, config: Config) -> nn.Module:
        """Return the norm before the output layer."""
        return build_norm(config)

    def router_loss(self, config: Config, router_logits: RouterLogits, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of routers as it is reported, and what is added of it; the mask is 0 for padding, [b, T]."""
        loss = load_balancing_loss(router_logits, config, mask)
        return loss, loss * config.router_aux_loss_coef


class DividedSystem(System):
    """A stack with a prelude, groups of layers that are repeated, and a coda."""

    loop_class = InjectedLoop
    # Whether the final norm stands in front of the coda, too, even if that has no layers
    norms_coda_input: bool = False

    def check(self, values: Mapping[str, Any]) -> None:
        layers, prelude, coda = (values[name] for name in ("num_hidden_layers", "prelude_layers", "coda_layers"))
        core, size = layers - prelude - coda, values.get("group_layers")
        if core <= 0:
            raise ValueError(
                f"prelude_layers {prelude} and coda_layers {coda} leave none of num_hidden_layers {layers}"
            )
        if size is not None and core % size != 0:
            raise ValueError(f"group_layers {size} does not divide the {core} layers that are repeated")

    def groups(self, config: Config) -> Sequence[Group]:
        layers, norms = config.num_hidden_layers, self.norms_coda_input
        start, end = config.prelude_layers, layers - config.coda_layers
        size = getattr(config, "group_layers", None) or end - start
        prelude = (Group(range(start)),) if start > 0 else ()
        coda = (Group(range(end, layers), norm_first=norms),) if end < layers or norms else ()
        core = (Group(range(first, first + size), self.loop_class) for first in range(start, end, size))
        return (*prelude, *core, *coda)
