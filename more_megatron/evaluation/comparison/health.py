"""How healthy the runs of an arm were, from the `health.jsonl` of each; docs/health.md says what the figures are.

Means are over layers first, then over recurrence steps, then over the seeds whose runs were watched.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from more_megatron.evaluation.analysis.health_page import warned_figure
from more_megatron.evaluation.comparison.measures import ArmResult, Spread

__all__ = ["FIGURES", "entropy_by_step", "entropy_level", "entropy_over_training", "loads", "summary"]

FIGURES = ("load cv", "effective experts", "entropy", "dead experts")
"""Figures of routing in a report."""

_TAG = re.compile(r"routing/[^/]+/(?P<name>[^/]+)(?:/step (?P<step>\d+))?")
Record = Mapping[str, Any]


def summary(arm: ArmResult) -> dict[str, Any]:
    """Return what a table says of an arm at the last training step that was watched.

    Returns:
        `seeds`, how many runs were watched; `experts`, the number a layer has, None without routers; `warnings`, lines
        of warning in a whole run; `warned`, the figures that they were about; and the `FIGURES`. Spreads over the
        seeds, None where there is nothing to say.
    """
    watched = [run.health for run in arm.finished if run.health]
    warnings = [[warning for record in records for warning in record["warnings"]] for records in watched]
    figures = {name: _figure(arm, name) for name in FIGURES}
    figures["warnings"] = Spread.of([float(len(lines)) for lines in warnings]) if watched else None
    return {
        "seeds": len(watched),
        "experts": next((_experts(records[-1]) for records in watched), None),
        "warned": sorted({warned_figure(line) for lines in warnings for line in lines}),
        **{name: spread and dataclasses.asdict(spread) for name, spread in figures.items()},
    }


def entropy_over_training(arm: ArmResult) -> dict[float, Spread]:
    """Return the mean entropy of routers, in parts of ln N, at each training step that was watched."""
    records = [record for run in arm.finished for record in run.health]
    return _spreads((record["iteration"], value) for record in records for value in _means(_entropies(record)))


def entropy_by_step(arm: ArmResult) -> dict[float, Spread]:
    """Return the same at each recurrence step of the last training step; none for routers that are asked once."""
    records = [run.health[-1] for run in arm.finished if run.health]
    return _spreads((step, value) for record in records for step, value in _entropies(record).items() if step)


def entropy_level(arm: ArmResult) -> Spread | None:
    """Return the same for routers that are asked once; None without such."""
    return None if entropy_by_step(arm) else next(reversed(entropy_over_training(arm).values()), None)


def loads(arm: ArmResult) -> dict[int, np.ndarray]:
    """Return the load of experts by recurrence step (0: asked once), the most loaded one first.

    Expert 3 of one layer or seed has nothing to do with expert 3 of another, so that each of them is put in order by
    itself before the mean is taken.
    """
    found: dict[int, list[np.ndarray]] = {}
    for record in (run.health[-1] for run in arm.finished if run.health):
        for tag, experts in record["experts"].items():
            match = _TAG.fullmatch(tag)
            if match is not None:
                found.setdefault(int(match["step"] or 0), []).append(np.sort(experts["load"])[::-1])
    return {step: np.mean(each, axis=0) for step, each in sorted(found.items())}


def _figure(arm: ArmResult, name: str) -> Spread | None:
    """Return a figure of routing at the last training step that was watched; None where no run has it."""
    records = [run.health[-1] for run in arm.finished if run.health]
    values = [value for record in records for value in _means(_by_step(record, name))]
    return Spread.of(values) if values else None


def _experts(record: Record) -> int | None:
    """Return the experts of a layer; None without."""
    return max((len(each["load"]) for each in record["experts"].values()), default=None)


def _entropies(record: Record) -> dict[int, float]:
    """Return the entropy of routers by recurrence step (0: none): 1 where all experts are as likely."""
    return {
        step: value / math.log(max(_experts(record) or 2, 2)) for step, value in _by_step(record, "entropy").items()
    }


def _by_step(record: Record, figure: str) -> dict[int, float]:
    """Return a figure of routing by recurrence step (0: none), its mean over the layers."""
    values: dict[int, list[float]] = {}
    for tag, value in record["figures"].items():
        match = _TAG.fullmatch(tag)
        if match is not None and match["name"] == figure and value is not None:
            values.setdefault(int(match["step"] or 0), []).append(value)
    return {step: statistics.fmean(each) for step, each in sorted(values.items())}


def _means(by_step: Mapping[int, float]) -> list[float]:
    """Return the mean over the steps; nothing without steps."""
    return [statistics.fmean(by_step.values())] if by_step else []


def _spreads(pairs: Iterable[tuple[float, float]]) -> dict[float, Spread]:
    """Return the spread of the values of each key, in order of the keys."""
    values: dict[float, list[float]] = {}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return {key: Spread.of(values[key]) for key in sorted(values)}
