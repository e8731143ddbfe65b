"""What a system says to the model in transformers.

A system is one file in this folder, named as `--more-variant` names it, with a line `SYSTEM = MySystem()`. It imports
torch, transformers and the files beside it, by `from .attention import MoREAttention` and the like: transformers finds
files by such lines, and an export has exactly those that its system leads to. Nothing else knows the system by name.

- Other experts: a module named by `System.experts_class`, in a feed-forward part named by `System.moe_class`, which is
  `MoREMoE`, `RecurringMoE` if something recurs in it (sequential_experts.py), or a subclass of them (gru_experts.py).
- Another layer (norms, residuals, attention): a subclass of `MoRELayer`, named by `System.layer_class`
  (recurrent_moe.py). A layer that returns the logits of several routers names them in `routers`.
- Layers that are repeated: `System.groups` returns groups, and a group's `loop` is a subclass of `Loop`, which has the
  adapter, the time signals or the halting as parameters, `model.loops.0.adapter.weight` for example. It says where the
  state begins (`first_state`) and what enters a pass (`enter`). Keys and values, router logits and hidden states of
  each pass are kept apart for it.
- Whatever recurs does so in `recur(step, state, rows)` (recurrence.py), which knows what a call wants of it: the states
  of all steps, for example.
- Initial states: `context.initial_state(index, like)`, where `System.num_states` says how many there are.
- What grows with the text: `memory.extend(name, keys, values)` appends to [b, any, s, any] and returns all of it; names
  are free, `memory.at(name)` makes a room. Anything kept elsewhere breaks generation with a cache.
- Padding and documents of packed rows: `context.mask` for attention, `context.padding` and `context.documents` for what
  runs along a sequence.
- Weights: a module with a method `draw_weight(name, weight)` draws its own; `System.draw_weight` may draw any.
- Fields of `config.json`: `System.fields` for its own, `System.defaults` where it differs from all others.
- Losses: loops append to `context.records.losses`; `System.router_loss` makes a loss of router logits.

tests/hf iterates over this folder: a new system is tested by being here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .context import CallContext
from .experts import FeedForwardExperts, MoREMoE
from .fields import Config, Field
from .layer import MoRELayer
from .options import WITHOUT_STEPS, CallOptions
from .parts import MoREMLP, MoRERMSNorm, build_norm
from .recurrence import Rows, State, recur
from .routing import RouterLogits, load_balancing_loss

__all__ = ["Group", "Loop", "RunPass", "System"]

RunPass = Callable[[Tensor, int, Rows], Tensor]
"""Runs the layers of a group once: hidden states, [b, s, h], the number of the pass, from 0, and what rows they are."""


class Loop(nn.Module):
    """Repeats a group of layers, without injection or halting. Subclasses add what the repetition has beside them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: Tensor, run_pass: RunPass, rows: Rows) -> Tensor:
        """Return what the group makes of its input, [b, s, h]."""

        def step(number: int, rows: Rows, state: Tensor) -> State:
            return (run_pass(self.enter(state, hidden_states, number, rows), number, rows),)

        return recur(step, (self.first_state(hidden_states, rows.context),), rows)[0]

    def first_state(self, hidden_states: Tensor, context: CallContext) -> Tensor:
        """Return the state in front of the first pass, given the input of the group, [b, s, h]."""
        return hidden_states

    def enter(self, state: Tensor, hidden_states: Tensor, step: int, rows: Rows) -> Tensor:
        """Return what enters a pass, given the state and the input of the group, [b, s, h]."""
        return state


@dataclass(frozen=True)
class Group:
    """Layers that stand next to each other."""

    layers: range  # their indices
    loop: type[Loop] | None = None  # what repeats them; None if they run once
    norm_first: bool = False  # whether the model's final norm stands before them, too


class System:
    """Megatron's mixture of experts. Attributes that differ are given by their names, or by a subclass."""

    moe_class: type[MoREMoE] = MoREMoE  # feed-forward part of layers with experts
    experts_class: Callable[[Config], nn.Module] = FeedForwardExperts  # the routed experts in it
    layer_class: type[MoRELayer] = MoRELayer
    recurrent: bool = True  # whether the number of steps means anything
    traceable: bool = True  # whether `torch.export` can follow it: no loop is as long as the data say
    head_bias: bool = False  # whether the output layer has a bias
    fields: Mapping[str, Field] = {}  # fields of `config.json` beside those of every model
    defaults: Mapping[str, Any] = {}  # defaults of the others where they differ
    fixed: Mapping[str, Any] = {}  # fields of the others that have one value, or one that follows from the rest

    def __init__(self, **own: Any) -> None:
        vars(self).update(own)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if the fields of a configuration do not agree with each other."""
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
        return (Group(range(config.num_hidden_layers)),)

    def num_states(self, config: Config) -> int:
        """Return how many initial states a call may give."""
        return 0

    def caches_steps(self, config: Config) -> bool:
        """Return whether a cache has keys and values of each step."""
        return any(group.loop is not None for group in self.groups(config))

    def embedding_scale(self, config: Config) -> float:
        """Return the factor on embeddings."""
        return 1.0

    def build_layer(self, config: Config, layer_idx: int) -> MoRELayer:
        """Return a layer."""
        has_experts = config.moe_layers[layer_idx]
        mlp = self.moe_class(config, layer_idx, self.experts_class) if has_experts else self.build_dense(config)
        return self.layer_class(config, layer_idx, mlp)

    def build_dense(self, config: Config) -> nn.Module:
        """Return the feed-forward part of a layer without experts."""
        return MoREMLP(config, config.intermediate_size)

    def build_final_norm(self, config: Config) -> nn.Module:
        """Return the norm before the output layer."""
        return build_norm(config)

    def draw_weight(self, config: Config, module: nn.Module, name: str, weight: Tensor) -> None:
        """Draw a new weight that a module itself holds: as the module does, if it has a `draw_weight`."""
        draw: Any = getattr(module, "draw_weight", None)
        if draw is not None:
            draw(name, weight)
        elif name.endswith("bias"):
            weight.zero_()
        elif isinstance(module, MoRERMSNorm | nn.LayerNorm):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, config.initializer_range)

    def router_loss(self, config: Config, router_logits: RouterLogits, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of routers as it is reported, and what is added of it; the mask is 0 for padding, [b, T]."""
        loss = load_balancing_loss(router_logits, config, mask)
        return loss, loss * config.router_aux_loss_coef
