"""What `test_contributing.py` does with the example system inside a copy of the project."""

import tempfile
from pathlib import Path

import pytest

from more_megatron.systems import names
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY

_SYSTEM = "sure_moe"


def main() -> None:
    """Train, resume under another layout, export, compare, and run the example's own test."""
    assert _SYSTEM in names()
    with tempfile.TemporaryDirectory() as folder:
        run = f"{TINY} --num-layers 2 --train-iters 4 --moe-router-topk 2"
        ours = f"{run} --more-variant {_SYSTEM}"
        saving = f"{ours} --save {folder}/run --save-interval 2"
        (whole, baseline) = run_ranks(1, train_all, [saving, f"{run} --more-variant moe"])[0]
        assert whole.losses != baseline.losses, "the example's router changes nothing"
        layout = "--expert-model-parallel-size 2"
        (resumed,) = run_ranks(2, train_all, [f"{ours} {layout} --load {folder}/run --ckpt-step 2"])[-1]
        assert resumed.losses == pytest.approx(whole.losses[2:], rel=1e-5)
        (said,) = run_ranks(1, _convert, folder)
        print("\n".join(said))
    pytest.main(["-q", f"tests/systems/test_{_SYSTEM}.py"])


def _convert(folder: str) -> list[str]:
    """Convert there and back, both verified: logits against Megatron's, tensors bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM

    from more_megatron.hf.conversion.export import to_hf
    from more_megatron.hf.conversion.importer import from_hf

    place = Path(folder)
    said = to_hf(place / "run", place / "hf", verify=True, progress=False)
    said += from_hf(place / "hf", place / "back", verify=True, progress=False)
    assert any("differ from Megatron's by" in line for line in said), said
    model = AutoModelForCausalLM.from_pretrained(place / "hf", trust_remote_code=True)
    assert torch.isfinite(model(torch.arange(8).unsqueeze(0)).logits).all()
    return said
