"""Runs a stack: groups of layers, once or looped, and keeps what a call wants to see of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

from torch import Tensor, nn

from .cache import Memory
from .context import CallContext
from .fields import Config
from .interface import Group, System
from .recurrence import Rows
from .routing import RouterLogits

__all__ = ["Stack", "Trace", "build_loops"]


class Trace:
    """What a call keeps on its way through the layers.

    Args:
        keep_states: Whether to keep hidden states.
        keep_logits: Whether to keep router logits.
    """

    def __init__(self, keep_states: bool, keep_logits: bool) -> None:
        self._states: list[Tensor] | None = [] if keep_states else None
        self._decisions: list[tuple[Tensor, int, int, str]] | None = [] if keep_logits else None
        self._batch = 1

    def see_states(self, states: Tensor) -> None:
        """Keep hidden states, [b, s, h]."""
        if self._states is not None:
            self._states.append(states)

    def see_logits(self, logits: Iterable[Tensor], layer: int, step: int, routers: tuple[str, ...]) -> None:
        """Keep the logits that one call of a layer returned, [b, s, N] each, or [b, s, heads, N]."""
        if self._decisions is None:
            return
        for number, part in enumerate(logits):
            further, router = divmod(number, len(routers))
            self._batch = part.size(0)
            self._decisions.append((part.flatten(0, 1), layer, step + further, routers[router]))

    @property
    def states(self) -> tuple[Tensor, ...] | None:
        """The hidden states; None if they were not to be kept."""
        return None if self._states is None else tuple(self._states)

    @property
    def logits(self) -> RouterLogits | None:
        """The router logits; None if they were not to be kept."""
        if self._decisions is None:
            return None
        logits, layers, steps, routers = zip(*self._decisions, strict=True) if self._decisions else ((),) * 4
        return RouterLogits(logits, layers, steps, routers, self._batch)


def build_loops(config: Config, system: System) -> nn.ModuleList:
    """Return the loops of a stack, in order.

    Raises:
        ValueError: If the groups are not all layers in order.
    """
    groups = system.groups(config)
    layers = [layer for group in groups for layer in group.layers]
    if layers != list(range(config.num_hidden_layers)):
        raise ValueError(f"the groups have layers {layers}, and not the {config.num_hidden_layers} of the model")
    return nn.ModuleList(group.loop(config) for group in groups if group.loop is not None)


@dataclass(frozen=True)
class Stack:
    """Runs the groups of one call.

    Attributes:
        groups: The groups of the stack.
        layers: All layers.
        loops: The loops, one for each group that has one.
        norm: The final norm, which some groups have before them, too.
        context: What layers are told.
        memory: The cache.
        trace: What the call keeps.
    """

    groups: Sequence[Group]
    layers: nn.ModuleList
    loops: nn.ModuleList
    norm: nn.Module
    context: CallContext
    memory: Memory
    trace: Trace

    def run(self, hidden_states: Tensor) -> Tensor:
        """Return what the last layer makes of the embeddings, [b, s, h]."""
        loops = enumerate(self.loops)
        for number, group in enumerate(self.groups):
            if group.norm_first:
                hidden_states = self.norm(hidden_states)
            run_pass = partial(self._run_layers, group, {}, self.memory, self.trace)
            if group.loop is None:
                hidden_states = run_pass(hidden_states, 0, Rows(self.context, -1))
            else:
                index, loop = next(loops)
                rows = Rows(self.context, index, stream=partial(self._behind, self.groups[number + 1 :], {}))
                hidden_states = loop(hidden_states, run_pass, rows)
        return hidden_states

    def _run_layers(
        self,
        group: Group,
        former: dict[int, tuple[Tensor, ...]],
        memory: Memory,
        trace: Trace,
        hidden_states: Tensor,
        step: int,
        rows: Rows,
    ) -> Tensor:
        """Run the layers of a group once on [b, s, h] or, where tokens have stopped, [1, n, h].

        `former` holds the router logits of each layer in the pass before, of all tokens; those of this pass are put
        there.
        """
        memory = memory.select(self.context.shape, rows.chosen)
        for layer_idx in group.layers:
            trace.see_states(hidden_states)
            layer: Any = self.layers[layer_idx]
            place = memory.at(f"layers.{layer_idx}")
            place = place if group.loop is None else place.at_step(step)
            whole = former.get(layer_idx, ())
            hidden_states, *logits = layer(hidden_states, rows.context, place, *map(rows.take, whole))
            if getattr(layer.mlp, "reads_former", False):
                former[layer_idx] = tuple(rows.put(old, new) for old, new in zip_longest(whole, logits))
            trace.see_logits(logits, layer_idx, step, layer.routers)
        return hidden_states

    def _behind(self, groups: Sequence[Group], aside: dict, state: Tensor, rows: Rows) -> Tensor:
        """Return what the final norm would be given if a loop ended with a state: the groups behind that run once.

        Their keys and values are kept `aside`: the cache must not have them yet.
        """
        memory = self.memory.write_aside(aside)
        for group in groups:
            state = self.norm(state) if group.norm_first else state
            if group.loop is None:
                state = self._run_layers(group, {}, memory, Trace(False, False), state, 0, rows)
        return state
