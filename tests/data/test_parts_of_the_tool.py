"""Inspection and sample text."""

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from more_megatron.data.documents import Layout, sniff_layout
from more_megatron.data.tokenizers import TokenizerOptions, tokenizer_sha256
from more_megatron.errors import MoREError
from tests.data.conftest import ROOT, assert_one_line, run_tool
from tools import benchmark_preprocess as benchmark
from tools.sample_text import obtain_text, write_sample_text

INSPECT = ROOT / "tools" / "inspect_dataset.py"


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


def test_inspect(dataset: Path, corpus: list[str], model_path: Callable[[str], str]) -> None:
    model = ["--tokenizer-model", model_path("bpe_kept_spaces")]
    result = run_tool(dataset, "--document", 1, "--sample-tokens", 30, "--check", *model, tool=INSPECT)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(Path(f"{dataset}.json").read_text())
    assert "31 (1 empty)" in result.stdout
    assert f"{manifest['tokens'] / manifest['text_bytes']:.4f} tokens/byte" in result.stdout
    assert corpus[0][:20] in result.stdout
    assert "hashes as written" in result.stdout
    assert_one_line(run_tool(f"{dataset}x", tool=INSPECT), "does not exist")


def test_inspect_takes_a_tokenizer_beside_the_dataset_alone(dataset: Path, tmp_path: Path, corpus: list[str]) -> None:
    for end in (".bin", ".idx", ".json"):
        shutil.copy(f"{dataset}{end}", tmp_path / f"d{end}")
    manifest = json.loads((tmp_path / "d.json").read_text())
    assert "  ids [" in run_tool(tmp_path / "d", "--document", 1, tool=INSPECT).stdout
    beside = tmp_path / "my.model"
    shutil.copy(manifest["options"]["tokenizer"]["tokenizer_model"], beside)
    manifest["options"]["tokenizer"]["tokenizer_model"] = str(beside)
    (tmp_path / "d.json").write_text(json.dumps(manifest))
    assert corpus[0][:20] in run_tool(tmp_path / "d", "--document", 1, tool=INSPECT).stdout
    beside.write_bytes(beside.read_bytes() + b"\0")
    assert "  ids [" in run_tool(tmp_path / "d", "--document", 1, tool=INSPECT).stdout


@pytest.mark.parametrize("where", ["beside", "elsewhere", "hub"])
@pytest.mark.parametrize("flag", [[], ["--trust-remote-code"]])
def test_a_manifest_runs_no_code(where: str, flag: list[str], dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = data / "tokenizer" if where == "beside" else tmp_path / "tokenizer"
    folder.mkdir(parents=True)
    data.mkdir(exist_ok=True)
    for end in (".bin", ".idx", ".json"):
        shutil.copy(f"{dataset}{end}", data / f"d{end}")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer:\n    pass\n"
    (folder / "tokenization_x.py").write_text(code)
    config = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_x.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    options = TokenizerOptions("HuggingFaceTokenizer", "owner/name" if where == "hub" else str(folder))
    manifest = json.loads((data / "d.json").read_text())
    manifest["tokenizer"] |= {"type": options.tokenizer_type, "sha256": tokenizer_sha256(options)}
    stored = {"tokenizer_type": options.tokenizer_type, "tokenizer_model": options.tokenizer_model}
    manifest["options"]["tokenizer"] = {**stored, "trust_remote_code": True}
    (data / "d.json").write_text(json.dumps(manifest))
    result = run_tool(data / "d", "--document", 1, *flag, tool=INSPECT)
    assert not (tmp_path / "ran").exists()
    if where == "beside":
        assert_one_line(result, "cannot be built")
    else:
        assert "to see the text" in result.stdout


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
        raise MoREError("no network")

    monkeypatch.setattr("tools.sample_text.download", unreachable)
    described_again = obtain_text(tmp_path / "b.txt")
    assert described_again == described
    assert (tmp_path / "b.txt").read_bytes() == data
    assert "a.txt" in obtain_text(tmp_path / "c.txt", str(tmp_path / "a.txt"))
    assert (tmp_path / "c.txt").read_bytes() == data
    with pytest.raises(MoREError, match="does not exist"):
        obtain_text(tmp_path / "d.txt", str(tmp_path / "nothing"))


def test_both_sides_of_the_benchmark_agree(tmp_path: Path, corpus: list[str]) -> None:
    assert benchmark.write_corpus(iter(corpus), tmp_path / "in.jsonl", 0.3) >= 0.3
    options = benchmark.make_tokenizer("bpe-8k", tmp_path / "in.jsonl", tmp_path)
    ((ours, theirs),) = benchmark.compare(tmp_path / "in.jsonl", options, tmp_path, workers=2, runs=1)
    assert min(ours.cpu, ours.wall, theirs.cpu, theirs.wall) > 0


def test_unique_text_of_the_benchmark_does_not_repeat() -> None:
    documents = list(islice(benchmark.unique_documents(), 300))
    assert len(set(documents)) == len(documents) == 300
