"""From an experiment to its runs: the cost of each arm, the widths at which costs meet, the budget in steps.

The plan is a file: what has been decided once stays decided, for whoever makes the runs.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from more_megatron.errors import MoREError, last_line
from more_megatron.evaluation.command_lines import Flags, as_typed
from more_megatron.evaluation.comparison.experiment import Arm, Experiment
from more_megatron.systems import get_system
from more_megatron.unfinished import write_whole

if TYPE_CHECKING:
    from more_megatron.evaluation.matching import Described


@dataclass(frozen=True)
class PlannedArm:
    """An arm at one point of the sweep."""

    name: str
    point: int  # number of the point of the sweep
    flags: Flags  # all flags of a run, without seed and folders; empty if the arm was refused
    refusal: str | None = None  # why it cannot run; None if it can
    parameters: int = 0  # parameters that are stored
    active_parameters: int = 0  # those that a token meets
    flops: float = 0.0  # operations a token of a training step at the mean depth
    # Cost over what was to be met, by `flops` and `parameters`; of what was not matched as well
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    tokens: int = 0  # training tokens of a run
    recurrent: bool = False  # whether its depth can be chosen in evaluation


@dataclass(frozen=True)
class Run:
    """One training run of an arm."""

    name: str
    arm: PlannedArm
    seed: int

    @property
    def flags(self) -> Flags:
        """All flags but for folders."""
        return self.arm.flags | {"seed": self.seed}

    def folder(self, comparison: Path) -> Path:
        """Return its folder in that of the comparison."""
        return comparison / "runs" / self.name


@dataclass(frozen=True)
class Plan:
    """All runs of an experiment."""

    experiment: dict[str, Any]  # what was asked for, as `dataclasses.asdict` gives it
    points: tuple[Flags, ...]  # flags of each point of the sweep
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
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=1))

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
    from more_megatron.evaluation.matching import Described

    models: dict[str, Described] = {}
    planned: dict[str, PlannedArm] = {}
    flags: dict[str, Flags] = {}
    for arm in experiment.arms:
        try:
            flags[arm.name] = experiment.flags_of(arm, point)
            models[arm.name] = Described.by(as_typed(flags[arm.name]))
        except (MoREError, AssertionError, ValueError, KeyError) as error:
            refusal = " ".join(str(error).split()) or last_line(error)
            planned[arm.name] = PlannedArm(arm.name, number, {}, refusal)
    aims = [models[experiment.target]] if experiment.target in models else models.values()
    goals = {name: max((getattr(model, name) for model in aims), default=0.0) for name in ("flops", "parameters")}
    for arm in experiment.arms:
        if arm.name in models:
            try:
                planned[arm.name] = _matched(experiment, arm, number, flags[arm.name], models[arm.name], goals)
            except MoREError as error:
                planned[arm.name] = PlannedArm(arm.name, number, {}, str(error))
    return [planned[arm.name] for arm in experiment.arms]


def _matched(
    experiment: Experiment, arm: Arm, number: int, flags: Flags, model: Described, goals: dict[str, float]
) -> PlannedArm:
    if experiment.match != "flags":
        model = model.match(**{name: goal for name, goal in goals.items() if experiment.match in (name, "both")})
    config = model.config.transformer
    flags = flags | {name.replace("_", "-"): getattr(config, name) for name in model.widths}
    if config.num_moe_experts is not None and config.moe_shared_expert_intermediate_size is None:
        # Left out, there would be one.
        flags["moe-shared-expert-intermediate-size"] = 0
    step_tokens = model.args.global_batch_size * model.args.seq_length
    tokens = experiment.tokens if experiment.total_flops is None else experiment.total_flops / model.flops
    steps = int(flags["train-iters"]) if tokens is None else max(round(tokens / step_tokens), 1)
    return PlannedArm(
        name=arm.name,
        point=number,
        flags={name: value for name, value in flags.items() if value is not None} | {"train-iters": steps},
        parameters=model.parameters,
        active_parameters=model.cost.active_parameters,
        flops=model.flops,
        ratios={name: getattr(model, name) / goal for name, goal in goals.items()},
        tokens=steps * step_tokens,
        recurrent=get_system(arm.system).recurrent and not arm.reference,
    )
