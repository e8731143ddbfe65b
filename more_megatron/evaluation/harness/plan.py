"""Which tasks are evaluated on which data."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from more_megatron.data.hub import is_reachable
from more_megatron.data.sources import sha256_of
from more_megatron.errors import MoREError, last_line

_TASK_FOLDER = Path(__file__).parent / "tasks"
# Tasks that this package ships; they read files.
_OURS = tuple(sorted(path.stem for path in _TASK_FOLDER.glob("[!_]*.yaml")))
# Those of them that the harness fetches where no file is given.
_ON_THE_HUB = ("hellaswag", "wikitext")


@dataclass(frozen=True)
class PlannedTask:
    """A task on its data."""

    name: str  # what it is called in results: as the task, or as the file if the task has several
    task: str  # its name among the harness's
    path: Path | None  # file of its data; None for those the harness fetches from the hub

    @functools.cached_property
    def data_digest(self) -> str | None:
        """SHA-256 of the data; None for the harness's own."""
        return None if self.path is None else sha256_of(self.path)


def plan_tasks(tasks: Sequence[str], data: Sequence[str]) -> list[PlannedTask]:
    """Return what is to be evaluated, given tasks of ours or the harness's, and `TASK=FILE` for ours.

    A task may have several files, which are evaluated each by itself.

    Raises:
        MoREError: If a file is missing or belongs to no task, or a task needs one.
    """
    files: dict[str, list[Path]] = {task: [] for task in dict.fromkeys(tasks)}
    for entry in data:
        task, _, name = entry.partition("=")
        if task not in files or task not in _OURS or not name:
            wanted = ", ".join(name for name in files if name in _OURS) or "none that is asked for"
            raise MoREError(f"--data {entry} is not TASK=FILE with a task of --tasks that reads one ({wanted})")
        if not Path(name).is_file():
            raise MoREError(f"--data {entry}: there is no such file; tools/prepare_tasks.py writes those of tasks")
        if Path(name).stem in (path.stem for path in files[task]):
            raise MoREError(f"--data {entry}: results are named after files, and two are {Path(name).stem}: rename one")
        files[task].append(Path(name))
    for task, paths in files.items():
        if task in _OURS and task not in _ON_THE_HUB and not paths:
            raise MoREError(f"task {task} needs its problems: --data {task}=FILE, which tools/prepare_tasks.py writes")
        if not paths:
            _check_hub(task)
    ours = ((task, path, len(found) == 1) for task, found in files.items() for path in found)
    planned = [PlannedTask(task if is_alone else path.stem, task, path) for task, path, is_alone in ours]
    return planned + [PlannedTask(task, task, None) for task, found in files.items() if not found]


def _check_hub(task: str) -> None:
    """Check that the hub answers, unless the user says that everything is in the cache."""
    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0") and not is_reachable():
        remedy = f"name a file with --data {task}=FILE" if task in _OURS else "choose tasks with files of their own"
        raise MoREError(
            f"task {task} needs the Hugging Face hub, and there is no network: {remedy}, or set HF_HUB_OFFLINE=1 if "
            "its data are in the cache"
        )


@functools.lru_cache(maxsize=1)  # A task is evaluated at one depth after the other.
def load_task(planned: PlannedTask, detokenization: str) -> Any:
    """Return a task with its documents, detokenized as named, as the harness wants to be given it.

    Raises:
        MoREError: If there is no such task, or its data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    try:
        if planned.path is None:
            return _harness_tasks().load([planned.task])
        metadata: dict[str, Any] = {"path": str(planned.path), "detokenization": detokenization}
        return TaskManager(include_path=_TASK_FOLDER, include_defaults=False, metadata=metadata).load([planned.task])
    except MoREError:
        raise
    except KeyError as error:
        raise MoREError(
            f"there is no task {planned.task}: choose among {', '.join(_OURS)} and those that `lm_eval ls tasks` lists"
        ) from error
    except Exception as error:  # Whatever the hub and its libraries have to say.
        raise MoREError(f"the data of task {planned.task} cannot be had: {last_line(error)}") from error


@functools.cache
def _harness_tasks() -> Any:
    """Return the harness's own tasks; listing them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
