"""The routing decisions of a call, and what is counted of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from more_megatron.hf.exported.routing import router_scores

__all__ = ["Decision", "PlaceStatistics", "jaccard", "mutual_information", "routing_decisions"]

_ROUTER = "router"


@dataclass(frozen=True)
class Decision:
    """Where the tokens of a batch went in one layer and step, both from 0."""

    layer: int
    step: int
    experts: Tensor  # experts of each token, [b s, k]
    probabilities: Tensor  # of each token over all experts, [b s, N]; their sum is 1


@torch.no_grad()
def routing_decisions(model: Any, tokens: Tensor, options: dict[str, Any]) -> Iterator[Decision]:
    """Yield the decisions of the routers of experts of a model of ours in transformers, given texts, [b, s].

    They come in the order of computation, without those of attention heads.
    """
    output = model.model(tokens, output_router_logits=True, use_cache=False, **options)
    found = output.router_logits
    for logits, layer, step, router in zip(found, found.layers, found.steps, found.routers, strict=True):
        if router == _ROUTER:
            experts = model.model.layers[layer].mlp.gate.choose(logits)[1]
            scores = router_scores(model.config, logits)
            yield Decision(layer, step, experts.cpu(), (scores / scores.sum(-1, keepdim=True)).cpu())


class PlaceStatistics:
    """What one layer's router did in one step, by kind of token and by token that is frequent."""

    def __init__(self, kinds: int, frequent: int, experts: int) -> None:
        self._by_kind = np.zeros((kinds, experts), dtype=np.int64)
        self._by_token = np.zeros((frequent, experts), dtype=np.int64)
        self._tokens, self._entropy = 0, 0.0
        self._likeness: list[Tensor] = []

    def see(
        self, decision: Decision, kinds: np.ndarray, ranks: np.ndarray, step_before: Decision | None = None
    ) -> None:
        """Count a batch.

        Args:
            decision: Where its tokens went.
            kinds: Kind of each, [b s].
            ranks: Number of each among the frequent tokens, [b s]; -1 for others.
            step_before: Where they went in the same layer before.
        """
        experts = decision.experts.numpy()
        topk, counted = experts.shape[1], ranks >= 0
        np.add.at(self._by_kind, (np.repeat(kinds, topk), experts.ravel()), 1)
        np.add.at(self._by_token, (np.repeat(ranks[counted], topk), experts[counted].ravel()), 1)
        self._tokens += len(experts)
        self._entropy += float(torch.special.entr(decision.probabilities).sum())
        if step_before is not None:
            self._likeness.append(jaccard(step_before.experts, decision.experts))

    def summary(self) -> dict[str, Any]:
        """Return the figures of this place; entropies as a share of their greatest value, ln N."""
        load = self._by_kind.sum(0) / self._by_kind.sum()
        most = float(np.log(len(load))) or 1.0
        figures = {
            "load": load.tolist(),
            "load_entropy": _entropy(load) / most,
            "router_entropy": self._entropy / self._tokens / most,
            "specialisation": mutual_information(self._by_kind),
            "specialisation_by_token": mutual_information(self._by_token),
            "shares": _shares(self._by_kind).tolist(),
            "token_shares": _shares(self._by_token).tolist(),
        }
        if self._likeness:
            sums = np.array([[float(each.sum()), float((each < 1.0).sum())] for each in self._likeness]).sum(0)
            similarity, changed = sums / self._tokens
            figures |= {"jaccard_with_step_before": similarity, "changed_since_step_before": changed}
        return figures


def mutual_information(counts: np.ndarray) -> float:
    """Return the mutual information of rows and columns over the mean of their entropies: 0 independent, 1 the same.

    Strehl and Ghosh, JMLR 3 (2002), with the arithmetic mean. Counts are joint ones, [rows, columns].
    """
    total = counts.sum()
    if total == 0:
        return 0.0
    joint = counts / total
    rows, columns = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    mean = (rows + columns) / 2.0
    return max(0.0, (rows + columns - _entropy(joint.ravel())) / mean) if mean > 0.0 else 0.0


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Return how alike decisions of [b s, k] are, for each token, [b s]: shared experts over all experts of both."""
    shared = (first.unsqueeze(2) == second.unsqueeze(1)).any(2).sum(1).float()
    return shared / (first.size(1) + second.size(1) - shared)


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def _shares(counts: np.ndarray) -> np.ndarray:
    """Return each row as shares of its sum, 0 where there is nothing."""
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)
