"""A model on tasks at several depths, and what is kept of the harness's results; what is finished is not done again."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from more_megatron.errors import MoREError
from more_megatron.evaluation.exported_model import open_model
from more_megatron.evaluation.harness.plan import PlannedTask, load_task, plan_tasks
from more_megatron.evaluation.harness.report import write_report
from more_megatron.figures import spread
from more_megatron.flags import check_ranges
from more_megatron.platform.packages import has_package
from more_megatron.unfinished import write_whole

if TYPE_CHECKING:
    from more_megatron.evaluation.harness.language_model import HarnessModel


def evaluate(args: argparse.Namespace) -> list[str]:
    """Evaluate a model, write results, table and figures, and return the table, and what was written, in lines.

    The arguments are the flags of `tools/evaluate.py`.

    Raises:
        MoREError: If model, tasks or data are not as they must be, or the folder has results of other settings.
    """
    if not has_package("lm_eval"):
        raise MoREError("evaluation needs lm-evaluation-harness: install the extra `eval`")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.exit_threshold is not None and args.exit_criterion is None:
        raise MoREError("--exit-threshold needs --exit-criterion: name one")
    check_ranges(args, {"limit": "[1, inf)"})
    tasks = plan_tasks(args.tasks, args.data)
    with open_model(args) as exported:
        exits = {"criterion": args.exit_criterion, "exit_threshold": args.exit_threshold}
        depths = dict.fromkeys(args.num_steps or [exported.num_steps])
        options = {depth: exported.call_options(depth, **exits) for depth in depths}
        length = exported.length if args.seq_length is None else args.seq_length
        if not 1 <= length <= exported.length:
            raise MoREError(f"--seq-length {length} must be from 1 to {exported.length}, the positions of the model")
        settings = {
            "model": str(exported.source),
            "weights": exported.digest,
            "dtype": str(exported.model.dtype).removeprefix("torch."),
            "seq_length": length,
            "limit": args.limit,
            "detokenize": args.detokenize,
        }
        from more_megatron.evaluation.harness.language_model import HarnessModel

        model = HarnessModel(exported, args.batch_size, length)
        folder = args.output / "results"
        folder.mkdir(parents=True, exist_ok=True)
        records = [
            _result(model, planned, depth, call_options, settings, folder)
            for planned in tasks
            for depth, call_options in options.items()
        ]
    return write_report(records, settings, args.output)


def _result(
    model: HarnessModel,
    planned: PlannedTask,
    depth: int | None,
    options: dict[str, Any],
    settings: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Return the result of a task at a depth, from its file in the folder if it is there."""
    name = re.sub(r"[^\w-]", "_", planned.name)
    path = folder / (f"{name}.json" if depth is None else f"{name}_r{depth}.json")
    settings = settings | {"task": planned.task, "data": planned.data_digest, "options": options}
    if path.is_file():
        return _finished(path, settings)
    print(f"{planned.name}{'' if depth is None else f' at r = {depth}'}", file=sys.stderr, flush=True)
    start = time.monotonic()
    model.begin(options)
    record = {"name": planned.name, "num_steps": depth, **_measure(model, planned, settings)}
    record |= {"seconds": round(time.monotonic() - start, 1), "settings": settings}
    write_whole(path, json.dumps(record, indent=1) + "\n")
    return record


def _measure(model: HarnessModel, planned: PlannedTask, settings: dict[str, Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from more_megatron.evaluation.harness.our_tasks import AnswerTask

    loaded = load_task(planned, settings["detokenize"])
    name, task = next(iter(loaded["tasks"].items()))
    chosen, skipped, limit = None, 0, settings["limit"]
    if isinstance(task, AnswerTask):  # Such a one is alone.
        fitting = model.fit(task)
        skipped = len(task.eval_docs) - len(fitting)
        if not fitting:
            raise MoREError(f"no problem of {planned.path} fits into {model.max_length} tokens")
        # A file of several tasks has one after the other; a few problems are to be of all.
        chosen, limit = {name: spread(fitting, limit or len(fitting))}, None
    found = simple_evaluate(
        model=model,
        tasks=list((loaded["groups"] or loaded["tasks"]).values()),
        limit=limit,
        samples=chosen,
        bootstrap_iters=100,
        # Everything is loaded; the harness would list its own tasks again.
        task_manager=TaskManager(include_defaults=False),
    )
    if isinstance(task, AnswerTask):
        record = _answers(planned.name, found["samples"][name], model)
    else:
        record = {"measures": _measures(planned.name, loaded["tasks"], found, model)}
    if model.mean_steps is not None:
        next(iter(record["measures"].values()))["mean_steps"] = model.mean_steps
    return record | {"skipped": skipped}


def _finished(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a result that is there.

    Raises:
        MoREError: If it is damaged, or of other settings.
    """
    try:
        record = json.loads(path.read_text())
        kept = record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise MoREError(f"{path} is no result of this tool: remove it") from error
    for name, value in settings.items():
        # Weights may lie elsewhere than they did.
        if name != "model" and kept.get(name) != value:
            raise MoREError(
                f"{path} was made with {name} {kept.get(name)}, and this run has {value}: name another --output, or "
                "remove it"
            )
    return record


def _measures(name: str, tasks: dict[str, Any], found: dict[str, Any], model: HarnessModel) -> dict[str, Any]:
    """Return the measures of a task of the harness's, or of each in a group; one that is alone is called `name`."""
    entries = {}
    for entry, results in found["results"].items():
        measures = _plain(results)
        if entry in tasks and tasks[entry].OUTPUT_TYPE == "loglikelihood_rolling":
            measures |= _by_token(found["samples"][entry], model)
        entries[name if len(tasks) == 1 and entry in tasks else entry] = measures
    return entries


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
        rows[problem["task"]][problem["difficulty"]].append((*measured, float(model.answer_tokens(problem))))
    tasks = sorted(rows, key=lambda task: (len(task), task))
    by_task = {task: [row for more in rows[task].values() for row in more] for task in tasks}
    entries = {name: _mean([row for more in by_task.values() for row in more])}
    if len(by_task) > 1:
        entries |= {f"{name}/{task}": _mean(more) for task, more in by_task.items()}
    by_difficulty = {task: {str(each): _mean(rows[task][each]) for each in sorted(rows[task])} for task in tasks}
    return {"measures": entries, "by_difficulty": by_difficulty}


def _mean(rows: Sequence[tuple[float, ...]]) -> dict[str, float]:
    exact, token_exact, loss, tokens = (sum(column) for column in zip(*rows, strict=True))
    count = float(len(rows))
    return {
        "exact_match": exact / count,
        "token_exact_match": token_exact / count,
        "loss": loss / tokens,
        "count": count,
    }
