"""The flags of the MoRE group that several systems read: which system, and how its recurrence runs.

Each field is a command-line flag; its docstring is the flag's help text. Nothing here needs Megatron or PyTorch, so
that tools read the recurrence of a checkpoint without them.
"""

import dataclasses
import functools
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, Self

from more_megatron.curriculum import Curriculum
from more_megatron.errors import MoREError

_DEFAULT_STEPS = 4
# Above them it is a slip of the hand: nothing runs so many steps, and no block is so wide.
_STEPS = "[1, 10000]"
_RANGES = {
    **{f"recurrence_{name}": _STEPS for name in ("steps", "min_steps", "max_steps", "backprop_steps", "eval_steps")},
    "recurrence_eval_depths": _STEPS,
    "recurrence_prelude_layers": "[0, inf)",
    "recurrence_coda_layers": "[0, inf)",
    "recurrence_group_layers": "[1, inf)",
    "recurrence_ffn_hidden_size": "[1, 1000000]",
    "recurrence_state_std": "[0, inf)",
    "recurrence_residual_scale": "(-inf, inf)",
    "router_logit_ema": "[0, 1)",
    "router_min_entropy": "[0, inf)",
    "router_min_entropy_coeff": "[0, inf)",
}


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def layers_with_experts(frequency: int | Sequence[int], num_layers: int) -> list[bool]:
    """Return which layers have experts, as Megatron reads `--moe-layer-freq`: each n-th from the first, or a list."""
    if isinstance(frequency, int):
        return [index % frequency == 0 for index in range(num_layers)]
    return [bool(has_experts) for has_experts in frequency]


def check_ranges(fields: object, ranges: Mapping[str, str]) -> None:
    """Check numbers, and lists of numbers, against intervals; none may be infinite, or no number.

    Args:
        fields: What has them, by the name of their flag; what is no number is left.
        ranges: Intervals by name, as in `[0, 1)`.

    Raises:
        MoREError: If one lies outside; the message names its flag.
    """
    for name, interval in ranges.items():
        low, high = (float(bound) for bound in interval[1:-1].split(", "))
        value = getattr(fields, name, None)
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            is_above = number >= low if interval[0] == "[" else number > low
            is_below = number <= high if interval[-1] == "]" else number < high
            is_finite = -math.inf < number < math.inf
            if not (is_above and is_below and is_finite):
                words = [] if is_finite else ["finite"]
                words += [f"{'at least' if interval[0] == '[' else 'above'} {low:.0f}"] if low > -math.inf else []
                words += [f"{'at most' if interval[-1] == ']' else 'below'} {high:.0f}"] if high < math.inf else []
                kind = "g" if isinstance(number, float) else "d"
                raise MoREError(f"{flag(name)} {number:{kind}} must be {' and '.join(words)}")


@dataclass
class MoREFlags:
    """What a MoRE system adds to a Megatron model: which system it is, and how its recurrence runs."""

    more_variant: str = ""
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

    recurrence_eval_depths: list[int] | None = None
    """Recurrence steps at which each evaluation is done besides, on the same samples: the losses are logged as
    val_loss_rR, the answers to problems by task at each R."""

    recurrence_curriculum: str | None = None
    """Mean r by iteration, as in 0:1,10000:2,20000:4. Default: --recurrence-steps throughout."""

    recurrence_state_std: float = 0.02
    """Standard deviation of the random initial state of a recurrence."""

    recurrence_ffn_hidden_size: int | None = None
    """Width of the gated MLP in a recurrent block. Default: twice the hidden size in experts that are recurrent blocks,
    four times in a block that experts share."""

    recurrence_prelude_layers: int | None = None
    """Layers in front of those that are repeated, run once. Default: by system."""

    recurrence_coda_layers: int | None = None
    """Layers behind those that are repeated, run once. Default: by system."""

    recurrence_group_layers: int | None = None
    """Layers in a group that is repeated before the next one begins. Default: all that are repeated are one group."""

    recurrence_injection: Literal["linear", "add", "none"] | None = None
    """How the input of a repeated group enters every pass: through a matrix beside the state, added to the state, or
    not at all. Default: by system."""

    recurrence_residual_scale: float = 1.0
    """Factor on what each step of a recurrent MoE layer adds to the residual stream."""

    router_logit_ema: float = 0.0
    """Weight of the former logits in the routing of a recurrent MoE layer: l_t = beta l_{t-1} + (1 - beta) W s_t."""

    router_min_entropy: float = 0.0
    """Entropy in nats below which the routing distribution of a token is penalised. 0: no penalty."""

    router_min_entropy_coeff: float = 0.001
    """Coefficient of the entropy penalty."""

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """Return the flags among a run's arguments; those that an older run did not know have their defaults."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            MoREError: If a field is out of range or contradicts another; the message names the flag.
        """
        check_ranges(self, _RANGES)
        if self.curriculum is not None:
            check_ranges(Namespace(recurrence_curriculum=self.curriculum.values), {"recurrence_curriculum": _STEPS})
        self._check_range()

    def without_effect(self, given: Set[str]) -> Iterator[str]:
        """Yield those of the given fields that these settings never read, with the reason."""
        fixed = "--recurrence-sampling is fixed: give uniform or poisson-lognormal"
        shallow = f"it is above the {self.max_steps} steps of the deepest training step: lower it"
        for name, is_read, reason in (
            ("recurrence_min_steps", self.recurrence_sampling != "fixed", fixed),
            ("recurrence_max_steps", self.recurrence_sampling != "fixed", fixed),
            ("recurrence_sampling_unit", self.recurrence_sampling != "fixed", fixed),
            ("recurrence_backprop_steps", (self.recurrence_backprop_steps or 1) <= self.max_steps, shallow),
            ("router_min_entropy_coeff", self.router_min_entropy > 0.0, "--router-min-entropy is 0: raise it"),
        ):
            if name in given and not is_read:
                yield f"{flag(name)} has no effect while {reason}, or leave the flag out"

    @property
    def mean_steps(self) -> int:
        """Mean number of recurrence steps in training, in the end if there is a curriculum."""
        if self.recurrence_steps is not None:
            return self.recurrence_steps
        if self.curriculum is not None:
            return self.curriculum.values[-1]
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

    @property
    def deepest_evaluation(self) -> int:
        """Largest number of recurrence steps that an evaluation takes."""
        return max(self.evaluation_steps, *(self.recurrence_eval_depths or [1]))

    def step_range(self, mean: int) -> tuple[int, int]:
        """Return the smallest and the largest number of steps that are drawn where training stands at a mean."""
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
        means = self.curriculum.values if self.curriculum is not None else [self.mean_steps]
        return max(self.step_range(mean)[1] for mean in means)

    @property
    def _lowest_step(self) -> int:
        return self.recurrence_min_steps or 1

    def _check_range(self) -> None:
        low, high = self._lowest_step, self.recurrence_max_steps
        if high is not None and high < low:
            raise MoREError(
                f"--recurrence-max-steps {high} is below --recurrence-min-steps {low}: raise the one or lower the other"
            )
        if self.curriculum is not None and high is not None and max(self.curriculum.values) > high:
            raise MoREError(
                f"--recurrence-curriculum reaches a mean of {max(self.curriculum.values)} steps, above "
                f"--recurrence-max-steps {high}: raise the maximum or end the curriculum earlier"
            )
        if self.curriculum is not None or self.recurrence_sampling == "fixed":
            return
        if self.mean_steps < low or (high is not None and self.mean_steps > high):
            raise MoREError(
                f"--recurrence-steps {self.mean_steps} lies outside --recurrence-min-steps {low} to "
                f"--recurrence-max-steps {high}: choose a mean between them or leave it out"
            )
