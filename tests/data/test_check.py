"""What the trainer's first look at a dataset finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from more_megatron.data.check import check_dataset, check_hashes
from more_megatron.data.indexed import read_index
from more_megatron.data.tokenizers import TokenizerOptions, tokenizer_sha256
from more_megatron.errors import MoREError
from tests.data.conftest import ROOT, run_tool, write_like_megatron


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
    with pytest.raises(MoREError) as error:
        check_dataset(prefix, **facts)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sound_dataset(copy: Path, model_path: Callable[[str], str]) -> None:
    options = TokenizerOptions("SentencePieceTokenizer", model_path("bpe"))
    size = json.loads(Path(f"{copy}.json").read_text())["tokenizer"]["vocab_size"]
    check_dataset(copy, vocab_size=size, tokenizer_sha256=tokenizer_sha256(options))
    check_dataset(copy)


def test_missing_files(copy: Path) -> None:
    refused(Path(f"{copy}.bin"), "does not exist", "without .bin or .idx")
    Path(f"{copy}.bin").unlink()
    refused(copy, "_document.bin does not exist")
    refused(Path("nowhere"), "does not exist")


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


def entries(path: Path) -> tuple[bytearray, int, int, int]:
    """The bytes of an index, and where its lengths, pointers and documents begin."""
    data = bytearray(path.read_bytes())
    sequences = read_index(path).sequence_count
    return data, 34, 34 + 4 * sequences, 34 + 12 * sequences


@pytest.mark.parametrize(("section", "width"), [(1, 4), (2, 8), (3, 8)])
@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 0, 7])
@pytest.mark.parametrize("where", [0, 3, -1])
def test_index_damaged_in_the_middle(copy: Path, section: int, width: int, value: int, where: int) -> None:
    path = Path(f"{copy}.idx")
    data, *starts = entries(path)
    end = len(data) if section == 3 else starts[section]
    place = starts[section - 1] + width * where if where >= 0 else end - width
    old = bytes(data[place : place + width])
    data[place : place + width] = value.to_bytes(width, "little", signed=True)
    if data[place : place + width] == old:
        pytest.skip("the value that stands there")
    path.write_bytes(data)
    Path(f"{copy}.json").unlink()
    with pytest.raises(MoREError, match=r"is damaged|of another dataset|is truncated"):
        check_dataset(copy)


def test_every_kind_of_flip_in_the_index_is_found(copy: Path) -> None:
    path = Path(f"{copy}.idx")
    sound = path.read_bytes()
    for bit in range(0, 8 * len(sound), 7):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(MoREError):
            check_dataset(copy)


def test_files_of_other_datasets(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_like_megatron(str(other), ["abc", "", "de"], lambda text: [ord(letter) for letter in text], 0, np.uint16)
    bin_bytes = Path(f"{copy}.bin").read_bytes()
    shutil.copy(f"{other}.idx", f"{copy}.idx")
    refused(copy, "of another dataset than its index")
    shutil.copy(f"{other}.bin", f"{copy}.bin")
    refused(copy, "different runs", "documents")
    Path(f"{copy}.bin").write_bytes(bin_bytes + b"\0\0")
    refused(copy, "of another dataset than its index", str(len(bin_bytes) + 2))


def test_other_dtype_than_the_manifest_says(copy: Path) -> None:
    path = Path(f"{copy}.idx")
    data = bytearray(path.read_bytes())
    data[17] = 3  # int16 instead of uint16
    path.write_bytes(data)
    refused(copy, "int16 for dtype", "uint16")
    data[17] = 4  # int32: the pointers are those of two bytes a token
    path.write_bytes(data)
    refused(copy, "damaged")


def test_ids_above_the_vocabulary(copy: Path) -> None:
    tokens = np.fromfile(f"{copy}.bin", np.uint16)
    tokens[len(tokens) // 2] = 1500
    tokens.tofile(f"{copy}.bin")
    refused(copy, f"token {len(tokens) // 2} is 1500", "vocabulary has 1500")


def test_hashes_on_demand(copy: Path) -> None:
    assert check_hashes(copy) == "hashes as written"
    tokens = np.fromfile(f"{copy}.bin", np.uint16)
    tokens[5] ^= 1
    tokens.tofile(f"{copy}.bin")
    check_dataset(copy)
    with pytest.raises(MoREError, match="hash differs"):
        check_hashes(copy)
    result = run_tool(copy, "--check", tool=ROOT / "tools" / "inspect_dataset.py")
    assert result.returncode == 1
    assert "hash differs" in result.stderr


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
    broken: list[object] = [[], {**manifest, "tokenizer": []}, {**manifest, "documents": "9"}]
    broken += [{**manifest, "sha256": 1}, {**manifest, "tokenizer": {**manifest["tokenizer"], "vocab_size": "many"}}]
    for contents in broken:
        path.write_text(json.dumps(contents))
        refused(copy, "no manifest of a dataset")


def test_dataset_of_megatrons_own_tool(tmp_path: Path) -> None:
    prefix = tmp_path / "theirs"
    write_like_megatron(str(prefix), ["abc", "", "de"], lambda text: [ord(letter) for letter in text], 0, np.int32)
    check_dataset(prefix, vocab_size=128, tokenizer_sha256="0" * 64)
    refused(prefix, "token 2 is 99", "vocabulary has 99", vocab_size=99)
    index = read_index(f"{prefix}.idx")
    assert index.lengths.tolist() == [4, 3]
    assert index.documents.tolist() == [0, 1, 1, 2]
    assert index.dtype == np.int32


def test_no_tokens(tmp_path: Path) -> None:
    write_like_megatron(str(tmp_path / "none"), [""], lambda text: [], 0, np.int32)
    refused(tmp_path / "none", "holds no tokens")
