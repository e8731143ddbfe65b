"""The check of a GPU node: its dry run, that each stage can fail, and that a case that fails ends no other."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from more_megatron.evaluation.gpu_check import runner
from more_megatron.evaluation.gpu_check.outcomes import Finding, Report, Status
from more_megatron.evaluation.gpu_check.plan import DRY, GPU, Plan
from more_megatron.evaluation.gpu_check.runner import Crew
from more_megatron.evaluation.gpu_check.stages import Case, Stage
from more_megatron.systems import names, systems
from tests.helpers.ranks import run_ranks
from tests.helpers.shell import PROJECT

_RECURRENT = next(name for name, system in systems().items() if system.recurrent)


def _plan(folder: str, **flags: float) -> Plan:
    """Return a dry run of one system, whose training has some flags of its own."""
    sizes = dataclasses.replace(DRY, training=DRY.training | flags)
    return Plan(dry=True, sizes=sizes, systems=(_RECURRENT,), folder=Path(folder))


def _check(*flags: str, seconds: float) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT / "tools" / "check_gpu.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize("chosen", [names()[:1], pytest.param(names(), marks=pytest.mark.matrix)], ids=len)
def test_the_dry_run_passes_every_stage(chosen: tuple[str, ...], tmp_path: Path) -> None:
    done = _check("--dry-run", "--systems", *chosen, "--output", str(tmp_path), seconds=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    outcomes = json.loads((tmp_path / "report.json").read_text())["outcomes"]
    assert {one["stage"] for one in outcomes} == set("abcdef")
    assert {one["status"] for one in outcomes} == {"passed"}
    for stage in "bcde":
        cases = {one["case"] for one in outcomes if one["stage"] == stage}
        assert all(any(case.split(",")[0] == name for case in cases) for name in chosen), stage
    report = (tmp_path / "report.md").read_text()
    assert "## e: speed" in report
    assert "check_gpu.py --dry-run" in report


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = _check("--output", str(tmp_path), seconds=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("check the driver, or give --dry-run")


def test_a_system_that_does_not_exist_is_refused_in_one_line(tmp_path: Path) -> None:
    done = _check("--dry-run", "--systems", "nothing", "--output", str(tmp_path), seconds=120)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("check_gpu.py: error: --systems nothing does not exist")


def test_a_budget_is_a_number_of_seconds(tmp_path: Path) -> None:
    done = _check("--budget", "nan", "--output", str(tmp_path), seconds=120)
    assert done.returncode == 1
    assert done.stderr == "check_gpu.py: error: --budget nan must be finite and above 0\n"


def test_a_wrong_weight_fails_parity(tmp_path: Path) -> None:
    right, wrong = run_ranks(1, parity_with_a_wrong_weight, str(tmp_path))[0]
    assert right == []
    assert any("logits" in fault for fault in wrong)


def parity_with_a_wrong_weight(folder: str) -> tuple[list[str], list[str]]:
    """Return what parity finds of a model, and of the same model with one weight that is a little larger."""
    from more_megatron.evaluation.gpu_check.work import parity

    plan = _plan(folder)
    parity.save_reference(plan, _RECURRENT, "fp32")
    right = parity.compare(plan, _RECURRENT, "fp32", "local").faults
    step = parity.take_step

    def with_a_wrong_weight(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        weight = dict(model.named_parameters())["decoder.layers.1.self_attention.linear_proj.weight"]
        with torch.no_grad():
            weight.view(-1)[0] += 0.05
        return step(model)

    parity.take_step = with_a_wrong_weight
    return right, parity.compare(plan, _RECURRENT, "fp32", "local").faults


def test_a_loss_that_is_not_a_number_fails_training(tmp_path: Path) -> None:
    (ended,) = run_ranks(1, training_with_a_nan, str(tmp_path))
    assert "found NaN" in ended
    assert "nothing was saved" in ended


def training_with_a_nan(folder: str) -> str:
    """Return how training ends whose third loss is no number."""
    from more_megatron.errors import MoREError
    from more_megatron.evaluation.gpu_check.work import training
    from more_megatron.training import model

    plan = _plan(folder)
    training.write_corpus(plan)
    calls, forward_step = [], model.forward_step

    def with_a_nan(*args: object) -> tuple:
        output, loss = forward_step(*args)
        calls.append(0)
        return (output * torch.nan if len(calls) == 3 else output), loss

    model.forward_step = with_a_nan
    try:
        finding = training.learn_and_hand_on(plan, _RECURRENT, "local")
    except MoREError as error:
        return str(error)
    return "; ".join(finding.faults)


def test_losses_that_do_not_fall_fail_training(tmp_path: Path) -> None:
    faults = run_ranks(1, training_that_does_not_learn, str(tmp_path))[0]
    assert len(faults) == 1
    assert "the loss fell" in faults[0]


def training_that_does_not_learn(folder: str) -> list[str]:
    """Return the faults of a run whose learning rate is next to nothing."""
    from more_megatron.evaluation.gpu_check.work import training

    plan = _plan(folder, lr=1e-9)
    training.write_corpus(plan)
    return training.learn_and_hand_on(plan, _RECURRENT, "local").faults


def test_a_case_that_ends_its_process_ends_no_other() -> None:
    cases = [
        Case("dies", "os:_exit", (3,)),
        Case("finds", "more_megatron.evaluation.gpu_check.work.environment:packages"),
        Case("cannot", f"{__name__}:without_a_device_that_can"),
        Case("raises", f"{__name__}:one_of_two_ranks_raises", ranks=2),
    ]
    crew = Crew("cpu", 1, time.monotonic() + 300.0, 1)
    try:
        outcomes = {one.case: one for one in crew.run(Stage("a", "", cases))}
    finally:
        crew.close()
    assert {name: one.status for name, one in outcomes.items()} == {
        "dies": Status.FAILED,
        "raises": Status.FAILED,
        "finds": Status.PASSED,
        "cannot": Status.SKIPPED,
    }
    assert "process of rank 0 ended" in outcomes["dies"].reason
    assert outcomes["raises"].reason == "ValueError: this is rank 1"
    # Nobody waits for the rank that waits for the one that raised.
    assert outcomes["raises"].seconds < runner._LONGEST
    assert "Traceback" in outcomes["raises"].details
    assert outcomes["finds"].figures["torch"] == torch.__version__
    assert outcomes["cannot"].reason == "no FP8"


def without_a_device_that_can() -> Finding:
    """Return what a case finds whose device has not what it takes."""
    return Finding(skipped="no FP8")


def one_of_two_ranks_raises() -> Finding:
    """Raise on the last rank, for which the first waits as in a collective: longer than any case may take."""
    if os.environ["RANK"] == "1":
        raise ValueError("this is rank 1")
    time.sleep(600.0)
    return Finding()


def test_what_does_not_fit_into_the_time_is_named() -> None:
    crew = Crew("cpu", 1, time.monotonic(), 1)
    try:
        (outcome,) = crew.run(Stage("b", "", [Case("late", "os:getpid")]))
    finally:
        crew.close()
    assert (outcome.status, outcome.reason) == (Status.SKIPPED, "no time left")


@pytest.mark.parametrize("gpus", [2, 3, 4, 8])
def test_batches_of_layouts_fit_any_number_of_gpus(gpus: int) -> None:
    plan = Plan(dry=False, sizes=GPU, systems=names(), folder=Path(), ranks=gpus)
    assert "dp" in plan.layouts
    for flags in plan.layouts.values():
        replicas = gpus // int(flags.get("tensor-model-parallel-size", 1))
        assert plan.shared_batch["global-batch-size"] % (replicas * plan.shared_batch["micro-batch-size"]) == 0


def test_a_report_tells_what_failed(tmp_path: Path) -> None:
    report = Report(tmp_path, "the command")
    report.begin("b", "parity")
    report.add(Finding({"logits": 2e-7}, stage="b", case="one", seconds=1.0))
    assert not report.failed
    report.add(Finding(faults=["it | broke"], stage="b", case="two", seconds=2.0, details="where"))
    assert report.failed
    assert report.summary() == "1 passed, 1 failed"
    table = (tmp_path / "report.md").read_text().splitlines()
    assert "| one | passed | 1.0 | 2.0e-07 |  |" in table
    assert "| two | failed | 2.0 |  | it / broke |" in table
    assert json.loads((tmp_path / "report.json").read_text())["command"] == "the command"
    assert (tmp_path / "failures.log").read_text() == "=== b two: it | broke\nwhere\n\n"


@pytest.mark.gpu
def test_the_check_passes_on_a_gpu(tmp_path: Path) -> None:
    done = _check("--stages", "abcdf", "--output", str(tmp_path), seconds=3600)
    assert done.returncode == 0, done.stdout[-8000:]
