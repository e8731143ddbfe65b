#!/usr/bin/env python
"""Compare systems at equal cost: train each from scratch with several seeds and write one report.

    python tools/compare_systems.py examples/comparison/smoke.yaml --folder comparison

The experiment file says what is compared; see docs/comparison.md. Finished runs are not repeated: the same command
continues a comparison that was stopped, and tries failed runs again. The report is FOLDER/report.html, .md and .json.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.evaluation.command_lines import parse_flags
from more_megatron.evaluation.comparison import planning, timing
from more_megatron.evaluation.comparison.experiment import MATCHES, Experiment, evaluation_flags
from more_megatron.evaluation.comparison.report import check_packages, write_report
from more_megatron.evaluation.comparison.runner import Runner, in_own_process
from more_megatron.flags import check_ranges


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    args = _parse(arguments)
    with one_line_errors("compare_systems.py"):
        check_ranges(args, {"jobs": "[1, inf)", "nproc_per_node": "[1, inf)"})
        if args.run is None and not args.plan:
            check_packages()
        args.folder.mkdir(parents=True, exist_ok=True)
        plan = _plan(args)
        if args.plan:
            _list(plan)
            return 0
        runs = plan.runs if args.run is None else [_chosen(plan, args.run)]
        if not args.report:
            finished = _runner(args, plan.experiment).make(runs)
            if args.time and args.run is None:
                in_own_process(timing.save_timings, plan, args.folder / "timings.json", log=args.folder / "timing.log")
        if args.run is not None:
            return 0 if finished else 1
        return _report(args, plan)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT.yaml")
    parser.add_argument("--folder", type=Path, required=True, help="where plan, runs and report go")
    parser.add_argument("--match", choices=MATCHES, help="what all arms have in common")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="these arms only")
    parser.add_argument("--tokens", type=float, help="training tokens of a run")
    parser.add_argument("--depths", nargs="*", type=int, metavar="R", help="recurrence steps of the evaluations")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK=PREFIX",
        help="fine-tune each run on these problems, and let it answer them at each depth; "
        "PREFIX is that of the files of tools/prepare_tasks.py",
    )
    parser.add_argument("--problems", type=int, metavar="N", help="problems of each file that are answered")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side; default: a core each")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of a run")
    parser.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of finished runs")
    parser.add_argument("--time", action="store_true", help="time the arms in turn, when the runs are made")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="decide widths and list the runs, and make none")
    only.add_argument("--run", type=int, metavar="INDEX", help="make the run of this number in the list, and no report")
    only.add_argument("--report", action="store_true", help="make no runs; report on those there are")
    parser.add_argument("--flags", default="", help="further flags of every run of pretrain_more.py, in one string")
    return parser.parse_args(arguments)


def _plan(args: argparse.Namespace) -> planning.Plan:
    """Return the plan of the folder if it is that of this experiment, else a new one."""
    keys = {name: getattr(args, name) for name in ("match", "seeds", "tokens", "depths", "problems")}
    if args.tasks is not None:
        keys["tasks"] = dict(_pair(task) for task in args.tasks)
    experiment = Experiment.read(args.experiment, **keys).only(args.arms)
    experiment = replace(experiment, flags=experiment.flags | parse_flags(args.flags))
    path = args.folder / "plan.json"
    if path.exists():
        plan = planning.Plan.read(path)
        if plan.experiment == json.loads(json.dumps(asdict(experiment))):
            return plan
    plan = in_own_process(planning.plan, experiment, log=args.folder / "planning.log")
    if all(arm.refusal for arm in plan.arms):
        raise MoREError(f"{args.experiment}: no arm can be trained; {plan.arms[0].name}: {plan.arms[0].refusal}")
    plan.save(path)
    return plan


def _pair(text: str) -> tuple[str, str]:
    task, _, prefix = text.partition("=")
    if not prefix:
        raise MoREError(f"--tasks {text} must be TASK=PREFIX, as in chains=comparison/data/chains")
    return task, prefix


def _runner(args: argparse.Namespace, experiment: dict[str, Any]) -> Runner:
    tasks = experiment["tasks"]
    asked = evaluation_flags(tasks, experiment["problems"], experiment["depths"]) if tasks else None
    return Runner(args.folder, args.jobs, args.nproc_per_node, args.keep_weights, experiment["finetune"], asked)


def _list(plan: planning.Plan) -> None:
    for arm in plan.arms:
        ratios = ", ".join(f"{ratio:.3f} of the {name}" for name, ratio in arm.ratios.items())
        cost = f"{arm.parameters / 1e6:.2f} M parameters, {arm.flops / 1e6:.2f} MFLOP a token; {ratios}"
        print(f"{arm.name:20} {arm.refusal or cost}")
    for index, run in enumerate(plan.runs):
        print(f"{index:4d}  {run.name}")


def _chosen(plan: planning.Plan, index: int) -> planning.Run:
    if not 0 <= index < len(plan.runs):
        raise MoREError(f"--run {index} does not exist: the plan has runs 0 to {len(plan.runs) - 1}")
    return plan.runs[index]


def _report(args: argparse.Namespace, plan: planning.Plan) -> int:
    failed = write_report(plan, args.folder)
    print(f"report: {args.folder / 'report.html'}")
    for run in failed:
        print(f"  {run.name} {run.state}: {run.reason or 'it has not ended'}")
    if failed:
        raise MoREError(f"{len(failed)} of {len(plan.runs)} runs have no result: without --report it makes them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
