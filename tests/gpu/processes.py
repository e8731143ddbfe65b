"""Runs a function of `tests.gpu.work` in a process of its own: CUDA and a CPU's stand-in for it exclude each other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from more_megatron.platform.packages import has_package
from tests.helpers.ranks import free_port, rank_environment

__all__ = ["BACKENDS", "pretrain", "run_on"]

_ROOT = Path(__file__).parents[2]
_SCRIPT = """
import sys
from more_megatron.platform import initialize_platform
initialize_platform()
import torch
from tests.gpu import work
call = torch.load(sys.argv[1], weights_only=False)
torch.save(getattr(work, call["function"])(*call["arguments"]), sys.argv[2])
"""
_NEEDS_TE = pytest.mark.skipif(not has_package("transformer_engine"), reason="needs Transformer Engine")

# Backends, the one of Transformer Engine only where it is installed.
BACKENDS = ["local", pytest.param("transformer_engine", marks=_NEEDS_TE)]


def run_on(platform: str, function: str, *arguments: Any) -> Any:
    """Return what a function of `tests.gpu.work` returns as the only rank on `cpu` or `cuda`."""
    with tempfile.TemporaryDirectory() as folder:
        call, result = Path(folder, "call"), Path(folder, "result")
        torch.save({"function": function, "arguments": arguments}, call)
        _run(platform, [sys.executable, "-c", _SCRIPT, str(call), str(result)])
        return torch.load(result, weights_only=False)


def pretrain(command_line: str) -> str:
    """Run `pretrain_more.py` on one GPU and return its output."""
    return _run("cuda", [sys.executable, "pretrain_more.py", *command_line.split()])


def _run(platform: str, command: list[str]) -> str:
    environment = {
        **os.environ,
        **rank_environment(0, 1, free_port()),
        "MORE_PLATFORM": platform,
        "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    # No pipe, which a process that saves checkpoints could hold open.
    with tempfile.TemporaryFile("w+") as output:
        run = subprocess.run(command, env=environment, cwd=_ROOT, stdout=output, stderr=output, timeout=900)
        output.seek(0)
        text = output.read()
    assert run.returncode == 0, text[-8000:]
    return text
