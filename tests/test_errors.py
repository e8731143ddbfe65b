"""A run that fails over something the user can mend ends with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def _raise(statement: str, expected: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"""
from more_megatron.errors import MoREError, one_line_errors
with one_line_errors("program"{expected}):
    {statement}
print("after")
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_one_line_and_exit_code() -> None:
    ended = _raise("raise MoREError('a  message\\n over lines')")
    assert ended.returncode == 1
    assert ended.stderr == "program: error: a message over lines\n"
    assert ended.stdout == ""


def test_further_errors_are_expected_by_request() -> None:
    assert _raise("raise KeyError('x')").stderr.startswith("Traceback")
    assert _raise("raise ValueError('wrong value')", ", Exception").stderr == "program: error: wrong value\n"


def test_error_without_text_names_its_source() -> None:
    ended = _raise("import json; json.loads.nothing", ", Exception")
    assert "program: error: 'function' object has no attribute 'nothing'" in ended.stderr
    ended = _raise("assert False", ", Exception")
    assert ended.stderr.startswith("program: error: AssertionError")
    assert ended.returncode == 1


def test_traceback_on_request() -> None:
    ended = _raise("raise MoREError('message')", MORE_TRACEBACK="1")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")


def test_every_rank_ends_with_the_error() -> None:
    ended = _raise("raise MoREError('message')", RANK="1")
    assert (ended.returncode, ended.stderr) == (1, "program: error: message\n")


def test_nothing_happens_without_an_error() -> None:
    ended = _raise("pass")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "after\n", "")
