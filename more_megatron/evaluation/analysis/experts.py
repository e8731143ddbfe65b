"""Which expert takes which tokens, by layer and step."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np
import torch

from more_megatron.evaluation.analysis.expert_figures import draw_experts
from more_megatron.evaluation.analysis.routing import (
    Decision,
    PlaceStatistics,
    check_routers,
    jaccard,
    routing_decisions,
)
from more_megatron.evaluation.analysis.token_kinds import KINDS, TokenKinds
from more_megatron.evaluation.analysis.writing import write_analysis
from more_megatron.evaluation.exported_model import ExportedModel, open_model
from more_megatron.evaluation.texts import batches, read_texts, token_windows
from more_megatron.flags import check_ranges
from more_megatron.progress import progress_bar

__all__ = ["analyze_experts"]

_FREQUENT = 30
_Place = tuple[int, int]


def analyze_experts(args: argparse.Namespace) -> list[str]:
    """Read a text with a model, and write which experts its tokens go to.

    Args:
        args: Flags of `tools/analyze.py experts`.

    Returns:
        What was found, in lines.

    Raises:
        MoREError: If the model has no experts, or model or text cannot be read.
    """
    check_ranges(args, {"max_tokens": "[1, inf)"})
    texts = read_texts(args.text)
    with open_model(args) as exported:
        check_routers(exported)
        options = exported.call_options(args.num_steps)
        windows = list(token_windows(exported.tokenizer, texts, exported.length, args.max_tokens))
        report = _Reading(exported, windows, options).report(args.batch_size)
    report = {"model": str(exported.source), "text": str(args.text), **report}
    return [*_lines(report), write_analysis("experts", report, draw_experts, args.output)]


class _Reading:
    """One text, read by one model.

    Args:
        exported: The model.
        windows: Tokens of the text, in pieces that the model reads at once.
        options: Arguments of every call.
    """

    def __init__(self, exported: ExportedModel, windows: list[list[int]], options: dict[str, Any]) -> None:
        self._model = exported.model
        self._experts = int(exported.model.config.num_experts)
        self._kinds = TokenKinds(exported.tokenizer, int(exported.model.config.vocab_size))
        self._windows, self._options = windows, options
        counts = Counter(token for window in windows for token in window)
        self._frequent = counts.most_common(_FREQUENT)
        self._ranks = np.full(int(exported.model.config.vocab_size), -1)
        self._ranks[[token for token, _ in self._frequent]] = np.arange(len(self._frequent))
        self._kind_counts = np.zeros(len(KINDS), dtype=np.int64)
        self._places: dict[_Place, PlaceStatistics] = {}
        # Of each place and the step before it in the same layer: sum of Jaccard indices, tokens that changed.
        self._changes: dict[_Place, np.ndarray] = {}

    def report(self, batch_size: int) -> dict[str, Any]:
        """Read everything, so many windows at a time, and return all figures."""
        total = sum(map(len, self._windows))
        with progress_bar(total, "tok", "reading", True) as bar:
            for batch in batches(self._windows, batch_size):
                self._read(batch)
                bar.update(sum(map(len, batch)))
        places = []
        for (layer, step), statistics in sorted(self._places.items()):
            summary = {"layer": layer, "step": step, **statistics.summary()}
            if (layer, step) in self._changes:
                similarity, changed = self._changes[layer, step] / total
                summary |= {"jaccard_with_step_before": similarity, "changed_since_step_before": changed}
            places.append(summary)
        return {
            "tokens": total,
            "num_steps": self._options.get("num_steps", self._model.config.mean_recurrence),
            "num_experts": self._experts,
            "kinds": dict(zip(KINDS, self._kind_counts.tolist(), strict=True)),
            "frequent_tokens": [{"token": self._kinds.name(token), "count": count} for token, count in self._frequent],
            "places": places,
        }

    def _read(self, batch: list[list[int]]) -> None:
        kinds = np.concatenate([self._kinds.of(window) for window in batch])
        ranks = self._ranks[batch].ravel()
        self._kind_counts += np.bincount(kinds, minlength=len(KINDS))
        former: dict[int, Decision] = {}
        tokens = torch.tensor(batch, device=self._model.device)
        for decision in routing_decisions(self._model, tokens, self._options):
            place = (decision.layer, decision.step)
            if place not in self._places:
                self._places[place] = PlaceStatistics(len(KINDS), len(self._frequent), self._experts)
            self._places[place].see(decision, kinds, ranks)
            if decision.layer in former:
                similarity = jaccard(former[decision.layer].experts, decision.experts)
                found = np.array([float(similarity.sum()), float((similarity < 1.0).sum())])
                self._changes[place] = self._changes.get(place, np.zeros(2)) + found
            former[decision.layer] = decision


def _lines(report: dict[str, Any]) -> list[str]:
    """Return a table of all places."""
    lines = ["layer  step  specialisation  by token  router entropy  load entropy  most loaded  changed"]
    for place in report["places"]:
        changed = place.get("changed_since_step_before")
        lines.append(
            f"{place['layer']:5}  {place['step']:4}  {place['specialisation']:14.3f}  "
            f"{place['specialisation_by_token']:8.3f}  {place['router_entropy']:14.3f}  {place['load_entropy']:12.3f}  "
            f"{max(place['load']):11.3f}  {'' if changed is None else format(changed, '7.3f')}".rstrip()
        )
    return lines
