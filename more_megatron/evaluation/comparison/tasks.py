"""Problems with answers in a comparison: what fine-tunes on them, what evaluates, and what that found.

A task is a prefix P of `tools/prepare_tasks.py`: `P_train_document` and `P_test_document` are trained and validated
on, `P_test.jsonl` and, where there are harder ones, `P_beyond.jsonl` are answered by `tools/evaluate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError
from more_megatron.platform.packages import has_package

__all__ = ["Answers", "ByDifficulty", "evaluation", "fine_tuning", "read_evaluation"]

Answers = dict[int, dict[str, float]]
"""Figures of answers by recurrence steps (0: none to choose) and name."""
ByDifficulty = dict[int, dict[str, dict[int, float]]]
"""Exact match by recurrence steps (0: none to choose), task and difficulty."""

# Section 4.2 of the research guide.
_RECIPE = {"lr": 5e-5, "min-lr": 0, "weight-decay": 0.01}


def fine_tuning(tasks: Mapping[str, str]) -> dict[str, Any]:
    """Return the flags of a second training on tasks, given their prefixes; None: a flag that is left out."""
    train, valid = ([f"{prefix}_{split}_document" for prefix in tasks.values()] for split in ("train", "test"))
    data = {"data-path": None, "split": None, "train-data-path": train, "valid-data-path": valid}
    return {"loss-on-answers": True, **data, **_RECIPE}


def evaluation(tasks: Mapping[str, str], problems: int, depths: list[int]) -> dict[str, Any]:
    """Return the flags of `tools/evaluate.py` that answer so many problems of each file of tasks, given their prefixes.

    Raises:
        MoREError: If the problems of a task are not there, or what evaluates them is not installed.
    """
    if not has_package("lm_eval"):
        raise MoREError("tasks are answered with lm-evaluation-harness: install the extra `eval`")
    if missing := [prefix for prefix in tasks.values() if not Path(f"{prefix}_test.jsonl").exists()]:
        raise MoREError(f"there is no {missing[0]}_test.jsonl: tasks are TASK=PREFIX, as tools/prepare_tasks.py writes")
    files = [(task, Path(f"{prefix}_{split}.jsonl")) for task, prefix in tasks.items() for split in ("test", "beyond")]
    return {
        "tasks": list(tasks),
        "data": [f"{task}={path}" for task, path in files if path.exists()],
        "limit": problems,
        "num-steps": depths,
    }


def read_evaluation(path: Path) -> tuple[Answers, ByDifficulty]:
    """Return what an evaluation found, given its results.json.

    That is exact match of answers that were generated, as a whole and by difficulty.
    """
    answers: Answers = {}
    by_difficulty: ByDifficulty = {}
    for record in json.loads(path.read_text())["results"]:
        depth = record["num_steps"] or 0
        for name, measures in record["measures"].items():
            answers.setdefault(depth, {})[f"{name} exact match"] = measures["exact_match"]
        for task, found in record.get("by_difficulty", {}).items():
            exact = {int(difficulty): measures["exact_match"] for difficulty, measures in found.items()}
            by_difficulty.setdefault(depth, {}).setdefault(task, {}).update(exact)
    return answers, by_difficulty
