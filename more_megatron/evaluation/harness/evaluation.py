"""A model on tasks at several depths; what is finished is not done again."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError
from more_megatron.evaluation.exported_model import ExportedModel, open_model
from more_megatron.evaluation.harness.plan import PlannedTask, load_task, plan_tasks
from more_megatron.evaluation.harness.report import write_report
from more_megatron.figures import spread
from more_megatron.flags import check_ranges
from more_megatron.unfinished import unfinished_file

__all__ = ["evaluate"]


def evaluate(args: argparse.Namespace) -> list[str]:
    """Evaluate a model and write results, table and figures.

    Args:
        args: Flags of `tools/evaluate.py`.

    Returns:
        The table, and what was written, in lines.

    Raises:
        MoREError: If model, tasks or data are not as they must be, or the folder has results of other settings.
    """
    _check_installed()
    if args.exit_threshold is not None and args.exit_criterion is None:
        raise MoREError("--exit-threshold needs --exit-criterion: name one")
    check_ranges(args, {"limit": "[1, inf)"})
    tasks = plan_tasks(args.tasks, args.data)
    with open_model(args) as exported:
        depths = dict.fromkeys(args.num_steps or [exported.num_steps])
        exits = {"criterion": args.exit_criterion, "exit_threshold": args.exit_threshold}
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
        evaluation = _Evaluation(exported, args.batch_size, settings, args.output)
        records = [
            evaluation.result(planned, depth, call_options)
            for planned in tasks
            for depth, call_options in options.items()
        ]
    return write_report(records, settings, args.output)


def _check_installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MoREError("evaluation needs lm-evaluation-harness: install the extra `eval`") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


class _Evaluation:
    """Results of one model under one set of settings, kept one file a task and depth.

    Args:
        exported: The model.
        batch_size: Texts at a time.
        settings: What results depend on beside task and depth.
        folder: Where they are kept.
    """

    def __init__(self, exported: ExportedModel, batch_size: int, settings: dict[str, Any], folder: Path) -> None:
        from more_megatron.evaluation.harness.language_model import HarnessModel

        self._language_model = HarnessModel(exported, batch_size, settings["seq_length"])
        self._settings, self._folder = settings, folder / "results"
        self._folder.mkdir(parents=True, exist_ok=True)

    def result(self, planned: PlannedTask, depth: int | None, options: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a task at a depth, from its file if it is there.

        Args:
            planned: The task.
            depth: Recurrence steps; None without recurrence.
            options: Arguments of every call of the model.
        """
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in planned.name)
        path = self._folder / (f"{name}.json" if depth is None else f"{name}_r{depth}.json")
        settings = {**self._settings, "task": planned.task, "data": planned.data_digest, "options": options}
        if path.is_file():
            return _finished(path, settings)
        print(f"{planned.name}{'' if depth is None else f' at r = {depth}'}", file=sys.stderr, flush=True)
        start = time.monotonic()
        self._language_model.begin(options)
        measured = self._measure(planned)
        record = {
            "name": planned.name,
            "num_steps": depth,
            **measured,
            "seconds": round(time.monotonic() - start, 1),
            "settings": settings,
        }
        with unfinished_file(path) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n")
        return record

    def _measure(self, planned: PlannedTask) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from more_megatron.evaluation.harness.answers import AnswerTask
        from more_megatron.evaluation.harness.measures import collect

        model = self._language_model
        loaded = load_task(planned, self._settings["detokenize"])
        chosen, skipped = None, 0
        limit = self._settings["limit"]
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
            tasks=list(loaded["tasks"].values()) if not loaded["groups"] else list(loaded["groups"].values()),
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
    # Weights may lie elsewhere than they did.
    different = [name for name, value in settings.items() if name != "model" and kept.get(name) != value]
    if different:
        name = different[0]
        raise MoREError(
            f"{path} was made with {name} {kept.get(name)}, and this run has {settings[name]}: name another --output, "
            "or remove it"
        )
    return record
