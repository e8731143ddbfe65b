"""The example of inference and its benchmark run on every kind of model, and say what they should."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.shell import PROJECT
from tests.hf.reference_models import VOCABULARY, random_model
from tools import benchmark_inference


def _export(name: str, folder: Path) -> Path:
    """Write a model and a tokenizer whose tokens are numbers."""
    random_model(name, mean_recurrence=4).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", eos_token="0").save_pretrained(folder)
    return folder


def test_the_example(tmp_path: Path) -> None:
    export = _export("huginn", tmp_path)
    command = [sys.executable, "examples/inference.py", export, "--prompt", "1 2 3", "--new-tokens", "4"]
    found = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for title in ("Full depth, 4 steps", "Adaptive exit", "A cache of one step", "Warm start", "Self-speculation"):
        assert f"\n{title}" in found.stdout
    assert "relative change from step to step" in found.stdout
    assert "accepted in" in found.stdout


def test_the_benchmark(tmp_path: Path, capsys: Any) -> None:
    export, text = _export("huginn", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(" ".join(str(number % 37) for number in range(2000)))
    sizes = ["--windows", "2", "--length", "24", "--batch-size", "2", "--new-tokens", "4", "--num-steps", "4"]
    tables = _tables(export, text, sizes, capsys)
    assert list(tables) == ["Steps", "Adaptive exit", "Cache", "Warm start", "Self-speculation"]
    sizes_by_steps = {row.split(" | ")[0]: float(row.split(" | ")[1]) for row in tables["Cache"].split("\n| ")[1:]}
    assert sizes_by_steps["1"] * 4 == pytest.approx(sizes_by_steps["4"], rel=1e-3)


def test_the_benchmark_of_a_system_without_states_of_its_own(tmp_path: Path, capsys: Any) -> None:
    export, text = _export("recurrent_moe", tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(" ".join(str(number % 37) for number in range(200)))
    sizes = ["--windows", "1", "--length", "18", "--batch-size", "1", "--new-tokens", "2", "--num-steps", "2"]
    tables = _tables(export, text, sizes, capsys)
    assert tables["Cache"] == tables["Warm start"] == "This system has none.\n"


def _tables(export: Path, text: Path, sizes: list[str], capsys: Any) -> dict[str, str]:
    assert benchmark_inference.main([str(export), str(text), *sizes]) == 0
    return dict(part.split("\n\n", 1) for part in capsys.readouterr().out.split("\n## ")[1:])
