"""The scripts in examples/slurm/, against stand-ins for SLURM's programs."""

import os
import re
import runpy
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.corpus import sample_text, write_corpus
from tests.helpers.program import losses_by_iteration
from tests.helpers.ranks import run_ranks
from tests.helpers.shell import PROJECT, Call, calls_of
from tests.helpers.slurm import JOB_ID, job_variables, submit, write_slurm

_SYSTEMS = ("recurrent_experts", "shared_block", "recurrent_moe", "loop", "huginn")
_SIZES = (8, 64, 512)
_GPUS_PER_NODE = 8

# Two nodes of two ranks: tensor parallelism within a node, expert parallelism across both.
_TINY_RUN = {
    "SYSTEM": "recurrent_experts",
    "SIZE": "8",
    "LAYERS": "1",
    "HIDDEN": "32",
    "HEADS": "4",
    "SEQ_LENGTH": "16",
    "EXPERTS": "4",
    "TP": "2",
    "EP": "4",
    "MICRO_BATCH": "1",
    "GLOBAL_BATCH": "4",
    "TRAIN_ITERS": "10000",
    "WARMUP_ITERS": "1",
    "LOG_INTERVAL": "1",
    "EVAL_ITERS": "0",
}
_TINY_DATA = "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 8 --split 1,0,0"


@pytest.mark.usefixtures("several_ranks")
def test_stopped_at_the_time_limit_requeued_and_cancelled(tmp_path: Path) -> None:
    variables = {
        **_TINY_RUN,
        **job_variables(tmp_path, nodes=2, gpus_per_node=2),
        "DATA_PREFIX": str(write_corpus(tmp_path / "corpus")),
        "CHECKPOINTS": str(tmp_path / "checkpoints"),
    }
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"

    with submit("bare_metal.sbatch", _TINY_DATA, tmp_path, variables) as job:
        job.wait_for(" iteration        3/")
        job.time_is_nearly_over()
        assert job.wait() == 0
        assert job.requeued == [JOB_ID]
    stopped_at = int(tracker.read_text())
    first = losses_by_iteration(job.log.read_text())
    assert list(first) == list(range(1, stopped_at + 1))

    with submit("bare_metal.sbatch", _TINY_DATA, tmp_path, variables, restarts=1) as job:
        job.wait_for(f" iteration {stopped_at + 2:8d}/")
        job.cancel()
        assert job.wait() == 0
        assert job.requeued == [JOB_ID]
    cancelled_at = int(tracker.read_text())
    second = losses_by_iteration(job.log.read_text())
    assert list(second) == list(range(stopped_at + 1, cancelled_at + 1))


# Runs until it is told to stop, and ends as the test wants.
_SRUN = """#!/usr/bin/env bash
trap 'exit "$MORE_TEST_CODE"' TERM
echo $$ > "$MORE_TEST_SLURM/tasks"
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(("code", "restarts", "requeued"), [(0, 3, True), (1, 0, False), (0, 100, False)])
def test_only_a_run_that_has_saved_is_requeued(code: int, restarts: int, requeued: bool, tmp_path: Path) -> None:
    write_slurm(tmp_path / "bin")
    (tmp_path / "bin" / "srun").write_text(_SRUN)
    variables = {
        **job_variables(tmp_path, nodes=1, gpus_per_node=1),
        "MORE_TEST_CODE": str(code),
        "SLURM_RESTART_COUNT": str(restarts),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    script = "set -euo pipefail; source examples/slurm/job.sh; run_on_nodes --"
    with subprocess.Popen(["bash", "-c", script], cwd=PROJECT, env={**os.environ, **variables}) as job:
        while not (tmp_path / "tasks").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == code
    assert (tmp_path / "requeued").exists() == requeued


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which preprocess.sbatch has run on a small text, and in which the stand-ins are."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "text.txt").write_text(sample_text(120_000))
    write_slurm(folder / ".programs")
    _calls("bash examples/slurm/preprocess.sbatch 'text.t*' --layout plain", folder, nodes=1)
    return folder


def test_each_system_and_size_parses(preprocessed: Path) -> None:
    runs = {(system, size): _node_call(preprocessed, system, size) for system in _SYSTEMS for size in _SIZES}
    for (_, size), call in runs.items():
        assert call.world_size == size
    calls = [(call.flags, call.world_size) for call in runs.values()]
    (reports,) = run_ranks(1, _parse_in_worlds, calls, str(preprocessed))
    # Every rank has work in every step, and all pipeline stages the same.
    for layout in reports:
        assert layout["global_batch_size"] % (layout["micro_batch_size"] * layout["data_parallel_size"]) == 0
        assert layout["num_layers"] % layout["pipeline_model_parallel_size"] == 0
        assert (layout["num_experts"] or 1) % layout["expert_model_parallel_size"] == 0


def test_preprocessing_writes_what_the_runs_read(preprocessed: Path) -> None:
    call = _node_call(preprocessed, "moe", 8)
    assert (preprocessed / f"{call.value('--data-path')}.idx").is_file()
    assert (preprocessed / call.value("--tokenizer-model")).is_file()


def test_container_and_bare_metal_run_the_same(preprocessed: Path) -> None:
    variables = {"IMAGE": "image.sqsh", "MOUNTS": "/datasets:/datasets", "FP8_RECIPE": "blockwise"}
    variables |= {"DATA_BLEND": "0.7 data/web 0.3 data/code", "WANDB_PROJECT": "more"}
    (preprocessed / "srun").unlink(missing_ok=True)
    contained = _calls("bash examples/slurm/container.sbatch --lr 1e-5", preprocessed, nodes=1, **variables)
    bare = _calls("bash examples/slurm/bare_metal.sbatch --lr 1e-5", preprocessed, nodes=1, **variables)
    assert contained == bare
    (call,) = contained
    assert call.flags[-2:] == ["--lr", "1e-5"]
    assert call.value("--fp8-recipe") == "blockwise"
    assert " --data-path 0.7 data/web 0.3 data/code --split" in " ".join(call.flags)
    assert call.value("--wandb-exp-name") == "recurrent_moe-8"
    assert call.value("--master-addr") == "127.0.0.1"
    first, second = (preprocessed / "srun").read_text().splitlines()
    assert "--container-image=image.sqsh" in first
    assert f"--container-mounts={preprocessed}:{preprocessed},/datasets:/datasets " in first
    assert "--cpus-per-task=2 " in second
    assert "container" not in second.replace(str(preprocessed), "")


def test_unknown_size_is_refused(preprocessed: Path) -> None:
    environment = {**os.environ, **job_variables(preprocessed, 3, 8), "SLURM_NODEID": "0", "MASTER_ADDR": "node0"}
    command = ["bash", "examples/slurm/node.sh"]
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "there is no size for 24 GPUs" in ended.stderr


def test_conversion_passes_on_what_it_is_given(tmp_path: Path) -> None:
    words = ["checkpoints/run", "export/run", "--dtype", "bfloat16"]
    platform, tool, arguments = _python_call("convert.sbatch", words, tmp_path)
    assert (platform, tool) == ("cpu", "tools/convert_checkpoint.py")
    args = runpy.run_path(str(PROJECT / tool))["parse_arguments"](arguments)
    assert (args.command, args.load, args.save) == ("to-hf", Path("checkpoints/run"), Path("export/run"))


def test_each_element_of_a_comparison_makes_one_run_and_the_job_behind_them_the_report(tmp_path: Path) -> None:
    words = ["examples/comparison/smoke.yaml", "comparison/smoke", "--seeds", "1", "2"]
    parsed = []
    for variables in ({"SLURM_ARRAY_TASK_ID": "3", "GPUS_PER_NODE": "4"}, {"REPORT": "1"}):
        _, tool, arguments = _python_call("comparison.sbatch", words, tmp_path, **variables)
        parsed.append(runpy.run_path(str(PROJECT / tool))["_parse"](arguments))
    element, report = parsed
    assert (tool, element.experiment, element.folder) == ("tools/compare_systems.py", Path(words[0]), Path(words[1]))
    # A run has the node for itself.
    assert (element.run, element.jobs, element.nproc_per_node, element.report) == (3, 1, 4, False)
    assert (report.run, report.report) == (None, True)
    # The plan is found again by what was asked for, so that all jobs must ask for the same.
    assert element.seeds == report.seeds == [1, 2]
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        _python_call("comparison.sbatch", words[:1], tmp_path)
    assert "give an experiment file and a folder" in refusal.value.stderr


def _python_call(script: str, words: list[str], folder: Path, **variables: str) -> tuple[str, str, list[str]]:
    """Return platform, tool and arguments of the only program that a batch script runs."""
    programs = folder / "bin"
    write_slurm(programs)
    (programs / "python").write_text('#!/bin/sh\necho "${MORE_PLATFORM:-} $*"\n')
    (programs / "python").chmod(0o755)
    known = {**os.environ, **job_variables(folder, nodes=1, gpus_per_node=0), "VENV": str(folder)}
    ended = subprocess.run(
        ["bash", f"examples/slurm/{script}", *words],
        cwd=PROJECT,
        env={**known, **variables, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    platform, _, command = ended.stdout.partition(" ")
    tool, *arguments = command.split()
    return platform, tool, arguments


def test_flags_of_the_guides_exist() -> None:
    (known,) = run_ranks(1, _known_options)
    for guide in ("parallelism.md", "fp8.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (PROJECT / "docs" / guide).read_text()))
        assert len(named) > 5
        assert named <= known, sorted(named - known)


def _calls(script: str, folder: Path, nodes: int, **variables: str) -> list[Call]:
    # The scripts put the virtual environment first in PATH; here its programs are the recording ones.
    environment = folder / "venv"
    environment.mkdir(exist_ok=True)
    if not (environment / "bin").exists():
        (environment / "bin").symlink_to(folder / ".programs")
    known = {**job_variables(folder, nodes, _GPUS_PER_NODE), "VENV": str(environment)}
    return calls_of(script, folder, {**known, **variables})


def _node_call(folder: Path, system: str, size: int) -> Call:
    variables = {"SYSTEM": system, "SLURM_NODEID": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "20000"}
    (call,) = _calls("bash examples/slurm/node.sh", folder, nodes=size // _GPUS_PER_NODE, **variables)
    return call


def _parse_in_worlds(calls: list[tuple[list[str], int]], folder: str) -> list[dict[str, int]]:
    """Check each command line as the program does in a world of its size, and return the layouts."""
    import sys

    from more_megatron.evaluation.runs import forget_run, read_each_docstring_once
    from more_megatron.platform import initialize_platform
    from more_megatron.training.arguments import parse_arguments
    from more_megatron.training.model import model_config_from_args

    os.chdir(folder)
    read_each_docstring_once()
    names = ("num_layers", "num_experts", "micro_batch_size", "global_batch_size", "data_parallel_size")
    sizes = ("pipeline_model_parallel_size", "expert_model_parallel_size")
    layouts = []
    for flags, world_size in calls:
        os.environ["WORLD_SIZE"] = str(world_size)
        sys.argv = ["pretrain_more.py", *flags]
        args = parse_arguments(initialize_platform())
        model_config_from_args(args)
        layouts.append({name: getattr(args, name) for name in names + sizes})
        forget_run()
    return layouts


def _known_options() -> set[str]:
    """Return every flag of the program."""
    import sys

    from more_megatron.platform import initialize_platform
    from more_megatron.training import arguments

    options: set[str] = set()
    extend = arguments._extend_parser

    def record(parser, platform):
        extend(parser, platform)
        options.update(parser._option_string_actions)
        raise KeyboardInterrupt

    arguments._extend_parser = record
    sys.argv = ["pretrain_more.py"]
    try:
        arguments.parse_arguments(initialize_platform())
    except KeyboardInterrupt:
        return options
    return options
