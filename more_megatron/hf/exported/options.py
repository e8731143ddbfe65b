"""What a call may say of its recurrences."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .exits import CRITERIA, Criterion, Exits
from .fields import Config
from .interface import System

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

    num_steps: Any = None
    input_states: Tensor | None = None
    init_scale: float = 1.0
    criterion: str | Criterion | None = None
    exit_threshold: float | str | None = None
    min_steps: int | None = None
    cache_steps: int | None = None
    warm_start: bool = False
    output_recurrent_states: bool = False

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> CallOptions:
        """Return the options among the arguments of a call, where they are taken away."""
        given = {_OTHER_NAMES.get(name, name): kwargs.pop(name) for name in OPTIONS if name in kwargs}
        if given.get("criterion") == "none":
            del given["criterion"]
        return cls(**{name: value for name, value in given.items() if value is not None})

    def steps(self, config: Config) -> int:
        """Return the number of steps, or raise a `ValueError` if it is not an integer of at least 1."""
        return config.mean_recurrence if self.num_steps is None else positive("num_steps", self.num_steps)

    def check(self, config: Config, system: System, embeddings: Tensor) -> None:
        """Raise a `ValueError` if an option has no effect in a system, or initial states do not fit [b, s, h]."""
        number = system.num_states(config)
        needs = {
            "criterion": (system.recurrent, WITHOUT_STEPS),
            "cache_steps": (system.caches_steps(config), "the cache of this system does not grow with the steps"),
            "warm_start": (number > 0, "the recurrences of this system start from their input"),
            "input_states": (number > 0, "this system has no initial states"),
        }
        for name, (has_effect, reason) in needs.items():
            if not has_effect and getattr(self, name) is not None and getattr(self, name) is not False:
                raise ValueError(f"{name} has no effect: {reason}")
        if self.input_states is not None:
            found, wanted = tuple(self.input_states.shape), (number, *embeddings.shape)
            if len(found) != 4 or found[:2] + found[3:] != wanted[:2] + wanted[3:] or not 1 <= found[2] <= wanted[2]:
                raise ValueError(f"input_states has shape {found}, and not {wanted}")

    def exits(self, config: Config, read: Callable[[Tensor], Tensor] | None) -> Exits | None:
        """Return how tokens stop by themselves; None: they do not.

        Args:
            config: Model configuration.
            read: Returns logits, given what the output layer and its norm are applied to; None where there is none.

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
        most, least = self.steps(config), 1 if self.min_steps is None else self.min_steps
        if not isinstance(least, int) or not 1 <= least <= most:
            raise ValueError(f"min_steps {least!r} must be an integer between 1 and num_steps {most}")
        threshold = criterion.threshold if self.exit_threshold in (None, "auto") else self.exit_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0.0:
            raise ValueError(f"exit_threshold {threshold!r} must be a number of at least 0, or 'auto'")
        return Exits(criterion, threshold, least, read)

    def slots(self, config: Config) -> int | None:
        """Return the steps that a cache keeps; None: all. A `ValueError` is raised as by `steps`."""
        found = None if self.cache_steps is None else positive("cache_steps", self.cache_steps)
        return None if found is None or found >= self.steps(config) else found


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
