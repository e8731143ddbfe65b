"""Which platform a process is on, what it says, and what it touches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.platform import Platform, select_platform

_ROOT = Path(__file__).parents[2]


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "MORE_PLATFORM"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**clean, **environment},
        timeout=240,
    )


@pytest.mark.parametrize(
    ("forced", "has_gpu", "expected"),
    [
        ("", False, Platform.CPU),
        ("", True, Platform.CUDA),
        ("cpu", True, Platform.CPU),
        (" CPU ", False, Platform.CPU),
        ("cuda", True, Platform.CUDA),
    ],
)
def test_choice(monkeypatch: pytest.MonkeyPatch, forced: str, has_gpu: bool, expected: Platform) -> None:
    monkeypatch.setenv("MORE_PLATFORM", forced)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert select_platform() is expected


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MORE_PLATFORM", "tpu")
    with pytest.raises(MoREError, match="MORE_PLATFORM=tpu is not a platform: set it to cpu or cuda"):
        select_platform()
    monkeypatch.setenv("MORE_PLATFORM", "cuda")
    with pytest.raises(MoREError, match="PyTorch sees no GPU"):
        select_platform()


_ON_CPU = """
import warnings
from more_megatron.platform import initialize_platform
initialize_platform()
initialize_platform()
import megatron.training
warnings.warn("something else")
"""


def test_cpu_is_announced_once_and_silences_absent_packages_only() -> None:
    ended = _python(_ON_CPU)
    assert ended.returncode == 0, ended.stderr
    announced = [line for line in ended.stdout.splitlines() if line.startswith("> platform: cpu")]
    assert len(announced) == 1
    assert "something else" in ended.stderr
    for package in ("Transformer Engine", "Apex", "transformer-engine"):
        assert package not in ended.stderr


def test_only_rank_0_announces() -> None:
    ended = _python("from more_megatron.platform import initialize_platform; initialize_platform()", RANK="1")
    assert ended.returncode == 0, ended.stderr
    assert "> platform" not in ended.stdout


_ON_CUDA = """
import torch
torch.cuda.is_available = lambda: True
from more_megatron.platform import Platform, initialize_platform
before = {name: value for name, value in vars(torch.cuda).items()}
tensor = (torch.Tensor.cuda, torch.Tensor.type)
assert initialize_platform() is Platform.CUDA
from more_megatron.platform.repairs.table import WHEEL_REPAIRS
assert all(vars(torch.cuda)[name] is value for name, value in before.items())
assert (torch.Tensor.cuda, torch.Tensor.type) == tensor
assert torch.ones(1).type() == "torch.FloatTensor"
assert torch.overrides._get_current_function_mode() is None
import sys
assert "more_megatron.platform.cuda.megatron" not in sys.modules
for entry in WHEEL_REPAIRS:
    replacement = entry.replacement.__func__ if isinstance(entry.replacement, staticmethod) else entry.replacement
    assert getattr(*entry.place()) is replacement
"""


def test_on_cuda_nothing_is_active_but_repairs() -> None:
    ended = _python(_ON_CUDA)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("> platform: cuda (nccl, ")
