#!/usr/bin/env python
"""Train several systems on the same data and report what each costs and reaches, also at other depths.

    python tools/compare_systems.py --data-path P_text_document --tokenizer-model T.model --folder comparison

Each system is trained from scratch with the same flags, evaluated as it goes, and then evaluated at several numbers of
recurrence steps. The report is printed and written to FOLDER/report.md. Flags after `--` go to every run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, one_line_errors
from more_megatron.evaluation.training_log import TrainingLog, read_log
from more_megatron.flags import flag
from more_megatron.systems import get_system, names

_ROOT = Path(__file__).resolve().parents[1]
_COST = re.compile(r"([\d.]+) M parameters, ([\d.]+) M active a token, ([\d.]+) MFLOP a token")


@dataclass(frozen=True)
class Result:
    """What one system cost and reached.

    Attributes:
        system: Name of the system.
        parameters: Parameters in millions: stored, and used by a token.
        flops: Operations a token of a training step, in millions.
        log: Lines of the training run.
        losses: Validation loss in nats by number of recurrence steps; empty for a system without recurrence.
    """

    system: str
    parameters: tuple[float, float]
    flops: float
    log: TrainingLog
    losses: dict[int, float]


def main() -> int:
    """Run the comparison and return the exit code."""
    args = _parse()
    with one_line_errors("compare_systems.py"):
        results = [_compare(args, system) for system in args.systems]
        report = _report(args, results)
        (args.folder / "report.md").write_text(report)
        print(report)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, metavar="PREFIX", help="an indexed dataset")
    parser.add_argument("--tokenizer-model", required=True, metavar="FILE", help="its SentencePiece model")
    parser.add_argument("--folder", type=Path, required=True, help="where logs, checkpoints and the report go")
    parser.add_argument("--systems", nargs="+", default=list(names()), metavar="NAME")
    parser.add_argument("--train-iters", type=int, default=300)
    parser.add_argument("--depths", nargs="*", type=int, default=[1, 2, 4, 8], metavar="R", help="evaluated at the end")
    parser.add_argument("--split", default="90,10,0", help="of the documents: training, validation, test")
    parser.add_argument("flags", nargs="*", help="further flags of pretrain_more.py, after --")
    return parser.parse_args()


def _compare(args: argparse.Namespace, system: str) -> Result:
    folder = args.folder / system
    folder.mkdir(parents=True, exist_ok=True)
    command = _command(args, system, folder)
    lines = _run(command, folder / "train.log")
    found = _COST.search("\n".join(lines))
    if found is None:
        raise MoREError(f"{folder / 'train.log'} does not say what {system} costs")
    total, active, flops = (float(figure) for figure in found.groups())
    log = read_log(lines)
    losses = {}
    if any(iteration.recurrence_steps is not None for iteration in log.iterations):
        for depth in args.depths:
            flags = ["--load", str(folder / "checkpoint"), "--skip-train", "--recurrence-eval-steps", str(depth)]
            evaluated = read_log(_run([*command, *flags], folder / f"evaluate_{depth}.log"))
            losses[depth] = evaluated.validations[-1].loss
    return Result(system, (total, active), flops, log, losses)


def _command(args: argparse.Namespace, system: str, folder: Path) -> list[str]:
    varies = "recurrence_sampling" in get_system(system).reads
    own = " ".join(f"{flag(name)} {value}" for name, value in get_system(system).comparable.items())
    flags = f"""
        --more-variant {system} {own}
        {"--recurrence-sampling uniform --recurrence-min-steps 2 --recurrence-max-steps 4" if varies else ""}
        --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256
        --num-experts 8 --moe-router-topk 1 --moe-aux-loss-coeff 0.001 --moe-z-loss-coeff 0.001
        --seq-length 128 --micro-batch-size 8 --global-batch-size 8
        --data-path {args.data_path} --data-cache-path {args.folder}/cache --split {args.split}
        --tokenizer-type SentencePieceTokenizer --tokenizer-model {args.tokenizer_model}
        --train-iters {args.train_iters} --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05
        --weight-decay 0.1 --adam-beta2 0.95 --attention-dropout 0 --hidden-dropout 0
        --eval-interval {max(args.train_iters // 3, 1)} --eval-iters 10 --log-interval {max(args.train_iters // 20, 1)}
        --save {folder}/checkpoint --save-interval {args.train_iters}
    """
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "1"]
    return [*launcher, str(_ROOT / "pretrain_more.py"), *shlex.split(flags), *args.flags]


def _run(command: list[str], log: Path) -> list[str]:
    print(f"> {log}", flush=True)
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    log.write_text(done.stdout)
    lines = done.stdout.splitlines()
    if done.returncode != 0:
        reasons = [line for line in lines if ": error: " in line]
        raise MoREError(f"a run failed, its log is {log}" + (f": {reasons[0]}" if reasons else ""))
    return lines


def _report(args: argparse.Namespace, results: list[Result]) -> str:
    heads = ["system", "M parameters", "M active", "MFLOP a token", "tokens/s", "validation loss", "fell by"]
    heads += [f"at r = {depth}" for depth in args.depths]
    rows = [heads, ["---"] * len(heads)]
    for result in results:
        validations = [validation.loss for validation in result.log.validations]
        rows.append(
            [
                result.system,
                f"{result.parameters[0]:.2f}",
                f"{result.parameters[1]:.2f}",
                f"{result.flops:.2f}",
                f"{result.log.tokens_per_second():,.0f}",
                f"{validations[-1]:.3f}",
                f"{result.log.iterations[0].loss - validations[-1]:.3f}",
                *(f"{result.losses[depth]:.3f}" if depth in result.losses else "-" for depth in args.depths),
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{args.train_iters} training steps on {args.data_path}, depth uniform between 2 and 4.\n\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
