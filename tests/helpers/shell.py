"""Runs shell scripts with stand-ins for their programs, and what they would have launched on ranks of the tests.

A script is run by bash as it is. `torchrun`, `make` and `sbatch` only write down how they were called; `python` is
real, but trains tokenizers of 400 pieces, and writes down tools that need what `torchrun` would have saved. Calls of
`torchrun` can then be given to `parse`, or to `train_call`, those of tools to `use`.
"""

import functools
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.program import Ended, pretrain_more
from tests.helpers.ranks import run_ranks

PROJECT = Path(__file__).resolve().parents[2]

_RECORDER = """#!{python}
import json, os, sys
with open(os.environ["MORE_TEST_CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
_PYTHON = """#!/bin/sh
case "$*" in
    *--train-tokenizer*) set -- "$@" --vocab-size 400 ;;
    tools/convert_checkpoint.py*|tools/evaluate.py*|tools/analyze.py*)
        tool=$(basename "$1" .py); shift; exec "$tool" "$@" ;;
esac
exec {python} "$@"
"""
_ENTRY_POINT = "pretrain_more.py"


# Tools, as in the script above.
_NEED_CHECKPOINTS = ("convert_checkpoint", "evaluate", "analyze")


@dataclass(frozen=True)
class Call:
    """How a script called a program."""

    program: str  # `torchrun`, `make`, `sbatch` or a tool that needs a checkpoint
    arguments: list[str]  # its arguments

    @property
    def flags(self) -> list[str]:
        """The flags of `pretrain_more.py` in a call of `torchrun`."""
        return self.arguments[self.arguments.index(_ENTRY_POINT) + 1 :]

    @property
    def ranks_of_node(self) -> int:
        """Ranks that `torchrun` would start here."""
        return int(self._launcher_value("--nproc-per-node", "1"))

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.ranks_of_node * int(self._launcher_value("--nnodes", "1"))

    def value(self, flag: str) -> str:
        """Return the value of a flag of the program or its launcher."""
        return self.arguments[self.arguments.index(flag) + 1]

    def _launcher_value(self, flag: str, default: str) -> str:
        launcher = self.arguments[: self.arguments.index(_ENTRY_POINT)]
        return launcher[launcher.index(flag) + 1] if flag in launcher else default


def linter(name: str) -> str:
    """Path of a linter, which `make` installs beside Python. Skips the test where it is neither there nor in PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def calls_of(
    script: str, folder: Path, variables: Mapping[str, str] | None = None, vocabulary: int = 400
) -> list[Call]:
    """Run a script in a folder and return its calls of programs that only write them down, in order.

    Args:
        script: Text of the script.
        folder: Where it runs: a folder of the test's, with the project's files linked into it.
        variables: Environment variables it finds.

    Raises:
        AssertionError: If it fails.
    """
    programs, record = folder / ".programs", folder / ".calls"
    _link_project(folder)
    programs.mkdir(exist_ok=True)
    record.write_text("")
    recorded = dict.fromkeys(("torchrun", "make", "sbatch", *_NEED_CHECKPOINTS), _RECORDER)
    for name, text in {**recorded, "python": _PYTHON}.items():
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        **(variables or {}),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "MORE_TEST_CALLS": str(record),
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    return [Call(words[0], words[1:]) for words in map(json.loads, record.read_text().splitlines())]


def parse(call: Call, folder: Path) -> None:
    """Check the flags of a call as the program does in a world of that size, without starting it.

    Args:
        call: A call of `torchrun`.
        folder: Where relative paths begin.

    Raises:
        AssertionError: If a flag is wrong.
    """
    run_ranks(1, _parse_in_world_of, call.flags, call.world_size, str(folder))


def train_call(call: Call, smaller: str, folder: Path, environment: Mapping[str, str] | None = None) -> list[Ended]:
    """Run a call on ranks of the tests.

    Args:
        call: A call of `torchrun` on one node.
        smaller: Flags that take precedence over those of the call.
        folder: Where relative paths begin.
        environment: Variables that the script has set for it.
    """
    command_line = f"{shlex.join(call.flags)} {smaller}"
    return pretrain_more(call.ranks_of_node, command_line, environment, functools.partial(os.chdir, folder))


def use(call: Call, smaller: str, folder: Path) -> None:
    """Run a tool.

    Args:
        call: A call of a tool that needs a checkpoint.
        smaller: Flags that take precedence over those of the call.
        folder: Where relative paths begin.

    Raises:
        AssertionError: If it fails.
    """
    run_ranks(1, _use, call.program, [*call.arguments, *smaller.split()], str(folder))


def _use(tool: str, arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    assert importlib.import_module(f"tools.{tool}").main(arguments) == 0


def _link_project(folder: Path) -> None:
    for name in ("tools", "examples", _ENTRY_POINT, "Makefile"):
        if not (folder / name).exists():
            (folder / name).symlink_to(PROJECT / name)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.touch()


def _parse_in_world_of(flags: list[str], world_size: int, folder: str) -> None:
    from more_megatron.platform import initialize_platform
    from more_megatron.training.arguments import parse_arguments
    from more_megatron.training.model import model_config_from_args

    os.chdir(folder)
    os.environ["WORLD_SIZE"] = str(world_size)
    sys.argv = [_ENTRY_POINT, *flags]
    model_config_from_args(parse_arguments(initialize_platform()))
