"""The model configuration: Megatron's, plus the fields that describe recurrence.

Each field below is a command-line flag; its docstring is the flag's help text.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer import TransformerConfig

from more_megatron.errors import MoREError

__all__ = ["MoREConfig", "more_field_names"]

_DEFAULT_STEPS = 4


@dataclass
class MoREConfig(TransformerConfig):
    """What a MoRE system adds to a Megatron model: which system it is, and how its recurrence runs."""

    more_variant: str = "recurrent_moe"
    """System to train: a name from the systems table of README.md."""

    recurrence_steps: int | None = None
    """Recurrence steps r: the number under fixed sampling, the mean otherwise. Default: the midpoint of
    --recurrence-min-steps and --recurrence-max-steps under uniform sampling, else 4."""

    recurrence_sampling: Literal["fixed", "uniform"] = "fixed"
    """How r is chosen in training: always the same, or uniform between the minimum and the maximum, both included."""

    recurrence_sampling_unit: Literal["step", "micro-batch"] = "step"
    """Whether r is drawn once for a training step or anew for each of its micro-batches."""

    recurrence_min_steps: int | None = None
    """Smallest r that is drawn. Default: 1."""

    recurrence_max_steps: int | None = None
    """Largest r that is drawn. Default: as far above --recurrence-steps as the minimum is below."""

    recurrence_backprop_steps: int | None = None
    """Number of last steps that carry gradient; the steps before them do not. Default: all."""

    recurrence_eval_steps: int | None = None
    """Recurrence steps in evaluation. Default: --recurrence-steps."""

    recurrence_residual_scale: float = 1.0
    """Factor on what each step of a recurrent MoE layer adds to the residual stream."""

    def __post_init__(self) -> None:
        """Complete and check the recurrence fields.

        Raises:
            MoREError: If a field is out of range or contradicts another; the message names the flag.
        """
        super().__post_init__()
        for name in _STEP_FIELDS:
            _require_positive(name, getattr(self, name))
        self._complete_steps()
        self._check_range()

    def _complete_steps(self) -> None:
        uniform = self.recurrence_sampling == "uniform"
        if self.recurrence_steps is None:
            has_range = uniform and self.recurrence_max_steps is not None
            bounds = ((self.recurrence_min_steps or 1), self.recurrence_max_steps or 1)
            self.recurrence_steps = (sum(bounds) + 1) // 2 if has_range else _DEFAULT_STEPS
        if not uniform:
            self.recurrence_min_steps = self.recurrence_max_steps = self.recurrence_steps
        if self.recurrence_min_steps is None:
            self.recurrence_min_steps = 1
        if self.recurrence_max_steps is None:
            self.recurrence_max_steps = max(2 * self.recurrence_steps - self.recurrence_min_steps, 1)
        if self.recurrence_backprop_steps is None:
            self.recurrence_backprop_steps = self.recurrence_max_steps
        if self.recurrence_eval_steps is None:
            self.recurrence_eval_steps = self.recurrence_steps

    def _check_range(self) -> None:
        low, high, mean = self.recurrence_min_steps, self.recurrence_max_steps, self.recurrence_steps
        if high < low:
            raise MoREError(
                f"--recurrence-max-steps {high} is below --recurrence-min-steps {low}: raise the one or lower the other"
            )
        if not low <= mean <= high:
            raise MoREError(
                f"--recurrence-steps {mean} lies outside --recurrence-min-steps {low} to --recurrence-max-steps {high}: "
                "choose a mean between them or leave it out"
            )


_STEP_FIELDS = tuple(
    f"recurrence_{name}" for name in ("steps", "min_steps", "max_steps", "backprop_steps", "eval_steps")
)


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise MoREError(f"{flag(name)} {value} must be at least 1")


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def more_field_names() -> list[str]:
    """Return the names of the fields that `MoREConfig` adds to Megatron's configuration."""
    inherited = {field.name for field in dataclasses.fields(TransformerConfig)}
    return [field.name for field in dataclasses.fields(MoREConfig) if field.name not in inherited]
