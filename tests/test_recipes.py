"""docs/recipes.md cannot rot: each of its recipes runs, on what README.md leaves, with a small model."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

import pytest

from tests.helpers.corpus import sample_text
from tests.helpers.ranks import run_ranks
from tests.helpers.shell import PROJECT, calls_of, train_call, use

_README = (PROJECT / "README.md").read_text()
_BEFORE, *_SECTIONS = re.split(r"^## ", (PROJECT / "docs" / "recipes.md").read_text(), flags=re.MULTILINE)
_RECIPES = {section.partition("\n")[0]: section for section in _SECTIONS}
_SMALLER = (
    "--hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --eval-iters 1 --log-interval 1 --exit-interval 2"
)
# What needs a second, and what the others stand for as well.
_ALWAYS = ("A longer schedule", "Other data", "Fine-tuning with the Trainer of transformers")


def _blocks(text: str, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


def _definitions() -> str:
    """Return the lines of README.md that recipes build on: the flags of a run."""
    return "\n".join(re.findall(r"^\w+_ARGS=\(\n.*?^\)$", _README, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as README.md leaves it: a text, data, a checkpoint, an export; and the data of a recipe."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("data", "quickstart"):
        (folder / name).mkdir()
    (folder / "quickstart" / "text.txt").write_text(sample_text(200_000))
    commands = _blocks(_README.split("## One node")[1].split("## Several nodes")[0], "bash")
    (first,) = (call for call in calls_of(commands, folder) if call.program == "torchrun")
    assert [ended.code for ended in train_call(first, _SMALLER, folder)] == [0, 0]
    calls_of(_blocks(_RECIPES["Other data"], "bash").replace("\nrun ", "\n: "), folder)
    export = calls_of(_blocks(_README.split("## Hugging Face")[1].split("## The flags")[0], "bash"), folder)[0]
    use(export, "--no-progress", folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _ALWAYS else pytest.mark.matrix) for name in _RECIPES]
)
def test_recipe(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    exported = dict(re.findall(r"^export (\w+)=(\w+)$", _RECIPES[name], flags=re.MULTILINE))
    commands, program = _blocks(_RECIPES[name], "bash"), _blocks(_RECIPES[name], "python")
    assert commands or program
    for call in calls_of("\n".join((_definitions(), _blocks(_BEFORE, "bash"), commands)), folder):
        ranks = train_call(call, _SMALLER, folder, exported)
        output = "".join(ended.stdout + ended.stderr for ended in ranks)
        assert [ended.code for ended in ranks] == [0, 0], output[-3000:]
        assert "lm loss" in output
    if program:
        assert "train_loss" in run_ranks(1, _run, program, str(folder))[0]


def _run(program: str, folder: str) -> str:
    """Run a program in a folder and return what it prints."""
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(program, {"__name__": "__main__"})
    return output.getvalue()


def test_every_wish_has_a_recipe() -> None:
    assert len(_RECIPES) >= 13
    assert set(_ALWAYS) <= set(_RECIPES)
