"""Healthy ranges of figures, and what is said of one that lies outside.

Ranges are those of sections 5.1 and 5.2 of the research guide where it gives them, for 8 experts: entropies grow with
the logarithm of the number of experts, effective experts with their number. docs/health.md has the sources of all.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from more_megatron.errors import MoREError
from more_megatron.monitoring.recurrence import TO_INPUT
from more_megatron.monitoring.routing import Loads
from more_megatron.monitoring.watch import Key
from more_megatron.yaml_tables import read_table

_BALANCE = "raise --moe-aux-loss-coeff, or lower the learning rate"
_IGNORED = "the state is ignored: look at the adapter's state half, raise --recurrence-backprop-steps, draw the depth"
_ALIKE = "states of all tokens become alike: lower the learning rate, warm up longer, check the injection"
_GUIDE_EXPERTS = 8


@dataclass(frozen=True)
class Range:
    """Where a figure is healthy."""

    low: float | None = None  # smallest healthy value; None: there is none
    high: float | None = None  # largest healthy value; None: there is none
    hint: str = ""  # what a value outside means, and what usually helps
    is_collapse: bool = False  # whether a value outside means that the run is lost if nothing is done
    scale: Callable[[int], float] | None = None  # what both ends grow with, given the number of experts; None: nothing
    needs_injection: bool = False  # whether it holds only for recurrences that inject their input in every step
    steps: tuple[int, int] | None = None  # fewest and most recurrence steps that it holds for; None: any

    def excess(self, value: float) -> float:
        """Return how far outside a value is; 0 inside."""
        below = 0.0 if self.low is None else self.low - value
        above = 0.0 if self.high is None else value - self.high
        return math.inf if math.isnan(value) else max(below, above, 0.0)

    def __str__(self) -> str:
        if self.low is None:
            return f"at most {self.high:.3g}"
        return f"at least {self.low:.3g}" if self.high is None else f"{self.low:.3g} to {self.high:.3g}"


# Lowest and highest healthy value.
Ends = tuple[float | None, float | None]

_ROUTING = {
    "load cv": Range(None, 0.3, f"experts are used unevenly: {_BALANCE}"),
    "largest ratio": Range(0.8, 1.5, f"an expert is preferred: {_BALANCE}"),
    "smallest ratio": Range(0.5, 1.2, f"an expert starves: {_BALANCE}"),
    "effective experts": Range(6.0, None, f"few experts do the work: {_BALANCE}", scale=float),
    "entropy": Range(1.5, 2.8, "tokens are routed without doubt or at random: set --moe-z-loss-coeff", scale=math.log),
    "largest probability trend": Range(
        -0.3, 0.3, "the router gets surer from step to step, or less sure: set --router-min-entropy"
    ),
    "largest load": Range(None, 0.9, f"one expert takes nearly all tokens: {_BALANCE}", is_collapse=True),
}
# Those that hold where experts compete for the probability of a token.
OF_SOFTMAX = tuple(f"routing/{name}" for name in _ROUTING)
_REPEATED_ENTROPY = Range(1.2, 2.5, "tokens are routed without doubt: set --router-min-entropy", scale=math.log)

_EVERYWHERE = {
    "routing/dead experts": Range(None, 0, f"experts receive no tokens: {_BALANCE}", is_collapse=True),
    "recurrence/mean change": Range(0.005, 2.0, _IGNORED, needs_injection=True, steps=(2, 8)),
    "recurrence/second step": Range(0.02, None, _IGNORED, is_collapse=True, needs_injection=True),
    "recurrence/change trend": Range(None, 0.1, "states drift apart: lower the learning rate", needs_injection=True),
    "recurrence/last step share": Range(
        0.05, 0.5, "states do not move, or do not settle: look at the steps", needs_injection=True, steps=(4, 4)
    ),
    "recurrence/token correlation": Range(None, 0.9, _ALIKE, is_collapse=True),
    "recurrence/adapter state norm": Range(0.1, 10.0, _IGNORED, is_collapse=True),
    "recurrence/adapter input norm": Range(
        0.1, 10.0, "the input is ignored: look at the adapter's input half", is_collapse=True
    ),
    "depth/spread": Range(0.0005, None, f"the loss is the same at every r: {_IGNORED}", is_collapse=True),
    "gradient/spikes": Range(None, 10, "the gradient norm spikes: lower --lr or --clip-grad, warm up longer"),
    "loss/variation": Range(None, 0.1, "the loss is unstable: lower --lr, raise --global-batch-size"),
}


def healthy_ranges(
    own: Mapping[str, Ends | None], overrides: Path | None, *, has_softmax_router: bool, repeats_router: bool
) -> dict[str, Range]:
    """Return the ranges that hold for a run, by figure.

    Args:
        own: Those that its system has otherwise, and of its own figures: `(low, high)` by figure, or None for no range.
        overrides: YAML file: figure to `[low, high]`, `null` for an open end, `null` alone for no range.
        has_softmax_router: Whether experts compete for the probability of a token.
        repeats_router: Whether routers are asked in every step.

    Raises:
        MoREError: If the file cannot be read, or an entry is no range.
    """
    ranges = dict(_EVERYWHERE)
    if has_softmax_router:
        ranges |= {f"routing/{name}": healthy for name, healthy in _ROUTING.items()}
        if repeats_router:
            ranges["routing/entropy"] = _REPEATED_ENTROPY
    given = {} if overrides is None else _read(overrides, known={*ranges, *own})
    for name, ends in (*own.items(), *given.items()):
        if ends is None:
            ranges.pop(name, None)
        else:
            low, high = ends
            former = ranges.get(name, Range(hint="docs/health.md says what it is"))
            ranges[name] = dataclasses.replace(former, low=low, high=high, scale=None)
    return ranges


def _read(path: Path, known: Set[str]) -> dict[str, Any]:
    """Return the ranges of a file; names that are nearly those of known figures are slips."""
    content = read_table(path, "--health-ranges", "give lines such as `routing/load cv: [0, 0.5]`")
    for name, ends in content.items():
        if not (isinstance(name, str) and (ends is None or _is_range(ends))):
            raise MoREError(f"--health-ranges {path}: {name} must be [low, high] or null, and is {ends!r}")
    for name in content:
        meant = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.9)
        if meant:
            raise MoREError(f"--health-ranges {path}: there is no figure {name}; did you mean {meant[0]}?")
    return content


def _is_range(ends: Any) -> bool:
    if not isinstance(ends, list) or len(ends) != 2:
        return False
    if not all(end is None or (isinstance(end, int | float) and not isinstance(end, bool)) for end in ends):
        return False
    low, high = (limit if end is None else end for end, limit in zip(ends, (-math.inf, math.inf), strict=True))
    # Numbers that are none are not in order.
    return low <= high


class Finding(NamedTuple):
    """A figure outside of its healthy range."""

    text: str  # one line: what, where, the value, the range, and what usually helps
    is_collapse: bool  # whether the run is lost if nothing is done


def findings(figures: Mapping[Key, float], ranges: Mapping[str, Range], loads: Loads) -> list[Finding]:
    """Return what lies outside of its range: one finding for each figure, of the place where it is worst."""
    outside: dict[str, list[tuple[float, Key, Range]]] = {}
    for key, value in figures.items():
        name = f"{key.concern}/{key.name}"
        if name in ranges and _applies(ranges[name], key, figures):
            healthy = _scaled(ranges[name], key, loads)
            excess = healthy.excess(value)
            if excess > 0.0:
                outside.setdefault(name, []).append((excess, key, healthy))
    found = []
    for name, worst in outside.items():
        _, key, healthy = max(worst, key=lambda entry: entry[:2])
        more = f" and {len(worst) - 1} more" if len(worst) > 1 else ""
        text = f"{name} is {figures[key]:.3g}{_where(key, loads)}{more}, healthy is {healthy}: {healthy.hint}"
        found.append(Finding(text, healthy.is_collapse))
    return found


def _applies(healthy: Range, key: Key, figures: Mapping[Key, float]) -> bool:
    if healthy.needs_injection and Key(key.concern, TO_INPUT, key.place) not in figures:
        return False
    fewest, most = healthy.steps or (0, math.inf)
    return fewest <= figures.get(Key(key.concern, "steps", key.place), 0) <= most


def _scaled(healthy: Range, key: Key, loads: Loads) -> Range:
    if healthy.scale is None:
        return healthy
    factor = healthy.scale(len(loads[_load_key(key)][0])) / healthy.scale(_GUIDE_EXPERTS)
    low, high = (None if end is None else end * factor for end in (healthy.low, healthy.high))
    return dataclasses.replace(healthy, low=low, high=high)


def _load_key(key: Key) -> Key:
    return Key("routing", "load", key.place, key.step)


def _where(key: Key, loads: Loads) -> str:
    place = [key.place] if key.place else []
    place += [f"step {key.step}"] if key.step else []
    if experts := _experts(key, loads):
        place.append(f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}")
    return f" in {', '.join(place)}" if place else ""


def _experts(key: Key, loads: Loads) -> list[int]:
    """Return the experts that a figure of routing is about, numbered from 0."""
    if key.concern != "routing" or _load_key(key) not in loads:
        return []
    load, probability = loads[_load_key(key)]
    match key.name:
        case "dead experts":
            return np.flatnonzero(load == 0).tolist()
        case "largest load":
            return [int(load.argmax())]
        case "load cv" | "effective experts" | "largest ratio":
            return [int(probability.argmax())]
        case "smallest ratio":
            return [int(probability.argmin())]
    return []
