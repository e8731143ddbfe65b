"""Two systems with two seeds, killed in the middle: the same command finishes the comparison with the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.corpus import write_corpus
from tests.helpers.shell import PROJECT

_TOOL = [sys.executable, str(PROJECT / "tools" / "compare_systems.py")]
_FLAGS = {
    "num-layers": 1,
    "hidden-size": 16,
    "num-attention-heads": 2,
    "ffn-hidden-size": 32,
    "num-experts": 4,
    "moe-router-topk": 1,
    "recurrence-sampling": "uniform",
    "recurrence-min-steps": 1,
    "recurrence-max-steps": 3,
    "seq-length": 16,
    "micro-batch-size": 4,
    "global-batch-size": 4,
    "train-iters": 6,
    "lr": 0.01,
    "eval-interval": 3,
    "eval-iters": 2,
    "log-interval": 1,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 127,
    "make-vocab-size-divisible-by": 8,
    "split": "80,20,0",
}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A file of an experiment whose runs take seconds."""
    flags = _FLAGS | {"data-path": str(write_corpus(tmp_path / "corpus"))}
    path = tmp_path / "experiment.yaml"
    keys = {"arms": ["moe", "recurrent_moe"], "seeds": [1, 2], "depths": [1, 2], "flags": flags}
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.mark.matrix
def test_a_killed_comparison_goes_on_with_the_same_numbers(experiment: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*_TOOL, experiment, "--folder", whole, "--time"], check=True, env=_environment())
    with subprocess.Popen([*_TOOL, experiment, "--folder", killed], env=_environment()) as process:
        deadline = time.monotonic() + 240
        while not list(killed.glob("runs/*/record.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    finished = list(killed.glob("runs/*/record.json"))
    assert 0 < len(finished) < 4
    before = [path.read_text() for path in finished]
    subprocess.run([*_TOOL, experiment, "--folder", killed], check=True, env=_environment())
    assert [path.read_text() for path in finished] == before
    assert _numbers(killed) == _numbers(whole)
    assert len(_numbers(whole)) == 4
    assert all(set(run["curve"]) == {str(step) for step in range(1, 7)} for run in _numbers(whole))
    arms = json.loads((whole / "report.json").read_text())["points"][0]["arms"]
    assert all(arm["ratios"]["flops"] == pytest.approx(1.0, abs=0.03) for arm in arms)
    assert all(arm["timing"]["tokens_per_second"] > 0 for arm in arms)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _numbers(folder: Path) -> list[dict[str, Any]]:
    runs = json.loads((folder / "report.json").read_text())["runs"]
    return [{name: run[name] for name in ("name", "state", "loss", "losses", "curve", "validations")} for run in runs]
