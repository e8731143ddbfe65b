"""One run at a time writes into a folder; one that died, here or elsewhere, keeps nobody out."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from more_megatron import output_folders
from more_megatron.errors import MoREError
from more_megatron.output_folders import check_still_held, only_trainer

_CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less."""
    monkeypatch.setattr(output_folders, "_PATIENCE_HERE_SECONDS", 1.0)
    monkeypatch.setattr(output_folders, "_PATIENCE_ELSEWHERE_SECONDS", 3.0)


def _hold(folder: Path, held: Any, machine: str | None) -> None:
    output_folders._BEAT_SECONDS = 0.2
    if machine is not None:
        output_folders._machine = lambda: machine  # type: ignore[assignment]
        output_folders.try_lock = lambda file: True  # A file system that does not share locks.
    with only_trainer(folder):
        held.set()
        signal.pause()


def _holder(folder: Path, machine: str | None = None) -> Any:
    held = _CONTEXT.Event()
    process = _CONTEXT.Process(target=_hold, args=(folder, held, machine))
    process.start()
    assert held.wait(120)
    return process


@pytest.mark.parametrize("machine", [None, "another"])
def test_second_run_is_refused_until_the_first_is_killed(tmp_path: Path, machine: str | None) -> None:
    holder = _holder(tmp_path, machine)
    with pytest.raises(MoREError, match="another run writes to --save"), only_trainer(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with only_trainer(tmp_path):
        check_still_held()


def test_lock_that_outlived_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".trainer.lock").write_text("a machine that died 17 token")
    monkeypatch.setattr(output_folders, "try_lock", lambda file: False)
    with only_trainer(tmp_path):
        check_still_held()


def test_one_after_the_other_need_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_trainer(tmp_path):
        pass
    monkeypatch.setattr(output_folders.time, "sleep", lambda seconds: pytest.fail("it waited"))
    monkeypatch.setattr(output_folders, "_machine", lambda: "another")
    with only_trainer(tmp_path):
        pass


def test_run_that_another_took_over_from_saves_nothing(tmp_path: Path) -> None:
    check_still_held()
    with only_trainer(tmp_path):
        check_still_held()
        (tmp_path / ".trainer.lock").write_text("another 3 token")
        with pytest.raises(MoREError, match="another run writes"):
            check_still_held()
