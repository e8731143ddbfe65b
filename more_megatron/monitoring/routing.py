"""How routers spread tokens over experts, by layer and recurrence step.

`load` is the share of all choices that fell on an expert, `probability` the mean probability that the router gave it:
what the guide calls the soft assignment, and takes its variation, ratios and effective experts of. Entropy is that of
a token's distribution, in nats. Where the router is sigmoids (`--moe-router-score-function sigmoid`, sigma-MoE), the
probability is the softmax of the same logits, and no range applies.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter

from more_megatron.monitoring.watch import Key, Watch, current_watch

_CONCERN = "routing"
# Tokens that an expert would get by now if all got the same: fewer say nothing about one that got none.
_EXPECTED = 32.0

Loads = dict[Key, tuple[np.ndarray, np.ndarray]]


def watch_router(router: TopKRouter) -> Callable[[], None]:
    """See each decision of a router, until the function that is returned is called."""
    kind = "mtp layer" if getattr(router, "is_mtp_layer", False) else "layer"
    routing, place = router.routing, f"{kind} {router.layer_number}"
    former: list[torch.Tensor] = []

    def seen(logits: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        probs, routing_map = routing(logits, *args, **kwargs)
        if (watch := current_watch()) is not None:
            chosen, step = routing_map.bool(), getattr(router, "recurrence_step", None)
            number = 0 if step is None else step + 1
            _record(watch, place, number, logits, chosen)
            before = former.pop() if former else None
            if step and before is not None:
                watch.add_mean(Key(_CONCERN, "expert change", place, number), (chosen != before).any(-1))
            former.append(chosen)
        return probs, routing_map

    router.routing = seen  # type: ignore[method-assign]
    return lambda: delattr(router, "routing")


@torch.no_grad()
def _record(watch: Watch, place: str, step: int, logits: torch.Tensor, chosen: torch.Tensor) -> None:
    """Record one decision: logits [s, b, experts], map [tokens, experts]."""
    key = functools.partial(Key, _CONCERN, place=place, step=step)
    probabilities = logits.detach().float().flatten(0, -2).softmax(-1)
    tokens = torch.full_like(probabilities[0], len(probabilities), dtype=torch.float64)
    watch.add(key("load"), torch.stack([chosen.sum(0).double(), probabilities.double().sum(0), tokens]))
    watch.add_mean(key("entropy"), torch.special.entr(probabilities).sum(-1))
    watch.add_mean(key("largest probability"), probabilities.amax(-1))


def routing_loads(sums: dict[Key, np.ndarray]) -> Loads:
    """Return the load and the mean probability of each expert, [experts] both, by place and step."""
    loads = {}
    for key, of_experts in sums.items():
        if key.concern == _CONCERN:
            choices, probabilities, tokens = of_experts
            loads[key] = (choices / max(choices.sum(), 1.0), probabilities / np.maximum(tokens, 1.0))
    return loads


def routing_figures(means: dict[Key, float], sums: dict[Key, np.ndarray]) -> Iterator[tuple[Key, float]]:
    """Yield the figures of all routers that follow from means and sums over all ranks."""
    largest: dict[str, dict[int, float]] = {}
    for key, mean in means.items():
        if key.concern == _CONCERN and key.name == "largest probability":
            largest.setdefault(key.place, {})[key.step] = mean
    for place, by_step in largest.items():
        if len(by_step) > 1:
            yield Key(_CONCERN, "largest probability trend", place), by_step[max(by_step)] - by_step[min(by_step)]
    for key, (load, probability) in routing_loads(sums).items():
        mean, choices = probability.mean(), sums[key][0]
        dead = int((choices == 0).sum()) if choices.sum() >= _EXPECTED * len(choices) else 0
        for name, value in (
            ("load cv", probability.std() / mean),
            ("largest ratio", probability.max() / mean),
            ("smallest ratio", probability.min() / mean),
            ("effective experts", probability.sum() ** 2 / np.square(probability).sum()),
            ("largest load", load.max()),
            ("dead experts", dead),
        ):
            yield dataclasses.replace(key, name=name), float(value)
