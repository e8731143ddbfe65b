"""What the trainer's first look at a dataset finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from more_megatron.data import DatasetError, check_dataset, check_datasets
from more_megatron.data.indexed import read_index
from more_megatron.data.tokenizers import TokenizerOptions, tokenizer_sha256
from tests.data.conftest import run_tool, write_like_megatron


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, model_path: Callable[[str], str], corpus: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "in.txt").write_text("\n\n".join(corpus[:20]))
    result = run_tool(
        "--input",
        folder / "in.txt",
        "--output-prefix",
        folder / "d",
        "--tokenizer-model",
        model_path("bpe"),
        "--workers",
        1,
    )
    assert result.returncode == 0, result.stderr
    return folder / "d_text_document"


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    for end in (".bin", ".idx", ".json"):
        shutil.copy(f"{dataset}{end}", tmp_path)
    return tmp_path / dataset.name


def refused(prefix: Path, *words: str, **facts: object) -> None:
    with pytest.raises(DatasetError) as error:
        check_dataset(prefix, **facts)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sound_dataset(copy: Path, model_path: Callable[[str], str]) -> None:
    options = TokenizerOptions("SentencePieceTokenizer", model_path("bpe"))
    size = json.loads(Path(f"{copy}.json").read_text())["tokenizer"]["vocab_size"]
    check_dataset(copy, vocab_size=size, tokenizer_sha256=tokenizer_sha256(options))
    check_datasets([str(copy)])
    check_datasets(["0.3", str(copy), "0.7", str(copy)])


def test_missing_files(copy: Path) -> None:
    refused(Path(f"{copy}.bin"), "does not exist", "without .bin or .idx")
    Path(f"{copy}.bin").unlink()
    refused(copy, "_document.bin does not exist")
    with pytest.raises(DatasetError, match="does not exist"):
        check_datasets(["1", "nowhere"])


@pytest.mark.parametrize("keep", [0, 20, 34, 100, -1])
def test_truncated_index(copy: Path, keep: int) -> None:
    path = Path(f"{copy}.idx")
    path.write_bytes(path.read_bytes()[:keep])
    refused(copy, str(path), "truncated")


def test_damaged_index(copy: Path) -> None:
    path = Path(f"{copy}.idx")
    data = bytearray(path.read_bytes())
    path.write_bytes(b"X" + data[1:])
    refused(copy, "bad header")
    data[-8:] = (7).to_bytes(8, "little")
    path.write_bytes(data)
    refused(copy, "damaged")


def test_truncated_tokens(copy: Path) -> None:
    path = Path(f"{copy}.bin")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    refused(copy, str(path), "truncated", str(size), str(size - 10))


def test_another_tokenizer(copy: Path) -> None:
    refused(copy, "of 1500 tokens", "has 32000", vocab_size=32000)
    refused(copy, "another file", tokenizer_sha256="0" * 64)


def test_damaged_or_foreign_manifest(copy: Path) -> None:
    path = Path(f"{copy}.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "documents": 1}))
    refused(copy, "different runs")
    path.write_text("{")
    refused(copy, "damaged")


def test_dataset_of_megatrons_own_tool(tmp_path: Path) -> None:
    prefix = tmp_path / "theirs"
    write_like_megatron(str(prefix), ["abc", "", "de"], lambda text: [ord(letter) for letter in text], 0, np.int32)
    check_dataset(prefix, vocab_size=5, tokenizer_sha256="0" * 64)
    index = read_index(f"{prefix}.idx")
    assert index.lengths.tolist() == [4, 3]
    assert index.documents.tolist() == [0, 1, 1, 2]
    assert index.dtype == np.int32


def test_no_tokens(tmp_path: Path) -> None:
    write_like_megatron(str(tmp_path / "none"), [""], lambda text: [], 0, np.int32)
    refused(tmp_path / "none", "holds no tokens")
