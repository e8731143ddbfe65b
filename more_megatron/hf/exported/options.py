"""What a call may say of its recurrences."""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .exits import CRITERIA, Criterion
from .fields import Config

WITHOUT_STEPS = "in this system the number of steps means nothing"
_OTHER_NAMES = {"exit_criterion": "criterion"}


@dataclass(frozen=True)
class CallOptions:
    """What a call, of the model or of `generate`, may say of its recurrences.

    Attributes:
        num_steps: Recurrence steps r. Default: `mean_recurrence` of the configuration. Without effect where nothing
            recurs.
        input_states: Initial states of the recurrences, [states, b, up to s, h]; tokens beyond them begin with noise.
            Default: noise that depends on the seed, layer, position and channel only, so that a text has the same
            logits in every call.
        init_scale: Factor on the standard deviation of that noise.
        criterion: When a token stops by itself, before `num_steps`: a name in `exits.CRITERIA` or a `Criterion`.
            `exit_criterion` is the same.
        exit_threshold: Distance below which it does. Default, or "auto": that of the criterion.
        min_steps: Steps that it takes at least.
        cache_steps: Steps of which a cache keeps keys and values, later ones writing over earlier ones. Default: all.
        warm_start: Whether the first token of a call starts from the last state of the token before it, in the cache.
        output_recurrent_states: Whether to return the state behind each step; the width is that of the state. Of a
            token with several experts it is the mean of theirs, and a token that stops keeps its last.
    """

    num_steps: int
    input_states: Tensor | None = None
    init_scale: float = 1.0
    criterion: Criterion | None = None
    exit_threshold: float = 0.0
    min_steps: int = 1
    cache_steps: int | None = None
    warm_start: bool = False
    output_recurrent_states: bool = False

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any], config: Config) -> CallOptions:
        """Return the options among the arguments of a call, where they are taken away.

        Raises:
            ValueError: If an argument is of a wrong type, out of range or without effect.
        """
        if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
            raise ValueError("output_attentions has no effect: MoRE models do not keep attention weights")
        found = {name: kwargs.pop(name, None) for name in OPTIONS}
        given = {_OTHER_NAMES.get(name, name): value for name, value in found.items() if value is not None}
        given.setdefault("num_steps", config.mean_recurrence)
        for name in ("num_steps", "cache_steps"):
            if name in given:
                given[name] = positive(name, given[name])
        _settle_exit(given)
        return cls(**given)

    @property
    def slots(self) -> int | None:
        """The steps that a cache keeps; None: all."""
        return None if self.cache_steps is None or self.cache_steps >= self.num_steps else self.cache_steps


def _settle_exit(given: dict[str, Any]) -> None:
    """Put the criterion and its threshold in the place of their names."""
    criterion, names = given.pop("criterion", "none"), ", ".join(CRITERIA)
    if criterion == "none":
        for name in ("exit_threshold", "min_steps"):
            if name in given:
                raise ValueError(f"{name} {given[name]!r} has no effect without a criterion: choose one of {names}")
        return
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(f"criterion {criterion!r} does not exist: choose one of {names}")
        criterion = CRITERIA[criterion]()
    least, threshold = given.get("min_steps", 1), given.get("exit_threshold", "auto")
    if not isinstance(least, int) or not 1 <= least <= given["num_steps"]:
        raise ValueError(f"min_steps {least!r} must be an integer between 1 and num_steps {given['num_steps']}")
    threshold = criterion.threshold if threshold == "auto" else threshold
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0.0:
        raise ValueError(f"exit_threshold {threshold!r} must be a number of at least 0, or 'auto'")
    given.update(criterion=criterion, exit_threshold=threshold)


# A tracer cannot ask a class for its fields.
OPTIONS = frozenset(field.name for field in fields(CallOptions)) | set(_OTHER_NAMES)
"""Names of all options."""


def positive(name: str, value: Any) -> int:
    """Return an integer of at least 1, or raise a `ValueError` that names it."""
    given: Any = None if isinstance(value, bool) else value
    try:
        found = operator.index(given)
    except TypeError:
        raise ValueError(f"{name} {value!r} must be an integer") from None
    if found < 1:
        raise ValueError(f"{name} {found} must be at least 1")
    return found
