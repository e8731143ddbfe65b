"""What is kept of the harness's results: its measures, those by token, and answers by task and difficulty."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from more_megatron.evaluation.harness.language_model import HarnessModel
from more_megatron.evaluation.harness.our_tasks import AnswerTask

__all__ = ["collect"]


def collect(name: str, tasks: dict[str, Any], found: dict[str, Any], model: HarnessModel) -> dict[str, Any]:
    """Return the measures of one task, or of each in a group of the harness's, which returned `found`.

    A task that is alone is called `name` in results. Tokens are counted as the model's.
    """
    alone = next(iter(tasks)) if len(tasks) == 1 else None
    if alone is not None and isinstance(tasks[alone], AnswerTask):
        return _answers(name, found["samples"][alone], model)
    entries = {}
    for entry, results in found["results"].items():
        measures = _plain(results)
        if entry in tasks and tasks[entry].OUTPUT_TYPE == "loglikelihood_rolling":
            measures |= _by_token(found["samples"][entry], model)
        entries[name if entry == alone else entry] = measures
    return {"measures": entries}


def _plain(results: dict[str, Any]) -> dict[str, float]:
    """Return a task's measures by name; the filter of an answer stands behind the name unless there is none."""
    plain = {}
    for key, value in results.items():
        measure, _, chosen = key.partition(",")
        if chosen and isinstance(value, int | float):
            plain[measure if chosen == "none" else f"{measure} ({chosen})"] = float(value)
    return {**plain, "count": float(results["sample_len"])} if "sample_len" in results else plain


def _by_token(samples: Sequence[dict[str, Any]], model: HarnessModel) -> dict[str, float]:
    """Return loss and perplexity of a token of texts, which the harness does not know."""
    tokens = sum(len(model.tok_encode(sample["arguments"][0][0])) for sample in samples)
    loss = -sum(sample["filtered_resps"][0] for sample in samples) / tokens
    return {"loss": loss, "token_perplexity": math.exp(min(loss, 700.0)), "tokens": float(tokens)}


def _answers(name: str, samples: Sequence[dict[str, Any]], model: HarnessModel) -> dict[str, Any]:
    """Return measures of all problems, of each task among them and of each difficulty."""
    rows: dict[str, dict[int, list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        problem = sample["doc"]
        measured = (sample["exact_match"], sample["token_exact_match"], sample["answer_loss"])
        row = (*measured, float(model.answer_tokens(problem)))
        rows[problem["task"]][problem["difficulty"]].append(row)
    by_task = {
        task: [row for more in rows[task].values() for row in more]
        for task in sorted(rows, key=lambda task: (len(task), task))
    }
    entries = {name: _mean([row for more in by_task.values() for row in more])}
    if len(by_task) > 1:
        entries |= {f"{name}/{task}": _mean(more) for task, more in by_task.items()}
    difficulties = {
        task: {str(difficulty): _mean(rows[task][difficulty]) for difficulty in sorted(rows[task])} for task in by_task
    }
    return {"measures": entries, "by_difficulty": difficulties}


def _mean(rows: Sequence[tuple[float, ...]]) -> dict[str, float]:
    exact, token_exact, loss, tokens = (sum(column) for column in zip(*rows, strict=True))
    count = len(rows)
    return {
        "exact_match": exact / count,
        "token_exact_match": token_exact / count,
        "loss": loss / tokens,
        "count": float(count),
    }
