"""Which expert takes which tokens, by layer and step: the routing decisions of calls, and what is counted of them."""

import argparse
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from more_megatron.errors import MoREError
from more_megatron.evaluation.analysis.expert_figures import draw_experts
from more_megatron.evaluation.analysis.token_kinds import KINDS, TokenKinds
from more_megatron.evaluation.exported_model import ExportedModel, open_model
from more_megatron.evaluation.texts import batches, read_texts, token_windows
from more_megatron.figures import write_results
from more_megatron.flags import check_ranges
from more_megatron.hf.exported.routing import router_scores
from more_megatron.progress import progress_bar

_FREQUENT = 30


def analyze_experts(args: argparse.Namespace) -> list[str]:
    """Read a text with a model, write which experts its tokens go to, and return what was found, in lines.

    The arguments are the flags of `tools/analyze.py experts`.

    Raises:
        MoREError: If the model has no experts, or model or text cannot be read.
    """
    check_ranges(args, {"max_tokens": "[1, inf)"})
    texts = read_texts(args.text)
    with open_model(args) as exported:
        if not any(getattr(exported.model.config, "moe_layers", ())):
            raise MoREError(
                f"the model {exported.source} has no layer with experts: there is nothing to see of its routers"
            )
        options = exported.call_options(args.num_steps)
        windows = list(token_windows(exported.tokenizer, texts, exported.length, args.max_tokens))
        report = _read(exported, windows, options, args.batch_size)
    report = {"model": str(exported.source), "text": str(args.text), **report}
    content = json.dumps(report, indent=1) + "\n"
    return [*_lines(report), write_results(args.output, {"experts.json": content}, draw_experts(report))]


def _read(exported: ExportedModel, windows: list[list[int]], options: dict[str, Any], size: int) -> dict[str, Any]:
    """Read the windows of a text, so many at a time, and return all figures."""
    model, config = exported.model, exported.model.config
    token_kinds = TokenKinds(exported.tokenizer, int(config.vocab_size))
    frequent = Counter(token for window in windows for token in window).most_common(_FREQUENT)
    ranks = np.full(int(config.vocab_size), -1)
    ranks[[token for token, _ in frequent]] = np.arange(len(frequent))
    kind_counts = np.zeros(len(KINDS), dtype=np.int64)
    new_place = functools.partial(PlaceStatistics, len(KINDS), len(frequent), int(config.num_experts))
    places: dict[tuple[int, int], PlaceStatistics] = defaultdict(new_place)
    total = sum(map(len, windows))
    with progress_bar(total, "tok", "reading", True) as bar:
        for batch in batches(windows, size):
            kinds = np.concatenate([token_kinds.of(window) for window in batch])
            kind_counts += np.bincount(kinds, minlength=len(KINDS))
            former: dict[int, Decision] = {}
            for decision in routing_decisions(model, torch.tensor(batch, device=model.device), options):
                place = places[decision.layer, decision.step]
                place.see(decision, kinds, ranks[batch].ravel(), former.get(decision.layer))
                former[decision.layer] = decision
            bar.update(sum(map(len, batch)))
    return {
        "tokens": total,
        "num_steps": options.get("num_steps", config.mean_recurrence),
        "num_experts": int(config.num_experts),
        "kinds": dict(zip(KINDS, kind_counts.tolist(), strict=True)),
        "frequent_tokens": [{"token": token_kinds.name(token), "count": count} for token, count in frequent],
        "places": [{"layer": layer, "step": step, **places[layer, step].summary()} for layer, step in sorted(places)],
    }


def _lines(report: dict[str, Any]) -> list[str]:
    lines = ["layer  step  specialisation  by token  router entropy  load entropy  most loaded  changed"]
    for place in report["places"]:
        changed = place.get("changed_since_step_before")
        lines.append(
            f"{place['layer']:5}  {place['step']:4}  {place['specialisation']:14.3f}  "
            f"{place['specialisation_by_token']:8.3f}  {place['router_entropy']:14.3f}  {place['load_entropy']:12.3f}  "
            f"{max(place['load']):11.3f}  {'' if changed is None else format(changed, '7.3f')}".rstrip()
        )
    return lines


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
        if router == "router":
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
        """Count a batch, given where its tokens went, also in the step before.

        Of each token, [b s], `kinds` is the kind, and `ranks` the number among the frequent ones, -1 for others.
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
