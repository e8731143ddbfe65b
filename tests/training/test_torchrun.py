"""The command a user types: killed, told to stop, and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from more_megatron.checkpoint_files import newest_complete_iteration
from more_megatron.console import LOG
from tests.helpers.program import finished, losses_by_iteration
from tests.helpers.ranks import alone
from tests.helpers.training import TINY

_ROOT = Path(__file__).parents[2]
_ITERATIONS = 12
# The same launcher, whose ranks are forked and need not import Megatron each for itself.
_FORKING = "tests.helpers.forking_torchrun"


@contextlib.contextmanager
def _torchrun(flags: str, log: Path, launcher: str = "torch.distributed.run") -> Iterator[subprocess.Popen]:
    """Run the program on two ranks in a process group of its own, writing to `log`."""
    command = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", "2"]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "pretrain_more.py", *flags.split()],
            cwd=_ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # Ranks have groups of their own under torchrun; they end with the agent, or by its signal.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.02)


def _kill_ranks(process: subprocess.Popen) -> None:
    """Send SIGKILL to the agent's ranks, all at once."""
    import psutil

    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    psutil.wait_procs(ranks, timeout=30)


def test_killed_stopped_and_resumed_with_the_same_losses(tmp_path: Path) -> None:
    save = tmp_path / "checkpoints"
    flags = (
        f"{TINY} --num-layers 2 --train-iters {_ITERATIONS} --expert-model-parallel-size 2 "
        "--hidden-dropout 0.1 --split 1,0,0 --save-interval 2 --exit-signal-handler"
    )
    resuming = f"{flags} --save {save} --load {save}"
    logs = [tmp_path / f"{name}.log" for name in ("killed", "stopped", "ended")]
    with alone(2):
        with _torchrun(resuming, logs[0], _FORKING) as process:
            _wait_for(lambda: " iteration        5/" in logs[0].read_text(), process, logs[0])
            _kill_ranks(process)
        with _torchrun(resuming, logs[1], _FORKING) as process:
            _wait_for(lambda: " iteration        7/" in logs[1].read_text(), process, logs[1])
            process.terminate()
            process.wait(timeout=120)
        stopped_at = int((save / "latest_checkpointed_iteration.txt").read_text())
        assert stopped_at >= 7
        with _torchrun(f"{resuming} --verbose-start", logs[2]) as process:
            assert process.wait(timeout=240) == 0, logs[2].read_text()[-3000:]
    assert len(logs[2].read_text().splitlines()) > 700
    killed, stopped, ended = (losses_by_iteration(log.read_text()) for log in logs)
    uninterrupted = losses_by_iteration(finished(flags, ranks=2))
    assert list(uninterrupted) == list(range(1, _ITERATIONS + 1))
    assert min(stopped) in (5, 6)
    assert list(ended) == list(range(stopped_at + 1, _ITERATIONS + 1))
    for losses in (killed, stopped, ended):
        assert losses == {iteration: uninterrupted[iteration] for iteration in losses}


def test_refusal_is_one_line_of_ours(tmp_path: Path) -> None:
    log = tmp_path / "refused.log"
    with _torchrun(f"{TINY} --more-variant nonsense", log) as process:
        assert process.wait(timeout=240) != 0
    output = log.read_text()
    assert output.count("pretrain_more.py: error: --more-variant nonsense does not exist") == 1
    assert output.count("pretrain_more.py: error: ") == 1
    # torchrun's own report holds the one there is.
    assert output.count("Traceback") == 1


def test_a_killed_rank_is_one_line_of_another(tmp_path: Path) -> None:
    import psutil

    log = tmp_path / "killed.log"
    with alone(2), _torchrun(f"{TINY} --num-layers 2 --train-iters 9999", log, _FORKING) as process:
        _wait_for(lambda: " iteration        5/" in log.read_text(), process, log)
        psutil.Process(process.pid).children()[0].kill()
        assert process.wait(timeout=60) != 0
    lines = [line for line in log.read_text().splitlines() if line.startswith("pretrain_more.py: error: ")]
    assert len(lines) == 1, lines
    assert "another rank" in lines[0]


def test_quiet_start_and_an_interruption_that_says_how_to_go_on(tmp_path: Path) -> None:
    save, log = tmp_path / "save", tmp_path / "quiet.log"
    flags = f"{TINY} --train-iters 9999 --save {save} --save-interval 2 --override-opt-param-scheduler"
    with alone(2), _torchrun(flags, log) as process:
        _wait_for(lambda: " iteration        5/" in log.read_text(), process, log)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
    output = log.read_text()
    before, _, after = output.partition(" iteration        1/")
    assert len(before.splitlines()) < 15, before
    assert "> recurrent_moe: 0.09 M parameters" in before
    assert (save / LOG).read_text().count("- arguments -") == 1
    assert "> initializing torch distributed" in (save / LOG).read_text()
    for noise in ("Evaluating iter", "common state dict differs", "RerunStateMachine"):
        assert noise not in output
    newest = newest_complete_iteration(save)
    assert after.count("pretrain_more.py: ") == 1, after[-3000:]
    assert f"interrupted: the same command with --load {save} continues from iteration {newest}" in after


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_platform_that_is_not_there(platform: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "pretrain_more.py"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MORE_PLATFORM": platform, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"pretrain_more.py: error: MORE_PLATFORM={platform}")
