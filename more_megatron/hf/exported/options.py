"""What a call may say of its recurrences."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .exits import CRITERIA, Criterion, Exits
from .fields import Config

__all__ = ["OPTIONS", "WITHOUT_STEPS", "CallOptions", "positive"]

WITHOUT_STEPS = "in this system the number of steps means nothing"


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
        min_steps: Steps that it takes at least. Default: 1.
        cache_steps: Steps of which a cache keeps keys and values, later ones writing over earlier ones. Default: all.
        warm_start: Whether the first token of a call starts from the last state of the token before it, in the cache.
        output_recurrent_states: Whether to return the state behind each step; the width is that of the state. Of a
            token with several experts it is the mean of theirs, and a token that stops keeps its last.
    """

    num_steps: int
    input_states: Tensor | None = None
    init_scale: float = 1.0
    criterion: str | Criterion | None = None
    exit_threshold: float | str | None = None
    min_steps: int | None = None
    cache_steps: int | None = None
    warm_start: bool = False
    output_recurrent_states: bool = False

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any], config: Config) -> CallOptions:
        """Return the options among the arguments of a call, where they are taken away.

        Raises:
            ValueError: If numbers of steps are not integers of at least 1, or attention weights are wanted.
        """
        if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
            raise ValueError("output_attentions has no effect: MoRE models do not keep attention weights")
        given = {_OTHER_NAMES.get(name, name): kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("criterion") == "none":
            del given["criterion"]
        given.setdefault("num_steps", config.mean_recurrence)
        for name in ("num_steps", "cache_steps"):
            if name in given:
                given[name] = positive(name, given[name])
        return cls(**given)

    def exits(self, read: Callable[[Tensor], Tensor] | None) -> Exits | None:
        """Return how tokens stop by themselves; None: they do not.

        `read` returns logits, given what the output layer and its norm are applied to; None where there is none.

        Raises:
            ValueError: If there is no such criterion, or an argument has no effect or is out of range.
        """
        criterion, names = self.criterion, ", ".join(CRITERIA)
        if criterion is None:
            for name, value in (("exit_threshold", self.exit_threshold), ("min_steps", self.min_steps)):
                if value is not None:
                    raise ValueError(f"{name} {value!r} has no effect without a criterion: choose one of {names}")
            return None
        if isinstance(criterion, str):
            if criterion not in CRITERIA:
                raise ValueError(f"criterion {criterion!r} does not exist: choose one of {names}")
            criterion = CRITERIA[criterion]()
        if criterion.reads_logits and read is None:
            raise ValueError(f"{type(criterion).__name__} reads logits: load the model with AutoModelForCausalLM")
        least = 1 if self.min_steps is None else self.min_steps
        if not isinstance(least, int) or not 1 <= least <= self.num_steps:
            raise ValueError(f"min_steps {least!r} must be an integer between 1 and num_steps {self.num_steps}")
        threshold = criterion.threshold if self.exit_threshold in (None, "auto") else self.exit_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0.0:
            raise ValueError(f"exit_threshold {threshold!r} must be a number of at least 0, or 'auto'")
        return Exits(criterion, threshold, least, read)

    @property
    def slots(self) -> int | None:
        """The steps that a cache keeps; None: all."""
        return None if self.cache_steps is None or self.cache_steps >= self.num_steps else self.cache_steps


_OTHER_NAMES = {"exit_criterion": "criterion"}
# A tracer cannot ask a class for its fields.
OPTIONS = frozenset(field.name for field in fields(CallOptions)) | set(_OTHER_NAMES)
"""Names of all options."""


def positive(name: str, value: Any) -> int:
    """Return an integer of at least 1, or raise a `ValueError` that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError("a truth value")
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} {value!r} must be an integer") from None
    if found < 1:
        raise ValueError(f"{name} {found} must be at least 1")
    return found
