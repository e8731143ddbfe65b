"""The harness runs on an exported model as it is, and its number is ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from more_megatron.hf.conversion.architecture import config_from_args
from more_megatron.hf.conversion.export import ToHF, to_hf
from more_megatron.hf.conversion.tokenizer_files import open_tokenizer
from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from tests.helpers.shell import PROJECT
from tests.hf.conversion_sources import make_args, write_source
from tests.hf.test_conversion_tokenizers import MODELS, train
from tools.sample_text import write_sample_text

_SCRIPT = PROJECT / "examples" / "evaluate_hf.sh"
_WINDOW, _VOCABULARY, _STEPS = 16, 608, 3


def test_bash_accepts() -> None:
    subprocess.run(["bash", "-n", _SCRIPT], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if shellcheck.is_file():
        found = subprocess.run([shellcheck, "-x", _SCRIPT], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_perplexity_of_a_file_is_that_of_a_direct_computation(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    write_sample_text(tmp_path / "text")
    text = (tmp_path / "text").read_text()[:60_000]
    train(text, tmp_path / "model", **MODELS["ours"])
    text = text[-2_000:]
    (tmp_path / "text").write_text(text)
    args = make_args(more_variant="recurrent_moe", tokenizer_model=str(tmp_path / "model"), init_method_std=0.2)
    write_source(tmp_path / "ckpt", config_from_args(args, _VOCABULARY), args)
    to_hf(ToHF(tmp_path / "ckpt", tmp_path / "hf", progress=False))
    command = ["bash", _SCRIPT, tmp_path / "hf", tmp_path / "text", "--output_path", tmp_path / "results"]
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "home"),
        "NUM_STEPS": str(_STEPS),
    }
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    (results,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(results.read_text())["results"]["more_text"]
    assert found["bits_per_byte,none"] == pytest.approx(_bits(tmp_path / "hf", text), rel=1e-5)


@torch.no_grad()
def _bits(folder: Path, text: str) -> float:
    """Return bits a byte: each token once, in windows as the harness makes them."""
    model = MoREForCausalLM.from_pretrained(folder).eval()
    tokenizer = open_tokenizer(folder)
    tokens = tokenizer(text)["input_ids"]
    total, before = 0.0, [tokenizer.eos_token_id, *tokens]
    for start in range(0, len(tokens), _WINDOW):
        labels = tokens[start : start + _WINDOW]
        # The last window is filled up from the front.
        first = max(0, start + len(labels) - _WINDOW)
        inputs = before[first : start + len(labels)]
        logits = model(torch.tensor([inputs]), num_steps=_STEPS).logits[0, -len(labels) :]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
    return total / len(text.encode()) / math.log(2.0)
