"""Runs a stack: groups of layers, once or looped, and keeps what a call wants to see of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .cache import Memory
from .context import CallContext
from .fields import Config
from .interface import Group, System
from .recurrence import Rows
from .router_logits import RouterLogits

__all__ = ["Trace", "build_loops", "run_stack"]


class Trace:
    """What a call keeps on its way through the layers.

    Args:
        keep_states: Whether to keep hidden states.
        keep_logits: Whether to keep router logits.
    """

    def __init__(self, keep_states: bool, keep_logits: bool) -> None:
        self._keep_states, self._keep_logits = keep_states, keep_logits
        self._states: list[Tensor] = []
        self._decisions: list[tuple[Tensor, int, int, str]] = []
        self._batch = 1

    def see_states(self, states: Tensor) -> None:
        """Keep hidden states, [b, s, h]."""
        if self._keep_states:
            self._states.append(states)

    def see_logits(self, logits: Iterable[Tensor], layer: int, step: int, routers: tuple[str, ...]) -> None:
        """Keep the logits that one call of a layer returned, [b, s, N] each, or [b, s, heads, N]."""
        if not self._keep_logits:
            return
        for number, part in enumerate(logits):
            further, router = divmod(number, len(routers))
            self._batch = part.size(0)
            self._decisions.append((part.flatten(0, 1), layer, step + further, routers[router]))

    @property
    def states(self) -> tuple[Tensor, ...] | None:
        """The hidden states; None if they were not to be kept."""
        return tuple(self._states) if self._keep_states else None

    @property
    def logits(self) -> RouterLogits | None:
        """The router logits; None if they were not to be kept."""
        if not self._keep_logits:
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


def run_stack(
    hidden_states: Tensor,
    groups: Iterable[Group],
    layers: nn.ModuleList,
    loops: nn.ModuleList,
    norm: nn.Module,
    context: CallContext,
    memory: Memory,
    trace: Trace,
) -> Tensor:
    """Return what the last layer makes of the embeddings, [b, s, h].

    Args:
        hidden_states: Embeddings, [b, s, h].
        groups: The groups of the stack.
        layers: All layers.
        loops: The loops, one for each group that has one.
        norm: The final norm, which some groups have before them, too.
        context: What layers are told.
        memory: The cache.
        trace: What the call keeps.
    """
    remaining = enumerate(loops)
    for group in groups:
        if group.norm_first:
            hidden_states = norm(hidden_states)

        former: dict[int, list[Tensor]] = {}

        def run_pass(
            hidden_states: Tensor,
            step: int,
            rows: Rows,
            group: Group = group,
            former: dict[int, list[Tensor]] = former,
        ) -> Tensor:
            for layer_idx in group.layers:
                trace.see_states(hidden_states)
                layer: Any = layers[layer_idx]
                place = memory.at(f"layers.{layer_idx}")
                place = place if group.loop is None else place.at(f"pass.{step}")
                before = former.get(layer_idx, ()) if getattr(layer.mlp, "reads_former", False) else ()
                hidden_states, *former[layer_idx] = layer(hidden_states, rows.context, place, *before)
                trace.see_logits(former[layer_idx], layer_idx, step, layer.routers)
            return hidden_states

        if group.loop is None:
            hidden_states = run_pass(hidden_states, 0, Rows(context, -1))
        else:
            index, loop = next(remaining)
            hidden_states = loop(hidden_states, run_pass, Rows(context, index))
    return hidden_states
