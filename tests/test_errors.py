"""A run that fails over something the user can mend ends with one line."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from more_megatron.errors import OneLineParser

_ROOT = Path(__file__).parents[1]


def _raise(statement: str, continuation: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"""
from more_megatron.errors import MoREError, one_line_errors
with one_line_errors("program"{continuation}):
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


def test_what_nobody_foresaw_is_one_line_with_its_source_and_a_remedy() -> None:
    line = "program: error: wrong value (ValueError at <string>:4; MORE_TRACEBACK=1 shows the way there)\n"
    assert _raise("raise ValueError('wrong value')").stderr == line
    ended = _raise("import json; json.loads.nothing")
    assert "error: 'function' object has no attribute 'nothing' (AttributeError at" in ended.stderr
    ended = _raise("assert False")
    assert ended.stderr.startswith("program: error: ")
    assert "(AssertionError at" in ended.stderr
    assert ended.returncode == 1
    assert "lower a size or --micro-batch-size" in _raise("raise MemoryError('Unable to allocate 9 TiB')").stderr
    assert _raise("open('/no/such')").stderr == "program: error: /no/such: No such file or directory\n"
    unsafe = _raise("raise RuntimeError('Weights only load failed. Re-running with weights_only=False will succeed')")
    assert "it is damaged, or holds more than data and could run code (RuntimeError at" in unsafe.stderr
    assert (
        "Traceback"
        not in _raise("raise RuntimeError('a\\nTraceback (most recent call last):\\n b\\nKeyError: 1')").stderr
    )


def test_content_that_is_wrong_is_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"{\xff")
    for read in ("Path(file).read_text()", "json.load(open(file, errors='replace'))"):
        ended = _raise(f"from pathlib import Path; import json; file = '{tmp_path}/text'; {read}")
        assert ended.stderr.startswith(f"program: error: {tmp_path}/text: ")
        assert ended.stderr.count("\n") == 1


def test_values_that_are_empty() -> None:
    parser = OneLineParser(prog="program")
    command = parser.add_subparsers().add_parser("command")
    command.add_argument("--prefix", type=Path)
    command.add_argument("--flags", default="")
    assert parser.parse_args(["command", "--flags", ""]).flags == ""
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(io.StringIO()) as said:
        parser.parse_args(["command", "--prefix", ""])
    assert ended.value.code == 2
    assert "program command: error: argument --prefix: is empty: give it a value or leave it out" in said.getvalue()


def test_a_full_disk_is_named_after_the_file(tmp_path: Path) -> None:
    for write in ("file.write('x'); file.flush()", "import numpy; numpy.zeros(9000).tofile(file)"):
        ended = _raise(f"file = open('/dev/full', 'w'); {write}")
        assert ended.stderr.startswith("program: error: /dev/full: ")
        assert ended.stderr.endswith("; make room and start the same command again\n")
        assert ended.stderr.count("\n") == 1
    (tmp_path / "start.log").symlink_to("/dev/full")
    start = "from more_megatron.console import quiet_start, write_start_to; quiet_start(); print('a')"
    ended = _raise(f"{start}; write_start_to('{tmp_path}')")
    assert f"error: {tmp_path}/start.log: No space left on device" in ended.stderr


def test_an_interruption_says_how_to_go_on() -> None:
    ended = _raise("raise KeyboardInterrupt", ", lambda: ': the same command goes on'")
    assert (ended.returncode, ended.stderr) == (130, "program: interrupted: the same command goes on\n")


def test_exit_codes_of_the_program_itself_are_left() -> None:
    assert _raise("raise SystemExit(3)").returncode == 3


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
