"""The logits of all routing decisions of a call, and the load-balancing loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .fields import Config
from .routing import router_scores

__all__ = ["RouterLogits", "load_balancing_loss"]


class RouterLogits(tuple):
    """Logits of each decision, [b s, N], in the order of computation: a tuple that knows where each was made.

    Args:
        logits: Logits of each decision.
        layers: Layer of each, from 0.
        steps: Recurrence step of each, from 0.
        routers: Name of the router of each.
        batch: Number of sequences of the call.
    """

    layers: tuple[int, ...]
    steps: tuple[int, ...]
    routers: tuple[str, ...]
    batch: int

    def __new__(
        cls,
        logits: Iterable[Any] = (),
        layers: Iterable[int] = (),
        steps: Iterable[int] = (),
        routers: Iterable[str] = (),
        batch: int = 1,
    ) -> RouterLogits:
        """Return the tuple."""
        made = super().__new__(cls, logits)
        made.layers, made.steps, made.routers = tuple(layers), tuple(steps), tuple(routers)
        made.batch = batch
        return made

    def by_layer(self, router: str | None = None) -> dict[int, Tensor]:
        """Return the logits of all steps of each layer that has the router, [steps, b, s, N].

        Args:
            router: Name of the router. Default: the first of each layer.
        """
        steps: dict[int, dict[int, Tensor]] = {}
        for logits, layer, step, name in zip(self, self.layers, self.steps, self.routers, strict=True):
            if router in (None, name):
                steps.setdefault(layer, {}).setdefault(step, logits.unflatten(0, (self.batch, -1)))
        return {layer: torch.stack([found[step] for step in sorted(found)]) for layer, found in steps.items()}

    def at(self, layer: int, step: int = 0, router: str | None = None) -> Tensor:
        """Return the logits of one decision.

        Args:
            layer: Layer, from 0.
            step: Recurrence step, from 0.
            router: Name of the router. Default: the only one.

        Raises:
            KeyError: If it was not made, or there are several.
        """
        places = zip(self, self.layers, self.steps, self.routers, strict=True)
        found = [logits for logits, *place, name in places if place == [layer, step] and router in (None, name)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} routing decisions in layer {layer}, step {step}, router {router}")
        return found[0]


def load_balancing_loss(router_logits: Iterable[Tensor], config: Config, mask: Tensor | None) -> Tensor:
    """Return the balance loss of the Switch Transformer (arXiv 2101.03961, equation 4), the mean over decisions.

    It is 1 if experts get the same share of tokens and of probability.

    Args:
        router_logits: Logits of each decision, [b s, N].
        config: Model configuration.
        mask: 0 for padding, which is not counted, [b, T].
    """
    losses = []
    for logits in router_logits:
        scores = router_scores(config, logits)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(config.num_experts_per_tok, dim=-1)[1], 1.0)
        counted = scores.new_ones(len(scores), 1)
        if mask is not None:
            counted = mask[:, -(len(scores) // len(mask)) :].reshape(-1, 1).to(scores)
        tokens = counted.sum().clamp(min=1.0)
        load = (chosen * counted).sum(0) / (tokens * config.num_experts_per_tok)
        losses.append(config.num_experts * (load * (scores * counted).sum(0) / tokens).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
