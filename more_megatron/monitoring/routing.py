"""How routers spread tokens over experts, by layer and recurrence step.

`load` is the share of all choices that fell on an expert, `probability` the mean probability that the router gave it:
what the guide calls the soft assignment, and takes its variation, ratios and effective experts of. Entropy is that of
a token's distribution, in nats. Where the router is sigmoids (`--moe-router-score-function sigmoid`, sigma-MoE), the
probability is the softmax of the same logits, and no range applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter

from more_megatron.monitoring.watch import Key, Watch, current_watch

__all__ = ["Loads", "router_place", "routing_figures", "routing_loads", "watch_router"]

_CONCERN = "routing"
_SUMS = ("choices", "probabilities", "tokens")
# Tokens that an expert would get by now if all got the same: fewer say nothing about one that got none.
_EXPECTED = 32.0

Loads = dict[Key, tuple[np.ndarray, np.ndarray]]


def router_place(router: TopKRouter) -> str:
    """Return where a router is, as a place of figures."""
    kind = "mtp layer" if getattr(router, "is_mtp_layer", False) else "layer"
    return f"{kind} {router.layer_number}"


def watch_router(router: TopKRouter) -> Callable[[], None]:
    """See each decision of a router, until the function that is returned is called."""
    routing, place = router.routing, router_place(router)
    former: list[torch.Tensor] = []

    def seen(logits: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        probs, routing_map = routing(logits, *args, **kwargs)
        watch = current_watch()
        if watch is not None:
            step = getattr(router, "recurrence_step", None)
            before = former.pop() if former else None
            _record(watch, place, step, logits, routing_map, before if step else None)
            former.append(routing_map.bool())
        return probs, routing_map

    router.routing = seen  # type: ignore[method-assign]

    def restore() -> None:
        del router.routing

    return restore


@torch.no_grad()
def _record(
    watch: Watch,
    place: str,
    step: int | None,
    logits: torch.Tensor,
    routing_map: torch.Tensor,
    former: torch.Tensor | None,
) -> None:
    """Record one decision: logits [s, b, experts], map [tokens, experts]."""
    number = 0 if step is None else step + 1
    probabilities = logits.detach().float().flatten(0, -2).softmax(-1)
    watch.add(Key(_CONCERN, "choices", place, number), routing_map.bool().sum(0))
    watch.add(Key(_CONCERN, "probabilities", place, number), probabilities.double().sum(0))
    watch.add(Key(_CONCERN, "tokens", place, number), torch.full((1,), len(probabilities), device=logits.device))
    watch.add_mean(Key(_CONCERN, "entropy", place, number), torch.special.entr(probabilities).sum(-1))
    watch.add_mean(Key(_CONCERN, "largest probability", place, number), probabilities.amax(-1))
    if former is not None:
        watch.add_mean(Key(_CONCERN, "expert change", place, number), (routing_map.bool() != former).any(-1))


def routing_loads(totals: dict[Key, np.ndarray]) -> Loads:
    """Return the load and the mean probability of each expert, [experts] both, by place and step."""
    loads = {}
    for key, choices in totals.items():
        if key.concern == _CONCERN and key.name == "choices":
            tokens = float(totals[Key(_CONCERN, "tokens", key.place, key.step)][0])
            probabilities = totals[Key(_CONCERN, "probabilities", key.place, key.step)]
            load = choices / max(choices.sum(), 1.0)
            loads[Key(_CONCERN, "load", key.place, key.step)] = (load, probabilities / max(tokens, 1.0))
    return loads


def routing_figures(totals: dict[Key, np.ndarray]) -> Iterator[tuple[Key, float]]:
    """Yield the figures of all routers, given the sums over all ranks."""
    largest: dict[str, dict[int, float]] = {}
    for key, sums in totals.items():
        if key.concern == _CONCERN and key.name not in _SUMS:
            yield key, float(sums[0] / sums[1])
            if key.name == "largest probability":
                largest.setdefault(key.place, {})[key.step] = float(sums[0] / sums[1])
    for place, by_step in largest.items():
        if len(by_step) > 1:
            yield Key(_CONCERN, "largest probability trend", place), by_step[max(by_step)] - by_step[min(by_step)]
    for key, (load, probability) in routing_loads(totals).items():
        mean = probability.mean()
        choices = totals[Key(_CONCERN, "choices", key.place, key.step)]
        dead = int((choices == 0).sum()) if choices.sum() >= _EXPECTED * len(choices) else 0
        for name, value in (
            ("load cv", probability.std() / mean),
            ("largest ratio", probability.max() / mean),
            ("smallest ratio", probability.min() / mean),
            ("effective experts", probability.sum() ** 2 / np.square(probability).sum()),
            ("largest load", load.max()),
            ("dead experts", dead),
        ):
            yield Key(_CONCERN, name, key.place, key.step), float(value)
