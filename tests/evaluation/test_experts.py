"""Experts are told to take what they take, in every layer and step of every system with a router."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.evaluation.analysis.experts import PlaceStatistics, jaccard, mutual_information, routing_decisions
from more_megatron.evaluation.analysis.token_kinds import KINDS, TokenKinds
from more_megatron.evaluation.texts import batches, token_windows
from more_megatron.hf.exported.routing import MoRERouter
from tests.helpers.corpus import sample_text
from tests.hf.reference_models import SYSTEMS, random_model, tokens

_STEPS = 3


@pytest.mark.parametrize("variant", SYSTEMS)
def test_decisions_are_those_that_were_made(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, made = random_model(variant, moe_layers=[True, True]), tokens(), []
    original = MoRERouter.choose

    def record(router: MoRERouter, logits: torch.Tensor) -> Any:
        made.append(original(router, logits))
        return made[-1]

    for router in {type(module) for module in model.modules() if isinstance(module, MoRERouter)}:
        original = router.choose
        monkeypatch.setattr(router, "choose", record)
    with torch.no_grad():
        model(ids, num_steps=_STEPS)
    monkeypatch.undo()
    found = list(routing_decisions(model, ids, {"num_steps": _STEPS}))
    assert len(found) == len(made) >= model.config.num_hidden_layers
    assert len({(decision.layer, decision.step) for decision in found}) == len(found)
    for decision, (_, experts) in zip(found, made, strict=True):
        assert torch.equal(decision.experts, experts.flatten(0, 1)), (decision.layer, decision.step)
        torch.testing.assert_close(decision.probabilities.sum(-1), torch.ones(ids.numel()))


class _Tokenizer:
    """A tokenizer whose vocabulary is a list."""

    eos_token_id = 0
    all_special_ids = (0,)

    def __init__(self, *pieces: str) -> None:
        self._pieces = ("</s>", *pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self._pieces.index(piece) for piece in text.split("|")]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self._pieces[token] for token in ids]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (
            "\u2581the|\u2581pro|ject|.|\u25811|9|4|\u2581a|\u2581don|'|t",
            "word sub sub punct num num num single word punct single",
        ),
        ("\u0120the|\u0120un|re|lated|,|\u012019|42|\u010a|A", "word sub sub sub punct num num other single"),
        ("the|pro|##ject|##s", "word sub sub single"),
        ("\u2581|<0x0A>|<0x3C>|<0xE4>|\u2581x1|</s>|\u25813.5|\u2581-", "other other punct other word other num punct"),
    ],
)
def test_kinds(text: str, kinds: str) -> None:
    tokenizer = _Tokenizer(*dict.fromkeys(piece for piece in text.split("|") if piece != "</s>"))
    found = TokenKinds(tokenizer, len(tokenizer) + 4).of(tokenizer(text)["input_ids"])
    names = dict(zip(("num", "punct", "word", "sub", "single", "other"), KINDS, strict=True))
    assert [KINDS[kind] for kind in found] == [names[name] for name in kinds.split()]


def test_windows_are_the_whole_text() -> None:
    tokenizer = _Tokenizer("a", "b", "c")
    texts = ["a|b|c", "b", "c|c"]
    assert list(token_windows(tokenizer, texts, 4)) == [[1, 2, 3, 0], [2, 0, 3, 3], [0]]
    assert list(token_windows(tokenizer, texts, 4, limit=6)) == [[1, 2, 3, 0], [2, 0]]
    assert list(batches([[1, 2], [3, 4], [5, 6], [7]], 2)) == [[[1, 2], [3, 4]], [[5, 6]], [[7]]]


def test_measures_of_routing() -> None:
    assert mutual_information(np.eye(4) * 7) == pytest.approx(1.0)
    assert mutual_information(np.outer([1, 2, 3], [4, 5, 6, 7])) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(np.zeros((3, 4))) == 0.0
    # Two kinds, of which one is divided between two experts: H(K) = ln 2 = I, H(E) = 1.5 ln 2.
    assert mutual_information(np.array([[2, 0, 0], [0, 1, 1]])) == pytest.approx(1 / 1.25)
    first, second = torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.tensor([[1, 0], [3, 4], [2, 3]])
    assert torch.allclose(jaccard(first, second), torch.tensor([1.0, 1 / 3, 0.0]))


def test_statistics_of_a_place() -> None:
    from more_megatron.evaluation.analysis.experts import Decision

    experts = torch.tensor([[0], [0], [1], [2]])
    decision = Decision(0, 0, experts, torch.full((4, 4), 0.25))
    place = PlaceStatistics(len(KINDS), 2, 4)
    for _ in range(2):
        place.see(decision, np.array([0, 0, 2, 2]), np.array([0, -1, 1, 1]))
    summary = place.summary()
    assert summary["load"] == [0.5, 0.25, 0.25, 0.0]
    assert summary["router_entropy"] == pytest.approx(1.0)
    assert summary["load_entropy"] == pytest.approx(0.75)
    assert summary["shares"][0] == [1.0, 0.0, 0.0, 0.0]
    assert summary["shares"][2] == [0.0, 0.5, 0.5, 0.0]
    assert summary["token_shares"] == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]]


def _export(folder: Path, variant: str, **values: Any) -> None:
    """Write a model of random weights with a tokenizer, and a text."""
    from more_megatron.hf.conversion.architecture import config_from_args
    from more_megatron.hf.conversion.export import to_hf
    from tests.hf.conversion_sources import make_args, write_source
    from tests.hf.test_conversion_tokenizers import MODELS, train

    text = sample_text(40_000)
    train(text, folder / "model", **MODELS["ours"])
    (folder / "text").write_text(text[:3_000])
    run = {"more_variant": variant, "tokenizer_model": str(folder / "model"), "padded_vocab_size": 608}
    args = make_args(**run, init_method_std=0.2, **values)
    write_source(folder / "ckpt", config_from_args(args), args)
    to_hf(folder / "ckpt", folder / "hf", progress=False)


def test_a_text_is_analyzed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from more_megatron.evaluation.analysis.experts import analyze_experts
    from tools.analyze import parse_arguments

    _export(tmp_path, "recurrent_moe", moe_router_topk=2, moe_router_pre_softmax=False)
    line = f"experts --model {tmp_path}/hf --text {tmp_path}/text --output {tmp_path}/out --device cpu --num-steps 3"
    lines = analyze_experts(parse_arguments([*line.split(), "--max-tokens", "300"]))
    report = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert len(lines) == 2 + len(report["places"])
    assert [(place["layer"], place["step"]) for place in report["places"]] == [(x, y) for x in (0, 1) for y in range(3)]
    assert report["tokens"] == sum(report["kinds"].values()) == 300
    for place in report["places"]:
        assert sum(place["load"]) == pytest.approx(1.0)
        assert ("jaccard_with_step_before" in place) == (place["step"] > 0)
        by_kind = np.array(list(report["kinds"].values())) @ np.array(place["shares"]) / 300
        assert by_kind == pytest.approx(np.array(place["load"]))
    figures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert figures == {f"experts_{name}.png" for name in ("kinds", "overview", "load", "tokens")}
    with pytest.raises(MoREError, match="--num-steps 0 cannot be taken by"):
        analyze_experts(parse_arguments([*line.split(), "--num-steps", "0"]))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["moe_layers"] == [True, True]


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    from more_megatron.evaluation.analysis.experts import analyze_experts
    from tools.analyze import parse_arguments

    _export(tmp_path, "moe", moe_layer_freq=[0, 0])
    line = f"experts --model {tmp_path}/hf --text {tmp_path}/text --output {tmp_path}/out --device cpu"
    with pytest.raises(MoREError, match="has no layer with experts: there is nothing to see of its routers"):
        analyze_experts(parse_arguments(line.split()))
    with pytest.raises(MoREError, match=r"--num-steps has no effect on .*: it has no recurrence; leave the flag out"):
        _call_options(tmp_path / "hf")
    assert not (tmp_path / "out").exists()


def _call_options(folder: Path) -> None:
    from more_megatron.evaluation.exported_model import open_model
    from tools.analyze import parse_arguments

    line = f"experts --model {folder} --text absent --output absent --device cpu"
    with open_model(parse_arguments(line.split())) as exported:
        exported.call_options(2)
