"""From an experiment to its runs: the cost of each arm, the widths at which costs meet, the budget in steps.

The plan is a file: what has been decided once stays decided, for whoever makes the runs.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from more_megatron.errors import MoREError, last_line
from more_megatron.evaluation.comparison.experiment import Arm, Experiment, Flags, command_line
from more_megatron.unfinished import unfinished_file

__all__ = ["Plan", "PlannedArm", "Run", "plan"]


@dataclass(frozen=True)
class PlannedArm:
    """An arm at one point of the sweep.

    Attributes:
        name: Name of the arm.
        point: Number of the point of the sweep.
        flags: All flags of a run, without seed and folders. Empty if the arm was refused.
        refusal: Why it cannot run; None if it can.
        parameters: Parameters that are stored.
        active_parameters: Those that a token meets.
        flops: Operations a token of a training step at the mean depth.
        ratios: Cost over what was to be met, by `flops` and `parameters`; of what was not matched as well.
        tokens: Training tokens of a run.
        recurrent: Whether its depth can be chosen in evaluation.
    """

    name: str
    point: int
    flags: Flags
    refusal: str | None = None
    parameters: int = 0
    active_parameters: int = 0
    flops: float = 0.0
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    recurrent: bool = False


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Its folder in `runs/`.
        arm: What is trained.
        seed: Seed.
    """

    name: str
    arm: PlannedArm
    seed: int


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment.

    Attributes:
        experiment: What was asked for, as `dataclasses.asdict` gives it.
        points: Flags of each point of the sweep.
        arms: Each arm at each point.
    """

    experiment: dict[str, Any]
    points: tuple[Flags, ...]
    arms: tuple[PlannedArm, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the plan of a file.

        Raises:
            MoREError: If there is none, or it is damaged.
        """
        try:
            content = json.loads(path.read_text())
            arms = tuple(PlannedArm(**arm) for arm in content["arms"])
            return cls(content["experiment"], tuple(content["points"]), arms)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MoREError(f"there is no plan in {path}: make one with --plan ({last_line(error)})") from error

    def save(self, path: Path) -> None:
        """Write the plan to a file."""
        with unfinished_file(path) as unfinished:
            unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @property
    def runs(self) -> list[Run]:
        """The runs, one seed after the other, so that a comparison that is stopped has compared something."""
        return [
            Run(f"{arm.name}-{arm.point}-seed{seed}" if len(self.points) > 1 else f"{arm.name}-seed{seed}", arm, seed)
            for seed in self.experiment["seeds"]
            for arm in self.arms
        ]


def plan(experiment: Experiment) -> Plan:
    """Return the runs of an experiment. Imports Megatron, and sets its globals again and again."""
    points = list(experiment.points())
    arms = [arm for number, point in enumerate(points) for arm in _at_point(experiment, number, point)]
    # As a file gives it back.
    content = json.loads(json.dumps(dataclasses.asdict(experiment)))
    return Plan(content, tuple(points), tuple(arms))


def _at_point(experiment: Experiment, number: int, point: Flags) -> list[PlannedArm]:
    """Return the arms at one point of the sweep, as wide as equal cost wants them."""
    built: dict[str, Any] = {}
    refusals: dict[str, str] = {}
    for arm in experiment.arms:
        try:
            built[arm.name] = _Built(experiment.flags_of(arm, point))
        except (MoREError, AssertionError, ValueError, KeyError) as error:
            refusals[arm.name] = " ".join(str(error).split()) or last_line(error)
    aims = [experiment.target] if experiment.target in built else list(built)
    goal = {
        "flops": max((built[name].flops for name in aims), default=0.0),
        "parameters": max((built[name].cost.parameters for name in aims), default=0),
    }
    planned = []
    for arm in experiment.arms:
        if arm.name not in refusals:
            try:
                planned.append(_matched(experiment, arm, number, built[arm.name], goal))
                continue
            except MoREError as error:
                refusals[arm.name] = str(error)
        planned.append(PlannedArm(arm.name, number, {}, refusal=refusals[arm.name]))
    return planned


class _Built:
    """A model that is described and not built.

    Args:
        flags: Flags that describe it.

    Raises:
        MoREError: If the flags are refused.
    """

    def __init__(self, flags: Flags) -> None:
        from more_megatron.evaluation.runs import configure
        from more_megatron.model.depth import DepthSampler

        self.flags = flags
        self.args, self.model = configure(shlex.join(command_line(flags)))
        self.depth = DepthSampler(self.model.transformer).expected()
        self._weigh()

    def _weigh(self) -> None:
        from more_megatron.evaluation.comparison.matching import system_cost

        self.cost = system_cost(self.model, self.args.seq_length)
        self.flops = self.cost.training_flops(self.depth.no_grad_steps, self.depth.grad_steps)

    def match(self, kind: str, goal: dict[str, float]) -> None:
        """Widen or narrow it."""
        from more_megatron.evaluation.comparison.matching import Goal, match, widths

        if kind != "flags":
            wanted = Goal(**{name: value for name, value in goal.items() if kind in (name, "both")})
            self.model = match(self.model, wanted, self.depth, self.args.seq_length)
            self._weigh()
        config = self.model.transformer
        found = {name.replace("_", "-"): getattr(config, name) for name in widths(config)}
        self.flags = self.flags | {name: width for name, width in found.items() if width is not None}
        if config.num_moe_experts is not None and config.moe_shared_expert_intermediate_size is None:
            # Left out, there would be one.
            self.flags["moe-shared-expert-intermediate-size"] = 0


def _matched(experiment: Experiment, arm: Arm, number: int, built: _Built, goal: dict[str, float]) -> PlannedArm:
    from more_megatron.systems import get_system

    built.match(experiment.match, goal)
    step_tokens = built.args.global_batch_size * built.args.seq_length
    tokens = experiment.tokens
    if experiment.total_flops is not None:
        tokens = experiment.total_flops / built.flops
    steps = int(built.flags["train-iters"]) if tokens is None else max(round(tokens / step_tokens), 1)
    return PlannedArm(
        name=arm.name,
        point=number,
        flags=built.flags | {"train-iters": steps},
        parameters=built.cost.parameters,
        active_parameters=built.cost.active_parameters,
        flops=built.flops,
        ratios={"flops": built.flops / goal["flops"], "parameters": built.cost.parameters / goal["parameters"]},
        tokens=steps * step_tokens,
        recurrent=get_system(arm.system).recurrent and not arm.reference,
    )
