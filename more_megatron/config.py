"""The model configuration: Megatron's, plus the fields that describe recurrence.

Each field below is a command-line flag; its docstring is the flag's help text.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

from megatron.core.transformer import TransformerConfig

from more_megatron.errors import MoREError
from more_megatron.model.curriculum import Curriculum

__all__ = ["MoREConfig", "flag", "own_field_names"]

_DEFAULT_STEPS = 4


@dataclass
class MoREConfig(TransformerConfig):
    """What a MoRE system adds to a Megatron model: which system it is, and how its recurrence runs."""

    more_variant: str = "recurrent_moe"
    """System to train: a name from the systems table of README.md."""

    recurrence_steps: int | None = None
    """Recurrence steps r: the number under fixed sampling, the mean otherwise. Default: the last entry of
    --recurrence-curriculum, the midpoint of --recurrence-min-steps and --recurrence-max-steps under uniform sampling,
    else 4."""

    recurrence_sampling: Literal["fixed", "uniform", "poisson-lognormal"] = "fixed"
    """How r is chosen in training: always the same; uniform between the minimum and the maximum, both included; or one
    plus a Poisson number with a log-normal rate, as Huginn does, cut off at the maximum."""

    recurrence_sampling_unit: Literal["step", "micro-batch"] = "step"
    """Whether r is drawn once for a training step or anew for each of its micro-batches."""

    recurrence_min_steps: int | None = None
    """Smallest r that is drawn. Default: 1."""

    recurrence_max_steps: int | None = None
    """Largest r that is drawn. Default: under uniform sampling as far above the mean as the minimum is below it, under
    poisson-lognormal four times the mean."""

    recurrence_backprop_steps: int | None = None
    """Number of last steps that carry gradient; the steps before them do not. Default: all."""

    recurrence_eval_steps: int | None = None
    """Recurrence steps in evaluation. Default: --recurrence-steps."""

    recurrence_curriculum: str | None = None
    """Mean r by iteration, as in 0:1,10000:2,20000:4. Default: --recurrence-steps throughout."""

    recurrence_state_std: float = 0.02
    """Standard deviation of the random initial state of a recurrence."""

    recurrence_ffn_hidden_size: int | None = None
    """Width of the gated MLP in a recurrent block. Default: twice the hidden size in experts that are recurrent blocks,
    four times in a block that experts share."""

    recurrence_residual_scale: float = 1.0
    """Factor on what each step of a recurrent MoE layer adds to the residual stream."""

    router_logit_ema: float = 0.0
    """Weight of the former logits in the routing of a recurrent MoE layer: l_t = beta l_{t-1} + (1 - beta) W s_t."""

    router_min_entropy: float = 0.0
    """Entropy in nats below which the routing distribution of a token is penalised. 0: no penalty."""

    router_min_entropy_coeff: float = 0.001
    """Coefficient of the entropy penalty."""

    projection_orthogonality_coeff: float = 0.0
    """Coefficient of the penalty on projections around a shared block that are not orthogonal."""

    projection_dropout: float = 0.0
    """Dropout on the output of the projections around a shared block."""

    seed: int = 1234
    """Seed of the run, Megatron's --seed: depth and initial states are drawn from it."""

    def __post_init__(self) -> None:
        """Check the recurrence fields.

        Raises:
            MoREError: If a field is out of range or contradicts another; the message names the flag.
        """
        super().__post_init__()
        for name in ("steps", "min_steps", "max_steps", "backprop_steps", "eval_steps", "ffn_hidden_size"):
            self._require(f"recurrence_{name}", at_least=1)
        for name in ("recurrence_state_std", "router_min_entropy", "router_min_entropy_coeff"):
            self._require(name, at_least=0)
        self._require("projection_orthogonality_coeff", at_least=0)
        for name in ("router_logit_ema", "projection_dropout"):
            self._require(name, at_least=0, below=1)
        self._check_range()

    @property
    def mean_steps(self) -> int:
        """Mean number of recurrence steps in training, in the end if there is a curriculum."""
        if self.recurrence_steps is not None:
            return self.recurrence_steps
        if self.curriculum is not None:
            return self.curriculum.last
        if self.recurrence_sampling == "uniform" and self.recurrence_max_steps is not None:
            return (self._lowest_step + self.recurrence_max_steps + 1) // 2
        return max(_DEFAULT_STEPS, self._lowest_step)

    @functools.cached_property
    def curriculum(self) -> Curriculum | None:
        """The curriculum of the mean, None if it stays the same."""
        return Curriculum(self.recurrence_curriculum) if self.recurrence_curriculum is not None else None

    @property
    def evaluation_steps(self) -> int:
        """Number of recurrence steps in evaluation."""
        return self.recurrence_eval_steps or self.mean_steps

    def step_range(self, mean: int) -> tuple[int, int]:
        """Return the smallest and the largest number of steps that are drawn.

        Args:
            mean: Mean number of steps where training stands.
        """
        if self.recurrence_sampling == "fixed":
            return mean, mean
        low = min(self._lowest_step, mean)
        default_high = 2 * mean - low if self.recurrence_sampling == "uniform" else 4 * mean
        high = self.recurrence_max_steps or default_high
        # A curriculum moves the range with the mean, up to the maximum.
        if self.recurrence_sampling == "uniform" and self.curriculum is not None:
            high = min(high, default_high)
        return low, max(high, low)

    @property
    def max_steps(self) -> int:
        """Largest number of recurrence steps that training can take."""
        means = self.curriculum.means if self.curriculum is not None else [self.mean_steps]
        return max(self.step_range(mean)[1] for mean in means)

    @property
    def _lowest_step(self) -> int:
        return self.recurrence_min_steps or 1

    def _require(self, name: str, at_least: float, below: float | None = None) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if value < at_least:
            raise MoREError(f"{flag(name)} {value} must be at least {at_least}")
        if below is not None and value >= below:
            raise MoREError(f"{flag(name)} {value} must be below {below}")

    def _check_range(self) -> None:
        low, high = self._lowest_step, self.recurrence_max_steps
        if high is not None and high < low:
            raise MoREError(
                f"--recurrence-max-steps {high} is below --recurrence-min-steps {low}: raise the one or lower the other"
            )
        if self.curriculum is not None and high is not None and max(self.curriculum.means) > high:
            raise MoREError(
                f"--recurrence-curriculum reaches a mean of {max(self.curriculum.means)} steps, above "
                f"--recurrence-max-steps {high}: raise the maximum or end the curriculum earlier"
            )
        if self.curriculum is not None or self.recurrence_sampling == "fixed":
            return
        if self.mean_steps < low or (high is not None and self.mean_steps > high):
            raise MoREError(
                f"--recurrence-steps {self.mean_steps} lies outside --recurrence-min-steps {low} to "
                f"--recurrence-max-steps {high}: choose a mean between them or leave it out"
            )


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def own_field_names() -> set[str]:
    """Return the names of the fields that `MoREConfig` adds to Megatron's configuration."""
    return {field.name for field in dataclasses.fields(MoREConfig)} - {
        field.name for field in dataclasses.fields(TransformerConfig)
    }
