"""From an experiment to its runs: the cost of each arm, the widths at which costs meet, the budget in steps.

The plan is a file: what has been decided once stays decided, for whoever makes the runs.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from more_megatron.errors import MoREError, last_line
from more_megatron.evaluation.command_lines import Flags, arguments_of
from more_megatron.evaluation.comparison.experiment import Arm, Experiment
from more_megatron.systems import get_system
from more_megatron.unfinished import write_whole

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig

__all__ = ["Plan", "PlannedArm", "Run", "plan"]


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
    models: dict[str, _Model] = {}
    planned: dict[str, PlannedArm] = {}
    for arm in experiment.arms:
        try:
            models[arm.name] = _Model(experiment.flags_of(arm, point))
        except (MoREError, AssertionError, ValueError, KeyError) as error:
            refusal = " ".join(str(error).split()) or last_line(error)
            planned[arm.name] = PlannedArm(arm.name, number, {}, refusal)
    aims = [models[experiment.target]] if experiment.target in models else list(models.values())
    goal = {
        "flops": max((model.flops for model in aims), default=0.0),
        "parameters": max((model.cost.parameters for model in aims), default=0),
    }
    for arm in experiment.arms:
        if arm.name in models:
            try:
                planned[arm.name] = _matched(experiment, arm, number, models[arm.name], goal)
            except MoREError as error:
                planned[arm.name] = PlannedArm(arm.name, number, {}, str(error))
    return [planned[arm.name] for arm in experiment.arms]


class _Model:
    """A model that is described by flags and not built.

    Raises:
        MoREError: If the flags are refused.
    """

    def __init__(self, flags: Flags) -> None:
        from more_megatron.evaluation.runs import configure
        from more_megatron.model.depth import DepthSampler

        self.flags = flags
        self.args, config = configure(shlex.join(arguments_of(flags)))
        self._depth = DepthSampler(config.transformer).expected()
        self._take(config)

    def _take(self, config: GPTModelConfig) -> None:
        from more_megatron.evaluation.comparison.matching import system_cost

        self._config, self.cost = config, system_cost(config, self.args.seq_length)
        self.flops = self.cost.training_flops(self._depth.no_grad_steps, self._depth.grad_steps)

    def match(self, kind: str, goal: dict[str, float]) -> None:
        """Widen or narrow it."""
        from more_megatron.evaluation.comparison.matching import match, widths

        if kind != "flags":
            wanted = {name: value for name, value in goal.items() if kind in (name, "both")}
            self._take(match(self._config, self._depth, self.args.seq_length, **wanted))
        config = self._config.transformer
        found = {name.replace("_", "-"): getattr(config, name) for name in widths(config)}
        self.flags = self.flags | {name: width for name, width in found.items() if width is not None}
        if config.num_moe_experts is not None and config.moe_shared_expert_intermediate_size is None:
            # Left out, there would be one.
            self.flags["moe-shared-expert-intermediate-size"] = 0


def _matched(experiment: Experiment, arm: Arm, number: int, model: _Model, goal: dict[str, float]) -> PlannedArm:
    if experiment.tokens is None and experiment.total_flops is None and "train-iters" not in model.flags:
        raise MoREError("nothing says how long to train: give tokens, total_flops, or train-iters among the flags")
    model.match(experiment.match, goal)
    step_tokens = model.args.global_batch_size * model.args.seq_length
    tokens = experiment.tokens if experiment.total_flops is None else experiment.total_flops / model.flops
    steps = int(model.flags["train-iters"]) if tokens is None else max(round(tokens / step_tokens), 1)
    return PlannedArm(
        name=arm.name,
        point=number,
        flags=model.flags | {"train-iters": steps},
        parameters=model.cost.parameters,
        active_parameters=model.cost.active_parameters,
        flops=model.flops,
        ratios={"flops": model.flops / goal["flops"], "parameters": model.cost.parameters / goal["parameters"]},
        tokens=steps * step_tokens,
        recurrent=get_system(arm.system).recurrent and not arm.reference,
    )
