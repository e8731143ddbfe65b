"""What is compared: an experiment file, and the flags of each of its runs and of what evaluates them.

Nothing here needs Megatron: costs and widths are found in `planning`.
"""

import dataclasses
import itertools
import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from more_megatron.errors import MoREError
from more_megatron.evaluation.command_lines import Flags, read_by
from more_megatron.flags import MoREFlags, check_ranges
from more_megatron.platform.packages import has_package
from more_megatron.systems import flag_names, get_system, systems
from more_megatron.yaml_tables import read_table

MATCHES = {
    "flops": "training FLOPs a token at the mean depth",
    "parameters": "parameters",
    "both": "training FLOPs a token at the mean depth, and parameters where widths allow",
    "flags": "nothing but the flags",
}
"""What arms may have in common, in words."""

_OF_EXPERTS = re.compile(r"moe-|num-experts$")
# Section 4.2 of the research guide.
_FINE_TUNING = {"lr": 5e-5, "min-lr": 0, "weight-decay": 0.01}


@dataclass(frozen=True)
class Arm:
    """One side of the comparison."""

    name: str  # in the report
    system: str
    flags: Flags = field(default_factory=dict)  # what it alone is given; they stand over what all are given
    reference: bool = False  # whether it is the dense model of as many layers as the recurrences run

    @property
    def has_experts(self) -> bool:
        """Whether its layers have experts: by default, or because it is given some."""
        return bool(self.flags.get("num-experts", get_system(self.system).defaults.get("num_experts", True)))


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says. Each attribute is a key of it, as docs/comparison.md lists them.

    What depends on other keys is filled in: the `deep` arm among the arms, the `baseline`, and the flags of a second
    training, which come of `tasks`.
    """

    title: str
    arms: tuple[Arm, ...]
    match: str = "flops"
    target: str | None = None
    seeds: tuple[int, ...] = (1, 2)
    tokens: float | None = None
    total_flops: float | None = None
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    baseline: str | None = None
    flags: Flags = field(default_factory=dict)
    deep: str | None = None
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)
    problems: int = 200
    finetune: Flags | None = None

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Self:
        """Return the experiment of a YAML file; `changes` that are not None stand over its keys.

        Raises:
            MoREError: If the file cannot be read, or says what cannot be.
        """
        content = {"title": path.stem, **_content(path)}
        try:
            return cls.of(content | {name: value for name, value in changes.items() if value is not None})
        except MoREError as error:
            raise MoREError(f"{path}: {error}") from None

    @classmethod
    def of(cls, keys: Mapping[str, Any]) -> Self:
        """Return the experiment of the keys of a file.

        Raises:
            MoREError: If they say what cannot be.
        """
        known = {key.name for key in dataclasses.fields(cls)}
        if unknown := sorted(set(keys) - known):
            raise MoREError(f"there is no key {unknown[0]}: choose among {', '.join(sorted(known))}")
        values = dict(keys)
        for name in {"seeds", "depths"} & set(keys):
            if not isinstance(keys[name], list | tuple) or not all(type(number) is int for number in keys[name]):
                raise MoREError(f"{name} must be a list of whole numbers, not {keys[name]!r}")
            values[name] = tuple(keys[name])
        deep = [] if keys.get("deep") is None else [_deep_arm(str(keys["deep"]))]
        experiment = cls(**values | {"arms": (*_arms(keys.get("arms")), *deep)})
        experiment._check()
        baseline, finetune = experiment.baseline, experiment.finetune
        if baseline is None:
            own = (arm.name for arm in experiment.arms if get_system(arm.system).is_megatrons)
            baseline = next(own, experiment.arms[0].name)
        if experiment.tasks and not experiment.flags.get("loss-on-answers"):
            finetune = _fine_tuning(experiment.tasks) | (finetune or {})
        return dataclasses.replace(experiment, baseline=baseline, finetune=finetune)

    def _check(self) -> None:
        names = [arm.name for arm in self.arms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise MoREError(f"two arms are named {twice[0]}: give each a name of its own")
        for key, value in (("baseline", self.baseline), ("target", self.target)):
            if value is not None and value not in names:
                raise MoREError(f"{key} {value} is none of the arms: {', '.join(names)}")
        if self.match not in MATCHES:
            raise MoREError(f"match {self.match} does not exist: choose one of {', '.join(MATCHES)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise MoREError(f"seeds {list(self.seeds)} must be one or more, each once")
        for key, kind in (("tokens", int | float), ("total_flops", int | float), ("problems", int)):
            number = getattr(self, key)
            if number is not None and not (isinstance(number, kind) and 0 < number < math.inf):
                raise MoREError(f"{key} {number!r} must be a number above 0")
        if self.tokens is not None and self.total_flops is not None:
            raise MoREError("tokens and total_flops are two budgets: give one of them")
        check_ranges(self, {"seeds": "[1, 4000000000]", "depths": "[1, 10000]"})
        for key, table in (("flags", self.flags), ("finetune", {} if self.finetune is None else self.finetune)):
            if not isinstance(table, dict):
                raise MoREError(f"{key} must be a table, not {table!r}")
        swept = self.sweep.values() if isinstance(self.sweep, dict) else [None]
        if not all(isinstance(values, list) and values for values in swept):
            raise MoREError(f"sweep must be a table of lists of values, not {self.sweep!r}")
        if not isinstance(self.tasks, dict) or not all(isinstance(prefix, str) for prefix in self.tasks.values()):
            raise MoREError(f"tasks must be a table of prefixes of tools/prepare_tasks.py, not {self.tasks!r}")

    def only(self, names: list[str] | None) -> Self:
        """Return the experiment with these arms; None: as it is.

        Raises:
            MoREError: If an arm does not exist.
        """
        if names is None:
            return self
        if missing := set(names) - {arm.name for arm in self.arms}:
            raise MoREError(f"--arms {sorted(missing)[0]} is none of {', '.join(arm.name for arm in self.arms)}")
        arms = tuple(arm for arm in self.arms if arm.name in names)
        return dataclasses.replace(self, arms=arms, baseline=self.baseline if self.baseline in names else arms[0].name)

    def points(self) -> Iterator[Flags]:
        """Yield the flags of each point of the sweep; none where nothing is swept."""
        for values in itertools.product(*self.sweep.values()):
            yield dict(zip(self.sweep, values, strict=True))

    def flags_of(self, arm: Arm, point: Flags) -> Flags:
        """Return the flags of an arm but for widths, seed and output folders."""
        shared = self.flags | point
        flags = read_by(arm.system, shared)
        if arm.reference:
            flags = {name: value for name, value in flags.items() if name.replace("-", "_") not in flag_names()}
            flags["num-layers"] *= mean_steps(shared)
        else:
            flags |= _dashed(get_system(arm.system).comparable)
            flags |= read_by(arm.system, {"recurrence-eval-depths": list(self.depths)})
        if not arm.has_experts:
            flags = {name: value for name, value in flags.items() if not _OF_EXPERTS.match(name)}
        flags = {"more-variant": arm.system} | flags | arm.flags
        if "seed" in flags:
            raise MoREError("--seed has no effect beside seeds: leave it out")
        if self.tokens is None and self.total_flops is None and flags.get("train-iters") is None:
            raise MoREError("nothing says how long to train: give tokens, total_flops, or train-iters among the flags")
        return {name: value for name, value in flags.items() if value is not None}


def _dashed(flags: Mapping[str, Any]) -> Flags:
    return {name.replace("_", "-"): value for name, value in flags.items()}


def mean_steps(flags: Flags) -> int:
    """Return the mean recurrence steps of a training run."""
    return MoREFlags.of(Namespace(**{name.replace("-", "_"): value for name, value in flags.items()})).mean_steps


def _content(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the keys of an experiment file and of the one that it extends."""
    if path.resolve() in extending:
        raise MoREError(f"the experiment file {path} extends itself: name another one")
    content = read_table(path, "the experiment file", "see docs/comparison.md", os.path.expandvars)
    if (other := content.pop("extends", None)) is None:
        return content
    base = _content(path.parent / str(other), (*extending, path.resolve()))
    flags = [keys.get("flags") or {} for keys in (base, content)]
    # What is no table is refused where all keys are checked.
    wrong = [value for value in flags if not isinstance(value, dict)]
    return base | content | {"flags": wrong[0] if wrong else flags[0] | flags[1]}


def _arms(given: Any) -> Iterator[Arm]:
    """Yield the arms of a table or a list of names; none: all systems.

    Raises:
        MoREError: If an arm is no table, or names a system that does not exist.
    """
    table = dict.fromkeys(given) if isinstance(given, list | tuple) else given or dict.fromkeys(systems())
    if not isinstance(table, dict):
        raise MoREError(f"arms must be a table or a list of names, not {given!r}")
    for name, flags in table.items():
        if not isinstance(flags, dict | None):
            raise MoREError(f"arm {name} must be a table of flags, not {flags!r}")
        own = dict(flags or {})
        arm = Arm(str(name), own.pop("system", str(name)), own)
        get_system(arm.system)
        yield arm


def _deep_arm(name: str) -> Arm:
    system, plain = next((name, system.plain) for name, system in systems().items() if system.plain is not None)
    return Arm(name, system, _dashed(plain), reference=True)


def _fine_tuning(tasks: Mapping[str, str]) -> Flags:
    """Return the flags of a training on tasks, given their prefixes; None: a flag that is left out."""
    train, valid = ([f"{prefix}_{split}_document" for prefix in tasks.values()] for split in ("train", "test"))
    data = {"data-path": None, "split": None, "train-data-path": train, "valid-data-path": valid}
    return {"loss-on-answers": True, **data, **_FINE_TUNING}


def evaluation_flags(tasks: Mapping[str, str], problems: int, depths: list[int]) -> Flags:
    """Return the flags of `tools/evaluate.py` that answer so many problems of each file of tasks, given their prefixes.

    These are `P_test.jsonl` and, where there are harder ones, `P_beyond.jsonl`.

    Raises:
        MoREError: If the problems of a task are not there, or what evaluates them is not installed.
    """
    if not has_package("lm_eval"):
        raise MoREError("tasks are answered with lm-evaluation-harness: install the extra `eval`")
    if missing := [prefix for prefix in tasks.values() if not Path(f"{prefix}_test.jsonl").exists()]:
        raise MoREError(f"there is no {missing[0]}_test.jsonl: tasks are TASK=PREFIX, as tools/prepare_tasks.py writes")
    files = [(task, Path(f"{prefix}_{split}.jsonl")) for task, prefix in tasks.items() for split in ("test", "beyond")]
    data = [f"{task}={path}" for task, path in files if path.exists()]
    return {"tasks": list(tasks), "data": data, "limit": problems, "num-steps": depths}
