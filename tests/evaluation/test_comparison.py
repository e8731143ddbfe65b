"""A comparison: the flags of its runs, runs that are made once, and a report that says what their logs say."""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from more_megatron.errors import MoREError
from more_megatron.evaluation.command_lines import arguments_of, parse_flags
from more_megatron.evaluation.comparison.experiment import Experiment, evaluation_flags
from more_megatron.evaluation.comparison.health import entropy_by_step, loads
from more_megatron.evaluation.comparison.measures import ArmResult, RunResult, collect, difference
from more_megatron.evaluation.comparison.planning import Plan, PlannedArm
from more_megatron.evaluation.comparison.report import write_report
from more_megatron.evaluation.comparison.runner import Runner
from more_megatron.systems import get_system, names
from tests.helpers.shell import PROJECT
from tools import compare_systems

_FLAGS = {
    "num-layers": 2,
    "num-experts": 4,
    "moe-router-topk": 1,
    "recurrence-sampling": "uniform",
    "recurrence-min-steps": 2,
    "recurrence-max-steps": 4,
    "train-iters": 8,
}
_STAND_IN = Path(__file__).with_name("comparison_program.py")
_EXPERIMENTS = sorted((PROJECT / "examples" / "comparison").glob("*.yaml"))


def _experiment(**keys: object) -> Experiment:
    return Experiment.of({"title": "test", "arms": None, "flags": _FLAGS} | keys)


@pytest.mark.parametrize("name", names())
def test_a_system_is_given_the_flags_that_it_reads(name: str) -> None:
    system = get_system(name)
    experiment = _experiment(deep="deep")
    (arm,) = (arm for arm in experiment.arms if arm.name == name)
    flags = experiment.flags_of(arm, {})
    assert ("recurrence-min-steps" in flags) == system.recurrent
    assert ("num-experts" in flags) == arm.has_experts == ("num_experts" not in system.defaults)
    given = {key.replace("-", "_") for key in flags} & {"recurrence_min_steps", "recurrence_sampling", *system.reads}
    assert given <= system.reads


def test_a_dense_arm_of_r_times_the_layers_has_no_recurrence() -> None:
    experiment = _experiment(deep="deep")
    flags = experiment.flags_of(experiment.arms[-1], {})
    assert flags["num-layers"] == 3 * _FLAGS["num-layers"]
    assert [flag for flag in flags if "recurrence" in flag or "moe" in flag or "experts" in flag] == [
        "recurrence-steps"
    ]


def test_an_arm_has_flags_of_its_own_and_points_of_a_sweep_stand_over_shared_ones() -> None:
    experiment = _experiment(
        arms={"looped": {"system": "loop", "num-experts": 8, "moe-router-topk": None}},
        sweep={"num-layers": [1, 2], "lr": [0.1, 0.2]},
    )
    points = list(experiment.points())
    assert len(points) == 4
    flags = experiment.flags_of(experiment.arms[0], points[0])
    assert (flags["more-variant"], flags["num-experts"], flags["num-layers"], flags["lr"]) == ("loop", 8, 1, 0.1)
    assert "moe-router-topk" not in flags


def test_a_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seeds: [3]\narms: [moe]\nflags: {lr: 1, num-layers: 2}\n")
    (tmp_path / "more.yaml").write_text("extends: base.yaml\ntitle: more\nflags: {lr: 2, train-iters: 5}\n")
    experiment = Experiment.read(tmp_path / "more.yaml")
    assert (experiment.title, experiment.seeds, [arm.name for arm in experiment.arms]) == ("more", (3,), ["moe"])
    assert experiment.flags == {"lr": 2, "num-layers": 2, "train-iters": 5}
    (tmp_path / "base.yaml").write_text("extends: more.yaml\n")
    with pytest.raises(MoREError, match="extends itself"):
        Experiment.read(tmp_path / "more.yaml")
    (tmp_path / "base.yaml").write_text("flags: [lr]\n")
    with pytest.raises(MoREError, match="flags must be a table"):
        Experiment.read(tmp_path / "more.yaml")
    (tmp_path / "more.yaml").write_text("seeds: [3]\nflags:\n  lr: 2\n  lr: 3\n")
    with pytest.raises(MoREError, match=r"lr stands there twice.*line 3"):
        Experiment.read(tmp_path / "more.yaml")


def test_flags_that_an_experiment_decides_are_refused() -> None:
    experiment = _experiment(flags={"seed": 3})
    with pytest.raises(MoREError, match="--seed has no effect beside seeds"):
        experiment.flags_of(experiment.arms[0], {})
    with pytest.raises(MoREError, match="nothing says how long to train"):
        _experiment(flags={"train-iters": None}).flags_of(experiment.arms[0], {})


@pytest.mark.parametrize("path", _EXPERIMENTS, ids=lambda path: path.stem)
def test_the_experiments_that_come_with_it_can_be_read(path: Path) -> None:
    assert len(Experiment.read(path).seeds) > 1


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"matches": "flops"}, "matches"),
        ({"match": "layers"}, "layers"),
        ({"arms": ["no_such_system"]}, "no_such_system"),
        ({"arms": {"moe": 3}}, "moe"),
        ({"baseline": "other"}, "other"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"seeds": "many"}, "list of whole numbers"),
        ({"depths": 3}, "list of whole numbers"),
        ({"arms": 3}, "arms must be"),
        ({"tokens": 0}, "tokens 0"),
        ({"tokens": math.inf}, "tokens inf must be a number above 0"),
        ({"tokens": 1, "total_flops": 1}, "total_flops"),
        ({"tasks": ["chains"]}, "tasks"),
        ({"problems": 1.5}, "problems 1.5 must be a number above 0"),
        ({"deep": "moe", "arms": ["moe"]}, "two arms are named moe"),
        ({"seeds": [0]}, "--seeds 0 must be at least 1"),
        ({"problems": 0}, "problems 0 must be a number above 0"),
        ({"depths": [1, -1]}, "--depths -1 must be at least 1"),
        ({"finetune": "yes please"}, "finetune must be a table"),
        ({"flags": ["lr"]}, "flags must be a table"),
        ({"flags": None}, "flags must be a table"),
        ({"sweep": {"lr": []}}, "sweep must be a table of lists"),
    ],
)
def test_a_wrong_key_is_refused_in_one_line(keys: dict[str, object], word: str) -> None:
    with pytest.raises(MoREError) as refusal:
        _experiment(**keys)
    assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_flags_are_read_as_they_are_typed() -> None:
    flags = parse_flags("--lr 1e-3 --loss-on-answers --train-data-path a b --split=9,1,0")
    assert flags == {"lr": "1e-3", "loss-on-answers": True, "train-data-path": ["a", "b"], "split": "9,1,0"}
    assert parse_flags(" ".join(arguments_of(flags))) == flags


def test_an_experiment_without_an_arm_that_can_be_trained_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "e.yaml").write_text("arms: [moe]")
    plan = Plan({}, ({},), (PlannedArm("moe", 0, {}, "--num-layers is missing"),))
    monkeypatch.setattr(compare_systems, "in_own_process", lambda *_, **__: plan)
    args = compare_systems._parse([str(tmp_path / "e.yaml"), "--folder", str(tmp_path)])
    with pytest.raises(MoREError, match="no arm can be trained; moe: --num-layers is missing"):
        compare_systems._plan(args)
    assert not (tmp_path / "plan.json").exists()


def test_a_report_of_runs_that_were_not_made_says_so(tmp_path: Path) -> None:
    plan = dataclasses.replace(_plan(1), points=({"qk-layernorm": None},))
    with pytest.raises(MoREError, match="3 of 3 runs have no result"):
        compare_systems._report(argparse.Namespace(folder=tmp_path), plan)
    assert (tmp_path / "report.html").exists()
    # A point of a sweep that leaves a flag out is told from the others.
    assert "## With --qk-layernorm null\n" in (tmp_path / "report.md").read_text()


# Runs, with a stand-in for the program.


def _plan(*seeds: int) -> Plan:
    experiment = _experiment(arms=["moe", "loop", "universal"], seeds=seeds, depths=[1, 2], baseline="moe")
    arms = [
        PlannedArm(
            arm.name,
            point=0,
            flags=experiment.flags_of(arm, {}),
            flops=2e6,
            ratios={"flops": 1.0, "parameters": 1.0},
            tokens=512,
            recurrent=get_system(arm.system).recurrent,
        )
        for arm in experiment.arms[:2]
    ]
    refused = PlannedArm("universal", 0, {}, "costs too much")
    return Plan(json.loads(json.dumps(vars(experiment), default=vars)), ({},), (*arms, refused))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that take a moment."""
    for program in ("launcher", "evaluator"):
        monkeypatch.setattr(Runner, program, (sys.executable, str(_STAND_IN)))


@pytest.mark.usefixtures("quick")
def test_numbers_are_those_of_the_logs_and_a_failed_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = _plan(1, 2, 13)
    assert not Runner(tmp_path, jobs=2).make(plan.runs)
    assert "moe-seed13: FAILED: pretrain_more.py: error: --lr 0 is no rate" in capsys.readouterr().out
    failed = write_report(plan, tmp_path)
    assert {run.name for run in failed} == {"moe-seed13", "loop-seed13", *(f"universal-seed{s}" for s in (1, 2, 13))}

    report = json.loads((tmp_path / "report.json").read_text())
    moe, loop, refused = report["points"][0]["arms"]
    assert moe["seeds"] == {"1": 0.301, "2": 0.302, "13": "failed"}
    assert moe["loss"]["mean"] == pytest.approx(0.3015)
    assert loop["difference"]["mean"] == pytest.approx(0.1)
    assert loop["loss_at"]["2"]["mean"] == pytest.approx(2.4015)
    assert loop["loss_at"]["1"] == {"mean": None, "deviation": None, "count": 2}
    assert loop["answers_at"]["chains exact match"]["2"]["mean"] == pytest.approx(0.2)
    assert refused["refusal"] == "costs too much"
    assert refused["loss"] is None
    for kind in ("md", "html"):
        text = (tmp_path / f"report.{kind}").read_text()
        for expected in (
            "0.301 ± 0.001",
            "seed 13 failed",
            "not finite",
            "moe-seed13",
            "--lr 0 is no rate",
            "costs too much",
        ):
            assert expected in text, (kind, expected)


@pytest.mark.usefixtures("quick")
def test_the_page_holds_its_figures_and_asks_for_nothing(tmp_path: Path) -> None:
    plan = _plan(1, 2)
    Runner(tmp_path, jobs=2).make(plan.runs)
    write_report(plan, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,[A-Za-z0-9+/=]{1000,}"', page)) == 7
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count("Of each arm 2 seeds; matched: training FLOPs") == 7


@pytest.mark.usefixtures("quick")
def test_health_is_that_of_the_runs_and_what_was_not_watched_is_not_called_healthy(tmp_path: Path) -> None:
    plan = _plan(1, 2, 13)
    Runner(tmp_path, jobs=2).make(plan.runs)
    write_report(plan, tmp_path)
    moe, loop, _ = (arm["health"] for arm in json.loads((tmp_path / "report.json").read_text())["points"][0]["arms"])
    # Means over layers and steps, 3.0 and seed / 10, then over the seeds that finished.
    assert loop["entropy"] == pytest.approx({"mean": 3.15, "deviation": 0.1 / 2**0.5, "count": 2})
    assert (loop["seeds"], loop["experts"], loop["dead experts"]["mean"], loop["load cv"]) == (2, 3, 1.0, None)
    assert (loop["warnings"]["mean"], loop["warned"]) == (1.0, ["routing/dead experts"])
    assert (moe["seeds"], moe["entropy"], moe["warnings"]) == (0, None, None)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| `moe` | 0 |")]
    assert [cell.strip() for cell in rows[0].split("|")[3:-1]] == ["not recorded"] * 6
    # What is long is broken into lines.
    assert '<td class="words">0.301 ± 0.001 (seed 13 failed)</td>' in (tmp_path / "report.html").read_text()
    results = collect(plan, tmp_path)
    assert {step: load.tolist() for step, load in loads(results[1]).items()} == {1: [0.75, 0.25, 0], 2: [0.75, 0.25, 0]}
    assert {step: spread.mean * math.log(3) for step, spread in entropy_by_step(results[1]).items()} == pytest.approx(
        {1: 2.65, 2: 3.65}
    )


@pytest.mark.usefixtures("quick")
def test_a_finished_run_is_not_repeated_and_one_with_other_flags_is_refused(tmp_path: Path) -> None:
    plan = _plan(1)
    Runner(tmp_path, jobs=1).make(plan.runs)
    log = tmp_path / "runs" / "moe-seed1" / "log.txt"
    before = log.stat().st_mtime_ns
    Runner(tmp_path, jobs=1).make(plan.runs)
    assert log.stat().st_mtime_ns == before
    plan.arms[0].flags["train-iters"] = 9
    with pytest.raises(MoREError, match="moe-seed1 holds a finished run with other flags"):
        Runner(tmp_path, jobs=1).make(plan.runs)


@pytest.mark.usefixtures("quick")
def test_a_second_training_begins_with_the_weights_of_the_first_and_gives_the_answers(tmp_path: Path) -> None:
    plan = _plan(1)
    Runner(tmp_path, jobs=1, finetune={"train-iters": 3, "num-experts": None}).make(plan.runs)
    folder = tmp_path / "runs" / "loop-seed1"
    words = (folder / "finetune.txt").read_text().splitlines()[0].split()
    assert words[words.index("--load") + 1] == str(folder / "checkpoint")
    assert words[words.index("--save") + 1] == str(folder / "finetuned")
    assert "--finetune" in words
    assert "--num-experts" not in words
    run = collect(plan, tmp_path)[1].runs[0]
    assert (run.loss, list(run.curve)) == (0.401, [1, 8])
    assert run.answers[2] == {"chains exact match": 0.2}
    with pytest.raises(MoREError, match="moe-seed1 holds a finished run with other flags"):
        Runner(tmp_path, jobs=1).make(plan.runs)


@pytest.mark.usefixtures("quick")
def test_tasks_are_trained_on_and_answered_by_the_weights_at_the_end(tmp_path: Path) -> None:
    tasks = {"chains": str(tmp_path / "chains")}
    experiment = _experiment(tasks=tasks, finetune={"lr": 0.1})
    assert experiment.finetune is not None
    assert experiment.finetune["train-data-path"] == [f"{tmp_path}/chains_train_document"]
    assert (experiment.finetune["loss-on-answers"], experiment.finetune["lr"]) == (True, 0.1)
    assert _experiment(tasks=tasks, flags=_FLAGS | {"loss-on-answers": True}).finetune is None
    with pytest.raises(MoREError, match=r"there is no .*chains_test\.jsonl"):
        evaluation_flags(tasks, 5, [1, 4])
    for split in ("test", "beyond"):
        (tmp_path / f"chains_{split}.jsonl").touch()

    plan = _plan(1, 2)
    asked = evaluation_flags(tasks, 5, [1, 4])
    Runner(tmp_path, jobs=2, finetune=experiment.finetune, evaluation=asked).make(plan.runs)
    asked = (tmp_path / "runs" / "loop-seed1" / "evaluation.txt").read_text()
    assert "--num-steps 1 4 " in asked
    assert f"--load {tmp_path}/runs/loop-seed1/finetuned " in asked
    assert f"--data chains={tmp_path}/chains_test.jsonl chains={tmp_path}/chains_beyond.jsonl " in asked
    assert "--num-steps" not in (tmp_path / "runs" / "moe-seed1" / "evaluation.txt").read_text()
    write_report(plan, tmp_path)
    moe, loop, _ = json.loads((tmp_path / "report.json").read_text())["points"][0]["arms"]
    assert [loop["answers_at"]["chains exact match"][depth]["mean"] for depth in ("1", "4")] == [0.1, 0.4]
    # Its steps in training are 2 to 4.
    assert loop["usual_depth"] == 4
    assert [loop["by_difficulty"]["chains"][k]["mean"] for k in ("2", "3")] == [4 / 2, pytest.approx(4 / 3)]
    assert moe["by_difficulty"]["chains"]["2"] == {"mean": 0.0, "deviation": 0.0, "count": 2}
    assert "### chains exact match by difficulty" in (tmp_path / "report.md").read_text()


def test_runs_end_with_a_comparison_that_is_killed(tmp_path: Path) -> None:
    plan = _plan(1)
    plan.save(tmp_path / "plan.json")
    script = f"""
import sys
from pathlib import Path
from more_megatron.evaluation.comparison.planning import Plan
from more_megatron.evaluation.comparison.runner import Runner
Runner.launcher = (sys.executable, {str(_STAND_IN)!r})
folder = Path({str(tmp_path)!r})
Runner(folder, jobs=1).make(Plan.read(folder / "plan.json").runs)
"""
    environment = {**os.environ, "STUCK": "1", "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        stuck = tmp_path / "runs" / "moe-seed1" / "checkpoint" / "stuck"
        _wait_until(lambda: stuck.exists() and stuck.read_text() != "")
        process.send_signal(signal.SIGKILL)
    child = Path("/proc") / stuck.read_text()
    _wait_until(lambda: not child.exists())
    assert not (tmp_path / "runs" / "moe-seed1" / "record.json").exists()


def _wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _arm(losses: dict[int, float]) -> ArmResult:
    arm = PlannedArm("arm", 0, {"train-iters": 1})
    return ArmResult(arm, tuple(RunResult(f"s{seed}", seed, "finished", loss=loss) for seed, loss in losses.items()))


def test_seeds_are_compared_in_pairs() -> None:
    baseline = _arm({1: 4.0, 2: 5.0, 3: 6.0, 4: 9.0})
    found = difference(_arm({1: 3.9, 2: 4.88, 3: 5.89}), baseline)
    assert found is not None
    # By hand: differences -0.10, -0.12, -0.11; t of 2 degrees of freedom is 4.303.
    assert (found.mean, found.half_width) == pytest.approx((-0.11, 4.303 * 0.01 / 3**0.5), rel=1e-3)
    assert found.percent == pytest.approx(100 * 0.11 / 5)
    assert found.is_carried
    assert found.p_value < 0.05
    two = difference(_arm({1: 3.9, 2: 4.0}), baseline)
    assert two is not None
    assert not two.is_carried
    one = difference(_arm({1: 3.0}), baseline)
    assert one is not None
    assert not one.is_carried
    assert difference(_arm({7: 3.0}), baseline) is None
