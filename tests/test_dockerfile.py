"""The Dockerfile: hadolint accepts it, and its `RUN` lines keep the base's PyTorch whatever an index offers."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.shell import PROJECT, linter

_DOCKERFILE = PROJECT / "Dockerfile"
_PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
_BASE = {
    "torch": "2.12.0a0+5aff3928d8.nv26.4",
    "triton": "3.6.0",
    "transformer_engine": "2.14.0+4220403",
    "numpy": "2.1.0",
}
_MEGATRON_REQUIRES = ("torch>=2.6.0", "numpy", "packaging>=24.2")


@dataclass(frozen=True)
class _Image:
    """What the `RUN` lines run in: a Python environment without packages but for those that are put there."""

    folder: Path  # stands for `/opt`
    python: Path  # its Python
    index: Path  # folder of wheels that stands for PyPI

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line as the Dockerfile's shell does."""
        constraints = self.folder / "more-constraints.txt"
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'programs'}:{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONSTRAINT": str(constraints) if constraints.exists() else "",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "BUILD_APEX": "0",
        }
        shell = ["bash", "-euo", "pipefail", "-c", command]
        work = self.folder / "more"
        return subprocess.run(shell, cwd=work, env=environment, capture_output=True, text=True, timeout=120)

    def installed(self) -> dict[str, str]:
        """Return the version of each package."""
        listed = self.run("pip list --format freeze")
        assert listed.returncode == 0, listed.stderr
        return dict(line.split("==") for line in listed.stdout.splitlines())


def test_hadolint_accepts() -> None:
    found = subprocess.run([linter("hadolint"), _DOCKERFILE], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_lines_of_pip_keep_what_the_base_holds(tmp_path: Path) -> None:
    image = _image(tmp_path)
    for line in _run_lines(tmp_path):
        if "pip" in line or "constraints" in line:
            ended = image.run(line.replace('--editable ".[dev]"', "more-megatron[dev]"))
            assert ended.returncode == 0, f"{line}\n{ended.stdout}{ended.stderr}"
    installed = image.installed()
    assert installed.items() >= _BASE.items()
    assert installed["megatron-core"] == "0.19.2"
    assert {"transformers", "sentencepiece", "pytest", "pyarrow"} <= installed.keys()
    assert "apex" not in installed
    for name in ("apex", "torch==9999.0"):
        refused = image.run(f"pip install {name}")
        assert refused.returncode != 0
        assert "conflicting dependencies" in refused.stderr


def test_base_without_transformer_engine_is_refused(tmp_path: Path) -> None:
    image = _image(tmp_path, left_out=("transformer_engine",))
    ended = image.run(_run_lines(tmp_path)[0])
    assert ended.returncode != 0
    assert "the base image lacks {'transformer-engine'}" in ended.stderr


def test_base_is_dated_and_apex_pinned() -> None:
    text = _DOCKERFILE.read_text()
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.MULTILINE)
    assert re.search(r"^ARG APEX_REVISION=[0-9a-f]{40}$", text, re.MULTILINE)
    last_user = [line for line in text.splitlines() if line.startswith("USER ")][-1]
    assert last_user != "USER root"


def _run_lines(folder: Path) -> list[str]:
    """Return the commands of the `RUN` instructions, continued lines joined, with their files in `folder`."""
    joined = re.sub(r"\\\n\s*", "", _DOCKERFILE.read_text())
    joined = re.sub(r"/(?:opt|tmp)/(?=[\w-]+\.txt)", f"{folder}/", joined)
    return [line.removeprefix("RUN ") for line in joined.splitlines() if line.startswith("RUN ")]


def _image(folder: Path, left_out: Sequence[str] = ()) -> _Image:
    """Make an environment with the base's packages, and an index that offers newer ones, an apex among them."""
    for name in ("programs", "index", "base", "more"):
        (folder / name).mkdir()
    shutil.copy(PROJECT / "pyproject.toml", folder / "more")
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    # The pip of the tests' environment, working on the other one.
    _write_program(folder / "programs" / "pip", f'exec {sys.executable} -m pip --python {python} "$@"')
    _write_program(folder / "programs" / "python", f'exec {python} "$@"')
    _write_index(folder / "index")
    (packages,) = (folder / "environment" / "lib").glob("python*/site-packages")
    for name, version in _BASE.items():
        if name not in left_out:
            zipfile.ZipFile(_write_wheel(folder / "base", name, version)).extractall(packages)
    return _Image(folder, python, folder / "index")


def _write_program(path: Path, command: str) -> None:
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)


def _write_index(folder: Path) -> None:
    """Write a wheel for each package that the project asks for, and for those that must not get in."""
    extras = _PROJECT_TABLE["optional-dependencies"]
    requirements = [*_PROJECT_TABLE["dependencies"], *(line for lines in extras.values() for line in lines)]
    names = {re.split(r"[\[~=<>!]", line)[0] for line in requirements} - {"more-megatron", "megatron-core"}
    for name in names | {"transformer-engine", "triton", "packaging"}:
        _write_wheel(folder, name, "9999.0", ["torch", "numpy"] if name == "transformers" else ())
    _write_wheel(folder, "apex", "0.9.10.dev0")
    _write_wheel(folder, "megatron-core", "0.19.2", _MEGATRON_REQUIRES)
    own = [f"{line}; extra == '{extra}'" for extra, lines in extras.items() for line in lines]
    _write_wheel(folder, "more-megatron", "1.0", [*_PROJECT_TABLE["dependencies"], *own], extras)


def _write_wheel(
    folder: Path, name: str, version: str, requires: Sequence[str] = (), extras: Sequence[str] | dict = ()
) -> Path:
    """Write a wheel that holds nothing but its metadata."""
    stem = f"{re.sub('[-.]+', '_', name)}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {line}" for line in requires]
    files = {
        "METADATA": "\n".join(metadata) + "\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(f"{stem}.dist-info/{file}", text)
        record = "".join(f"{stem}.dist-info/{file},,\n" for file in [*files, "RECORD"])
        wheel.writestr(f"{stem}.dist-info/RECORD", record)
    return path
