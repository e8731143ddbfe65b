"""A rank ends with its launcher, however that ended, and whatever state the rank is in."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

_RANK = """
import time
from more_megatron.lifetime import end_with_launcher
end_with_launcher()
print("here")
time.sleep(99)
"""
_LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-uc", sys.argv[1]], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_rank_ends_with_its_launcher(is_stopped: bool) -> None:
    command = [sys.executable, "-c", _LAUNCHER, _RANK]
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = psutil.Process(int(launcher.stdout.readline()))
        if is_stopped:
            rank.send_signal(signal.SIGSTOP)
        launcher.kill()
    assert psutil.wait_procs([rank], timeout=5)[1] == [] or rank.status() == psutil.STATUS_ZOMBIE
