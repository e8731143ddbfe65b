"""What states do over the steps: kinds of movement that are known beforehand, and the analysis of small models."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from more_megatron.errors import MoREError
from more_megatron.evaluation.analysis.health_page import draw_health, read_health
from more_megatron.evaluation.analysis.trajectories import Trajectories, distances_of_starts

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


def _moving(steps: int = 32) -> torch.Tensor:
    """Return states of four tokens that converge, orbit, slide, and stand still, [steps, 4, 3]."""
    time = torch.arange(steps, dtype=torch.float32)
    one = torch.ones(steps)
    return torch.stack(
        [
            torch.stack([1 + 0.8**time, one, one], 1),
            torch.stack([torch.cos(2 * time), torch.sin(2 * time), 5 * one], 1),
            torch.stack([0.2 * time, one, torch.sin(time) * 0.1], 1),
            torch.stack([one, 2 * one, 3 * one], 1),
        ],
        dim=1,
    )


def test_kinds_of_movement() -> None:
    states = _moving()
    assert Trajectories(states).kinds() == ["converging", "orbiting", "sliding", "converging"]
    assert Trajectories(states[:7]).kinds() is None


def test_distances_and_plane() -> None:
    states = _moving()
    found = Trajectories(states)
    assert found.distances()[-1].tolist() == [0.0] * 4
    assert found.distances()[0, 1] == pytest.approx(float((states[0, 1] - states[-1, 1]).norm() / states[-1, 1].norm()))
    plane, shares = found.plane()
    points = states.flatten(0, 1).double()
    left, values, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    assert shares == pytest.approx((values.square() / values.square().sum())[:2].tolist())
    assert np.abs(plane.reshape(-1, 2)) == pytest.approx((left * values)[:, :2].abs().numpy(), abs=1e-6)


def test_starts_that_are_forgotten() -> None:
    steps = torch.arange(5, dtype=torch.float32).view(1, 5, 1, 1)
    starts = torch.tensor([0.0, 3.0, 6.0]).view(3, 1, 1, 1)
    apart = distances_of_starts(torch.cat([starts * 0.5**steps, torch.full((3, 5, 1, 1), 100.0)], dim=-1))
    # The mean distance of two of three points that are 3 apart is 4.
    assert apart == pytest.approx([4 * 0.5**step / 100 for step in range(5)], rel=1e-2)


def _export(folder: Path, **fields: object) -> Path:
    """Write a small model with a tokenizer of characters, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from more_megatron.hf.exported.configuration_more import MoREConfig
    from more_megatron.hf.exported.modeling_more import MoREForCausalLM

    AutoConfig.register(MoREConfig.model_type, MoREConfig, exist_ok=True)
    characters = [chr(code) for code in range(32, 127)]
    tokenizer = Tokenizer(models.BPE({text: index for index, text in enumerate([*characters, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = MoREForCausalLM(MoREConfig(**sizes, intermediate_size=64, max_position_embeddings=64, **fields))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "starts"),
    [
        ({"variant": "huginn", "moe_layers": [False] * 3, "prelude_layers": 1, "coda_layers": 1}, True),
        ({"variant": "loop", "moe_layers": [False] * 3}, False),
    ],
)
def test_analysis_of_a_model(fields: dict, starts: bool, tmp_path: Path) -> None:
    import analyze

    text = tmp_path / "text.txt"
    text.write_text("The history of the world is the history of a few.\n")
    model, output = _export(tmp_path / "model", **fields), tmp_path / "out"
    flags = ["--text", str(text), "--output", str(output), "--num-steps", "12", "--max-tokens", "24"]
    assert analyze.main(["recurrence", "--model", str(model), *flags, "--device", "cpu"]) == 0
    report = json.loads((output / "recurrence.json").read_text())
    assert len(report["tokens"]) == 24
    assert [depth["num_steps"] for depth in report["depths"]] == [1, 2, 3, 4, 6, 8, 12]
    assert report["depths"][-1]["same_prediction_as_last"] == 1.0
    assert all(math.isfinite(depth["loss"]) for depth in report["depths"])
    [movement] = report["recurrences"]
    assert sum(movement["counts"].values()) == 24
    distances = np.array(movement["distance_to_last"])
    assert distances.shape == (24, 12)
    assert distances[:, 0].mean() > distances[:, -2].mean()
    independence = report["path_independence"]
    assert (independence is not None) == starts
    if independence is not None:
        assert independence["distance"][0][0] > independence["distance"][0][-1]
    for name in ("trajectories", "distance", "depth"):
        assert (output / f"recurrence_{name}.png").stat().st_size > 10_000


def _record(iteration: int, **figures: float) -> str:
    experts = {f"routing/layer 1/load/step {step}": {"load": [0.7, 0.3], "probability": [0.6, 0.4]} for step in (1, 2)}
    warnings = ["routing/load cv is 0.4 in layer 1, healthy is at most 0.3: uneven"] if iteration == 200 else []
    record = {"iteration": iteration, "figures": figures, "experts": experts, "expert gradients": {}}
    return json.dumps(record | {"warnings": warnings})


def test_page_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(MoREError, match=r"has no health\.jsonl"):
        read_health(tmp_path)
    lines = [
        _record(at, **{"loss/loss": 5 - at / 100, "recurrence/layer 1/relative change/step 2": 0.5})
        for at in (100, 200, 200)
    ]
    (tmp_path / "health.jsonl").write_text("\n".join(lines) + "\n")
    assert [record["iteration"] for record in read_health(tmp_path)] == [100, 200]
    warned, written = draw_health(tmp_path, tmp_path / "out")
    assert warned.startswith("iteration 200: routing/load cv is 0.4")
    assert written.endswith("health.png")
    assert (tmp_path / "out" / "health.png").stat().st_size > 10_000
    (tmp_path / "health.jsonl").write_text("{}\n")
    with pytest.raises(MoREError, match="line 1 is no JSON object with iteration"):
        read_health(tmp_path)
