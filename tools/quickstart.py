#!/usr/bin/env python
"""From text to a model in minutes, on two cores: tokenizer, data, training, and a resume under another layout.

Everything is written below one folder, anew each time. Each command is shown before it runs, as one would type it.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from more_megatron.errors import MoREError, OneLineParser, one_line_errors
from more_megatron.evaluation.training_log import TrainingLog, read_iteration, read_log, read_validation
from more_megatron.systems import default_name
from tools.sample_text import obtain_text

_ROOT = Path(__file__).resolve().parents[1]
_SEQUENCE_LENGTH = 128
_VOCABULARY = 4096
_MOST_TEXT = 12_000_000
_EVALUATION_ITERATIONS = 10
_FEWEST_ITERATIONS = 5
_OTHER_LAYOUT = ["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "1", "--micro-batch-size", "8"]
_FURTHER_FLAGS = '"$@"'
_LINE = 110


@dataclass(frozen=True)
class Step:
    """A command of the tour."""

    title: str  # what it does
    command: list[str]  # program and arguments
    log: Path  # where its whole output goes
    environment: dict[str, str] = field(default_factory=dict)  # variables it needs set

    def written_out(self, *more: str) -> str:
        """Return the command as one would type it, a flag and its values on the same line.

        Args:
            more: What follows the command, unquoted.
        """
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        units: list[str] = []
        for word in [*variables, *map(shlex.quote, self.command)]:
            if units and units[-1].startswith("--") and not word.startswith("--"):
                units[-1] += f" {word}"
            else:
                units.append(word)
        lines = [""]
        for unit in [*units, *more]:
            if len(lines[-1]) + len(unit) > _LINE:
                lines.append("   ")
            lines[-1] += f" {unit}" if lines[-1] else unit
        return " \\\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the tour and return the exit code."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("quickstart"), help="where everything goes")
    parser.add_argument("--train-iters", type=int, default=150, help="training steps, a fifth of them after the resume")
    parser.add_argument("--wikitext", default=os.environ.get("WIKITEXT"), help="a text file (default: $WIKITEXT)")
    args = parser.parse_args(arguments)
    if args.train_iters < _FEWEST_ITERATIONS:
        parser.error(f"--train-iters {args.train_iters} is too few: give it at least {_FEWEST_ITERATIONS}")
    os.chdir(_ROOT)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with one_line_errors("quickstart"):
        try:
            _tour(args.folder, args.train_iters, args.wikitext)
        except KeyboardInterrupt:
            raise MoREError("interrupted") from None
    return 0


def _tour(folder: Path, train_iters: int, wikitext: str | None) -> None:
    _start_clean(folder)
    text = folder / "text.txt"
    source = obtain_text(text, os.path.expanduser(wikitext) if wikitext else None)
    shortened = ", the beginning of it" if _shorten(text, _MOST_TEXT) else ""
    print(f"[1/4] Text: {source}{shortened}: {text}", flush=True)
    _run(Step("[2/4] Tokenizer and data", _preprocessing(folder), folder / "logs" / "preprocess.log"))

    training = _training(folder, train_iters)
    script = folder / "train.sh"
    script.write_text(f"#!/usr/bin/env bash\ncd {shlex.quote(str(_ROOT))}\n{training.written_out(_FURTHER_FLAGS)}\n")
    stop = train_iters * 4 // 5
    first = replace(
        training,
        title=f"[3/4] Training: each of 2 ranks has half of the experts, until step {stop}",
        command=[*training.command, "--exit-interval", str(stop)],
    )
    second = replace(
        training,
        title=f"[4/4] Resume: each of 2 ranks has half of every tensor, until step {train_iters}",
        command=[*training.command, "--load", f"{folder}/checkpoint", *_OTHER_LAYOUT],
        log=folder / "logs" / "resume.log",
    )
    logs = [read_log(_run(step)) for step in (first, second)]
    print(_summary(logs, folder, source))


def _start_clean(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    for name in ("data", "logs", "checkpoint", "tensorboard", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("text.txt", "train.sh"):
        (folder / name).unlink(missing_ok=True)
    (folder / "logs").mkdir(parents=True, exist_ok=True)


def _shorten(text: Path, most: int) -> bool:
    """Cut a text that would take too long at the end of a line; return whether it was cut."""
    if text.stat().st_size <= most:
        return False
    with open(text, "rb+") as file:
        file.seek(most)
        file.readline()
        file.truncate()
    return True


def _preprocessing(folder: Path) -> list[str]:
    flags = f"""
        --input {folder}/text.txt --output-prefix {folder}/data/text
        --train-tokenizer --vocab-size {_VOCABULARY} --tokenizer-model {folder}/data/tokenizer.model
    """
    return [_program("python"), "tools/preprocess_wikitext.py", *shlex.split(flags)]


def _training(folder: Path, train_iters: int) -> Step:
    flags = f"""
        --more-variant {default_name()}
        --recurrence-sampling uniform --recurrence-min-steps 2 --recurrence-max-steps 4 --recurrence-backprop-steps 2
        --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256
        --num-experts 8 --moe-router-topk 1 --moe-aux-loss-coeff 0.001 --moe-z-loss-coeff 0.001
        --seq-length {_SEQUENCE_LENGTH} --micro-batch-size 4 --global-batch-size 8 --expert-model-parallel-size 2
        --data-path {folder}/data/text_text_document --data-cache-path {folder}/cache --split 90,10,0
        --tokenizer-type SentencePieceTokenizer --tokenizer-model {folder}/data/tokenizer.model
        --train-iters {train_iters} --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05
        --weight-decay 0.1 --adam-beta2 0.95 --attention-dropout 0 --hidden-dropout 0
        --eval-interval {train_iters * 2 // 5} --eval-iters {_EVALUATION_ITERATIONS}
        --log-interval {max(train_iters // 12, 1)} --tensorboard-dir {folder}/tensorboard
        --save {folder}/checkpoint --save-interval {train_iters}
    """
    # Without the address ranks look for each other under the host's name, which a laptop offline may not resolve.
    launcher = [_program("torchrun"), "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    command = [*launcher, "pretrain_more.py", *shlex.split(flags)]
    return Step("Training", command, folder / "logs" / "train.log", _environment())


def _program(name: str) -> str:
    """Return a program of this Python's environment, as short as it can be typed from the project's folder."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else str(path)


def _environment() -> dict[str, str]:
    """Return what the commands need set: one thread a rank; the CPU, since there may not be a GPU for each rank."""
    needed = {"OMP_NUM_THREADS": "1"}
    if shutil.which("nvidia-smi") and not os.environ.get("MORE_PLATFORM"):
        needed["MORE_PLATFORM"] = "cpu"
    return needed


def _run(step: Step) -> list[str]:
    """Run a step, its output into a file and its progress on the screen; return the output's lines."""
    print(f"\n{step.title} (log: {step.log})\n\n{step.written_out()}\n", flush=True)
    lines = []
    environment = {**os.environ, **step.environment}
    pipe = subprocess.PIPE
    with (
        open(step.log, "w") as log,
        subprocess.Popen(
            step.command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as process,
    ):
        try:
            for line in process.stdout or ():
                log.write(line)
                lines.append(line)
                _show(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise MoREError(f"{step.title} failed{_reason(lines)}; its log is {step.log}")
    return lines


def _show(line: str) -> None:
    iteration, validation = read_iteration(line), read_validation(line)
    if iteration:
        steps = f"{iteration.recurrence_steps:.1f}" if iteration.recurrence_steps is not None else "none"
        print(
            f"  iteration {iteration.number:4d}/{iteration.total} | lm loss {iteration.loss:.3f} | "
            f"recurrence steps {steps} | {iteration.milliseconds:.0f} ms a step",
            flush=True,
        )
    if validation:
        print(
            f"  validation at iteration {validation.iteration} | lm loss {validation.loss:.3f} | "
            f"perplexity {validation.perplexity:.1f}",
            flush=True,
        )
    if " documents, " in line and " tokens" in line:
        print(f"  {line.strip()}", flush=True)


def _reason(lines: list[str]) -> str:
    errors = [line.strip() for line in lines if ": error: " in line]
    return f": {errors[0]}" if errors else ""


def _tokens_per_second(log: TrainingLog) -> float:
    """Return the median over the lines; the first stands aside, since the first step of a process warms up."""
    lines = log.iterations[1:] or log.iterations
    return median(1000 * line.sequences * _SEQUENCE_LENGTH / line.milliseconds for line in lines)


def _summary(logs: list[TrainingLog], folder: Path, source: str) -> str:
    first, second = logs
    start, last, validation = first.iterations[0], second.iterations[-1], second.validations[-1]
    speeds = [f"{_tokens_per_second(log):,.0f}" for log in logs]
    rows = {
        "text": source,
        "first training loss": f"{start.loss:.3f}",
        "last training loss": f"{last.loss:.3f}",
        "validation loss": f"{validation.loss:.3f}, {start.loss - validation.loss:.2f} nats below the first step",
        "validation perplexity": f"{validation.perplexity:.1f}",
        "tokens a second": f"{speeds[0]} under expert parallelism, {speeds[1]} under tensor parallelism",
        "files": f"{folder}/: data/, checkpoint/, tensorboard/, logs/, train.sh",
    }
    table = "\n".join(f"  {name:<22} {value}" for name, value in rows.items())
    script = f"bash {folder}/train.sh"
    return f"""
{table}

Try next:

  the same weights at twice the mean depth they were trained at
    {script} --load {folder}/checkpoint --skip-train --recurrence-eval-steps 6
  the baseline on the same data: Megatron's mixture of experts
    {script} --more-variant moe --save {folder}/moe --tensorboard-dir {folder}/tensorboard/moe
  the curves
    {_program("tensorboard")} --logdir {folder}/tensorboard
"""


if __name__ == "__main__":
    sys.exit(main())
