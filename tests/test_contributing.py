"""The system that CONTRIBUTING.md adds as an example: added to a copy of the project, trained, resumed and exported."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.shell import PROJECT

_BLOCK = re.compile(r"^```python\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_DRIVER = """
from more_megatron.platform import initialize_platform
initialize_platform()
from tests.contributing_driver import main
if __name__ == "__main__":
    main()
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project with the files of the example."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("more_megatron", "tests", "pretrain_more.py", "pyproject.toml"):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    blocks = _BLOCK.findall((PROJECT / "CONTRIBUTING.md").read_text())
    assert [path.rpartition("/")[0] for path, _ in blocks] == [
        "more_megatron/systems",
        "more_megatron/hf/exported",
        "tests/systems",
    ]
    for path, text in blocks:
        assert not (copy / path).exists()
        (copy / path).write_text(text)
    return copy


def test_example_system_trains_resumes_exports_computes_the_same_and_passes_its_test(copy: Path) -> None:
    environment = {**os.environ, "MORE_PLATFORM": "cpu", "PYTHONPATH": str(copy)}
    run = subprocess.run(
        [sys.executable, "-c", _DRIVER], cwd=copy, env=environment, text=True, capture_output=True, timeout=500
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "sure_moe" in run.stdout
    assert "1 passed" in run.stdout
