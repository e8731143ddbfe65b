"""Inspection, sample text, normalisation tables, benchmark."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from more_megatron.data import DataError
from more_megatron.data.benchmark import Side, compare, make_corpus
from more_megatron.data.charsmap import read_rules
from more_megatron.data.documents import Layout, sniff_layout
from more_megatron.data.sample_text import obtain_text, write_sample_text
from more_megatron.data.tokenizers import TokenizerOptions
from tests.data.conftest import ROOT, assert_one_line, run_tool

INSPECT = ROOT / "tools" / "inspect_dataset.py"
BENCHMARK = ROOT / "tools" / "benchmark_preprocess.py"


def rules_of(path: str) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(path).read_bytes())
    table: bytes = proto.normalizer_spec.precompiled_charsmap
    return table


def test_rules_of_the_usual_normalisation(model_path: Callable[[str], str]) -> None:
    rules = read_rules(rules_of(model_path("bpe")))
    assert rules.keeps_space
    assert set(rules.blanks) == set(b"\t\n\f\r")
    assert not {0x20, 0x09, 0x0A} & rules.inner_bytes
    # Combining marks stand behind letters in left sides.
    assert 0xCC in rules.inner_bytes
    assert rules.plain == read_rules(b"").plain == bytes(range(0x21, 0x7F))
    assert read_rules(b"").keeps_space


@pytest.mark.parametrize(
    ("rule", "keeps_space", "inner"),
    [("61 20\t62", True, True), ("20 61\t62", False, False), ("20\t5F", False, False)],
)
def test_rules_with_spaces(rule: str, keeps_space: bool, inner: bool, tmp_path: Path, corpus: list[str]) -> None:
    (tmp_path / "rules.tsv").write_text(f"{rule}\n41\t61\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[0].split("\n")), model_prefix=str(tmp_path / "m"), vocab_size=120,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"), model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    rules = read_rules(rules_of(str(tmp_path / "m.model")))
    assert rules.keeps_space == keeps_space
    assert (0x20 in rules.inner_bytes) == inner
    assert (b"a" in rules.plain) == (not rule.startswith("61"))
    assert b"A" not in rules.plain


def test_damaged_rules() -> None:
    with pytest.raises(DataError, match="damaged"):
        read_rules(b"\xff\xff\xff\x7f")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], str], corpus: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ["", *corpus[:30]])
    (folder / "in.jsonl").write_text(lines)
    result = run_tool(
        "--input",
        folder / "in.jsonl",
        "--output-prefix",
        folder / "d",
        "--tokenizer-model",
        model_path("bpe_kept_spaces"),
    )
    assert result.returncode == 0, result.stderr
    return folder / "d_text_document"


def test_inspect(dataset: Path, corpus: list[str]) -> None:
    result = run_tool(dataset, "--document", 1, "--sample-tokens", 30, tool=INSPECT)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(Path(f"{dataset}.json").read_text())
    assert "31 (1 empty)" in result.stdout
    assert f"{manifest['tokens'] / manifest['text_bytes']:.4f} tokens/byte" in result.stdout
    assert corpus[0][:20] in result.stdout
    assert_one_line(run_tool(f"{dataset}x", tool=INSPECT), "does not exist")


def test_inspect_without_manifest(dataset: Path, tmp_path: Path, model_path: Callable[[str], str]) -> None:
    for end in (".bin", ".idx"):
        (tmp_path / f"d{end}").write_bytes(Path(f"{dataset}{end}").read_bytes())
    result = run_tool(tmp_path / "d", "--document", 1, tool=INSPECT)
    assert "manifest   none" in result.stdout
    assert "  ids [" in result.stdout
    model = model_path("bpe_kept_spaces")
    assert "  ids [" not in run_tool(tmp_path / "d", "--document", 1, "--tokenizer-model", model, tool=INSPECT).stdout


def test_sample_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = write_sample_text(tmp_path / "a.txt")
    assert "Python" in described
    data = (tmp_path / "a.txt").read_bytes()
    assert 1_000_000 < len(data) < 3_000_000
    assert sniff_layout(data) is Layout.WIKITEXT

    def unreachable(name: str) -> list[str]:
        raise DataError("no network")

    monkeypatch.setattr("more_megatron.data.sample_text.download", unreachable)
    described_again = obtain_text(tmp_path / "b.txt")
    assert described_again == described
    assert (tmp_path / "b.txt").read_bytes() == data
    assert "a.txt" in obtain_text(tmp_path / "c.txt", str(tmp_path / "a.txt"))
    assert (tmp_path / "c.txt").read_bytes() == data
    with pytest.raises(DataError, match="does not exist"):
        obtain_text(tmp_path / "d.txt", str(tmp_path / "nothing"))


def test_both_sides_of_the_benchmark_agree(tmp_path: Path, model_path: Callable[[str], str], corpus: list[str]) -> None:
    (tmp_path / "in.txt").write_text("\n\n".join(corpus[:40]))
    make_corpus(str(tmp_path / "in.txt"), tmp_path / "in.jsonl", 0.5)
    options = TokenizerOptions("SentencePieceTokenizer", model_path("bpe"))
    timings = compare(str(BENCHMARK), tmp_path / "in.jsonl", options, tmp_path, workers=2, runs=1)
    assert timings[Side.OURS].tokens == timings[Side.ONE_BY_ONE].tokens > 0
