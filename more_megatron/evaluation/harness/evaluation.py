"""A model on tasks at several depths; what is finished is not done again."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
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

__all__ = ["evaluate"]


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

    from more_megatron.evaluation.harness.measures import collect
    from more_megatron.evaluation.harness.our_tasks import AnswerTask

    loaded = load_task(planned, settings["detokenize"])
    chosen, skipped, limit = None, 0, settings["limit"]
    for name, task in loaded["tasks"].items():
        if isinstance(task, AnswerTask):
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
    record = {**collect(planned.name, loaded["tasks"], found, model), "skipped": skipped}
    if model.mean_steps is not None:
        next(iter(record["measures"].values()))["mean_steps"] = model.mean_steps
    return record


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
