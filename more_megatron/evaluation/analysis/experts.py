"""Which expert takes which tokens, by layer and step."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np
import torch

from more_megatron.errors import MoREError
from more_megatron.evaluation.analysis.expert_figures import draw_experts
from more_megatron.evaluation.analysis.routing import Decision, PlaceStatistics, routing_decisions
from more_megatron.evaluation.analysis.token_kinds import KINDS, TokenKinds
from more_megatron.evaluation.analysis.writing import write_analysis
from more_megatron.evaluation.exported_model import ExportedModel, open_model
from more_megatron.evaluation.texts import batches, read_texts, token_windows
from more_megatron.flags import check_ranges
from more_megatron.progress import progress_bar

__all__ = ["analyze_experts"]

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
    return [*_lines(report), write_analysis("experts", report, draw_experts, args.output)]


def _read(
    exported: ExportedModel, windows: list[list[int]], options: dict[str, Any], batch_size: int
) -> dict[str, Any]:
    """Read the windows of a text, so many at a time, and return all figures."""
    model, config = exported.model, exported.model.config
    token_kinds = TokenKinds(exported.tokenizer, int(config.vocab_size))
    frequent = Counter(token for window in windows for token in window).most_common(_FREQUENT)
    ranks = np.full(int(config.vocab_size), -1)
    ranks[[token for token, _ in frequent]] = np.arange(len(frequent))
    kind_counts = np.zeros(len(KINDS), dtype=np.int64)
    places: dict[tuple[int, int], PlaceStatistics] = {}
    total = sum(map(len, windows))
    with progress_bar(total, "tok", "reading", True) as bar:
        for batch in batches(windows, batch_size):
            kinds = np.concatenate([token_kinds.of(window) for window in batch])
            kind_counts += np.bincount(kinds, minlength=len(KINDS))
            former: dict[int, Decision] = {}
            for decision in routing_decisions(model, torch.tensor(batch, device=model.device), options):
                layer, step = decision.layer, decision.step
                if (layer, step) not in places:
                    places[layer, step] = PlaceStatistics(len(KINDS), len(frequent), int(config.num_experts))
                places[layer, step].see(decision, kinds, ranks[batch].ravel(), former.get(layer))
                former[layer] = decision
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
