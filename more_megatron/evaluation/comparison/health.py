"""How healthy the runs of an arm were, from the `health.jsonl` of each; docs/health.md says what the figures are.

Means are over layers first, then over recurrence steps, then over the seeds whose runs were watched.
"""

import math
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from more_megatron.evaluation.analysis.health_page import split_tag, warned_figure
from more_megatron.evaluation.comparison.measures import ArmResult, Spread, spreads

FIGURES = ("load cv", "effective experts", "entropy", "dead experts")
"""Figures of routing in a report."""

Record = Mapping[str, Any]


def summary(arm: ArmResult) -> dict[str, Any]:
    """Return what a table says of an arm at the last training step that was watched.

    Returns:
        `seeds`, how many runs were watched; `experts`, the number a layer has, None without routers; `warnings`, lines
        of warning in a whole run; `warned`, the figures that they were about; and the `FIGURES`. Spreads over the
        seeds, None where there is nothing to say.
    """
    last = [records[-1] for records in arm.watched]
    warnings = [[warning for record in records for warning in record["warnings"]] for records in arm.watched]
    figures = {name: [mean for record in last for mean in _mean(_by_step(record, name))] for name in FIGURES}
    figures["warnings"] = [float(len(lines)) for lines in warnings]
    return {
        "seeds": len(last),
        "experts": next(map(_experts, last), None),
        "warned": sorted({warned_figure(line) for lines in warnings for line in lines}),
        **{name: Spread.of(values) if values else None for name, values in figures.items()},
    }


def entropy_over_training(arm: ArmResult) -> dict[int, Spread]:
    """Return the mean entropy of routers, in parts of ln N, at each training step that was watched."""
    records = [record for run in arm.watched for record in run]
    return spreads((record["iteration"], mean) for record in records for mean in _mean(_entropies(record)))


def entropy_by_step(arm: ArmResult) -> dict[int, Spread]:
    """Return that entropy at each recurrence step of the last step watched; none for routers that are asked once."""
    return spreads((step, value) for run in arm.watched for step, value in _entropies(run[-1]).items() if step)


def loads(arm: ArmResult) -> dict[int, np.ndarray]:
    """Return the load of experts by recurrence step (0: asked once), the most loaded one first.

    Expert 3 of one layer or seed has nothing to do with expert 3 of another, so that each of them is put in order by
    itself before the mean is taken.
    """
    found: dict[int, list[np.ndarray]] = {}
    for run in arm.watched:
        for step, experts in _tagged(run[-1]["experts"], "load"):
            found.setdefault(step, []).append(np.sort(experts["load"])[::-1])
    return {step: np.mean(each, axis=0) for step, each in sorted(found.items())}


def _experts(record: Record) -> int | None:
    return max((len(each["load"]) for each in record["experts"].values()), default=None)


def _entropies(record: Record) -> dict[int, float]:
    """Return the entropy of routers by recurrence step (0: none): 1 where all experts are as likely."""
    highest = math.log(max(_experts(record) or 2, 2))
    return {step: value / highest for step, value in _by_step(record, "entropy").items()}


def _by_step(record: Record, figure: str) -> dict[int, float]:
    """Return a figure of routing by recurrence step (0: none), its mean over the layers."""
    found = spreads(pair for pair in _tagged(record["figures"], figure) if pair[1] is not None)
    return {step: over_layers.mean for step, over_layers in found.items()}


def _tagged(values: Mapping[str, Any], name: str) -> Iterator[tuple[int, Any]]:
    """Yield recurrence step (0: none) and value of a figure of routing, layer after layer."""
    for tag, value in values.items():
        place, step = split_tag(tag)
        if re.fullmatch(f"routing/[^/]+/{name}", place):
            yield step, value


def _mean(by_step: Mapping[int, float]) -> list[float]:
    """Return the mean over the steps; nothing without steps."""
    return [statistics.fmean(by_step.values())] if by_step else []
