"""`make quickstart`, with fewer steps, and how it fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.corpus import sample_text
from tests.helpers.shell import PROJECT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: each finds what the one before left."""
    return tmp_path_factory.mktemp("quickstart")


def _quickstart(folder: Path, text: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/quickstart.py", "--folder", folder, "--train-iters", "10"]
    environment = {**os.environ, "WIKITEXT": str(text)}
    return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=400)


def test_missing_text_is_one_line(folder: Path) -> None:
    ended = _quickstart(folder, folder / "missing.txt")
    assert ended.returncode == 1
    assert ended.stderr == f"quickstart: error: input {folder}/missing.txt does not exist\n"


def test_failed_step_is_one_line_that_names_it_and_its_log(folder: Path) -> None:
    text = folder / "short.txt"
    text.write_text("To be, or not to be, that is the question.\n")
    ended = _quickstart(folder, text)
    assert ended.returncode == 1
    assert re.fullmatch(
        rf"quickstart: error: \[2/4\] .* failed: .*--vocab-size.*; its log is {folder}/logs/preprocess.log\n",
        ended.stderr,
    )


@pytest.mark.usefixtures("several_ranks")
def test_goes_all_the_way_and_what_it_proposes_works(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(400_000))
    ended = _quickstart(folder, text)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    steps = [int(number) for number in re.findall(r"iteration +(\d+)/10 \|", ended.stdout)]
    assert (steps[0], steps[-1]) == (1, 10)
    assert steps == sorted(set(steps)), "the resumed run did not continue where the first stopped"
    first, last = (float(re.search(rf"^  {row} +(\S+?),?\s", ended.stdout, re.MULTILINE)[1]) for row in _LOSSES)
    assert last < first

    deeper = re.search(r"^    bash (.*--skip-train.*)$", ended.stdout, re.MULTILINE)
    evaluated = subprocess.run(
        ["bash", *deeper[1].split()], cwd=PROJECT, capture_output=True, text=True, timeout=200, check=True
    )
    assert "validation loss at iteration 10" in evaluated.stdout + evaluated.stderr


_LOSSES = ("first training loss", "validation loss")
