"""The indexed dataset on disk: what the two files of a prefix hold, read and written without importing torch.

Megatron's own writer keeps every length and pointer in Python lists and takes seconds to import.

`P.bin` is the token ids of all documents, end to end. `P.idx` is, little-endian: 9 bytes of magic, version (u64),
dtype code (u8), sequence count S and document count D + 1 (u64 each), then the length of each sequence
(int32 [S], tokens), its place in `P.bin` (int64 [S], bytes), and the first sequence of each document with a closing
entry (int64 [D + 1]). The layout is that of `megatron/core/datasets/indexed_dataset.py`.
"""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from more_megatron.errors import MoREError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = dict(enumerate(map(np.dtype, ["u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"]), 1))
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# From this vocabulary size on Megatron stores int32 (DType.optimal_dtype).
_UINT16_VOCABULARY = 65500
_CHUNK = 1 << 20

MANIFEST_VERSION = 2
"""Version 1 had no hashes of the files and no count of skipped lines."""

# Fields on whose types the checks and tools rely.
_FIELDS: dict[str, type] = {"documents": int, "tokens": int, "text_bytes": int, "words": int, "dtype": str}
_GROUPS: dict[str, type] = {"tokenizer": dict, "options": dict, "sha256": dict}
_TOKENIZER: dict[str, type] = {"type": str, "model": str, "sha256": str, "vocab_size": int, "eod": int}


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Path of the token file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Path of the index file of a dataset prefix."""
    return Path(f"{os.fspath(prefix)}.idx")


def manifest_path(prefix: str | os.PathLike[str]) -> str:
    """Return the path of the manifest of a dataset prefix."""
    return f"{os.fspath(prefix)}.json"


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores tokens in for a vocabulary of this size."""
    return np.dtype(np.uint16) if vocab_size < _UINT16_VOCABULARY else np.dtype(np.int32)


@dataclass(frozen=True)
class IndexFile:
    """The contents of an `.idx` file, memory-mapped."""

    dtype: np.dtype  # dtype of the tokens in the `.bin` file
    lengths: NDArray[np.int32]  # tokens of each sequence, int32 [S]
    pointers: NDArray[np.int64]  # byte offset of each sequence in the `.bin` file, int64 [S]
    documents: NDArray[np.int64]  # first sequence of each document and a closing entry, int64 [D + 1]

    @property
    def sequence_count(self) -> int:
        """Number of sequences S."""
        return len(self.lengths)

    @property
    def document_count(self) -> int:
        """Number of documents D, empty ones included."""
        return len(self.documents) - 1

    @property
    def bin_bytes(self) -> int:
        """Bytes of the `.bin` file."""
        return int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize


def read_index(path: str | os.PathLike[str]) -> IndexFile:
    """Map an `.idx` file, whoever wrote it, and check it as a whole.

    Raises:
        MoREError: The file is not an index, is of another version or size than its header says, or its entries do
            not lead from document to document and from sequence to sequence without a gap.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise MoREError(f"{path} is truncated: {size} bytes are less than its header; preprocess again")
    magic, version, code, sequences, entries = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or code not in _DTYPES or entries < 1:
        raise MoREError(f"{path} is damaged or is not a Megatron index (bad header); preprocess again")
    # A multimodal index carries one byte more for each sequence.
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if size not in (expected, expected + sequences):
        state = "truncated" if size < expected else "damaged"
        raise MoREError(f"{path} is {state}: {size} bytes, its header says {expected}; preprocess again")
    data = np.memmap(path, mode="r", dtype=np.uint8)
    lengths_end = _HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    index = IndexFile(
        dtype=_DTYPES[code],
        lengths=np.frombuffer(data, np.int32, sequences, _HEADER.size),
        pointers=np.frombuffer(data, np.int64, sequences, lengths_end),
        documents=np.frombuffer(data, np.int64, entries, pointers_end),
    )
    if fault := _fault(index):
        raise MoREError(f"{path} is damaged: {fault}; preprocess again")
    return index


def _fault(index: IndexFile) -> str | None:
    """What is wrong with an index, some entries at a time so that memory does not follow its size."""
    place = 0
    for start in range(0, index.sequence_count, _CHUNK):
        lengths = index.lengths[start : start + _CHUNK].astype(np.int64) * index.dtype.itemsize
        ends = np.cumsum(lengths) + place
        wrong = (lengths < 0) | (index.pointers[start : start + _CHUNK] != ends - lengths)
        if wrong.any():
            return f"sequence {start + int(wrong.argmax())} does not begin where the one before it ends"
        place = int(ends[-1])
    for start in range(0, index.document_count, _CHUNK):
        steps = np.diff(index.documents[start : start + _CHUNK + 1])
        if (steps < 0).any():
            return f"document {start + int((steps < 0).argmax())} ends before it begins"
    if index.documents[0] != 0 or index.documents[-1] != index.sequence_count:
        return "its documents do not cover its sequences"
    return None


def write_index(stream: IO[bytes], dtype: np.dtype, lengths: NDArray[np.int32]) -> None:
    """Write an `.idx` file from the tokens of each document, int32 [documents], which may be memory-mapped.

    The lengths are gone through once for each array of the index, so that memory does not grow with the corpus. A
    document without tokens has no sequence, as in Megatron's own tool.
    """
    chunks = [lengths[start : start + _CHUNK] for start in range(0, len(lengths), _CHUNK)]
    sequences = sum(int(np.count_nonzero(chunk)) for chunk in chunks)
    stream.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], sequences, len(lengths) + 1))
    for chunk in chunks:
        stream.write(chunk[chunk > 0].astype("<i4").data)
    place = 0
    for chunk in chunks:
        ends = np.cumsum(np.append(place, chunk[chunk > 0].astype(np.int64) * dtype.itemsize))
        stream.write(ends[:-1].astype("<i8").data)
        place = int(ends[-1])
    stream.write(struct.pack("<q", 0))
    place = 0
    for chunk in chunks:
        bounds = np.cumsum(chunk > 0, dtype=np.int64) + place
        stream.write(bounds.astype("<i8").data)
        place = int(bounds[-1])


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the manifest of a dataset; None where there is none, as for datasets that Megatron's own tool wrote.

    Raises:
        MoREError: It is damaged.
    """
    path = manifest_path(prefix)
    try:
        with open(path, encoding="utf-8") as stream:
            manifest: Any = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise MoREError(f"{path} is damaged: {error}; preprocess again, or remove it to skip its checks") from error
    wrong: list[str] | None = None
    if isinstance(manifest, dict) and "tokenizer" in manifest:
        wrong = _wrong(manifest, _FIELDS | _GROUPS) or _wrong(manifest["tokenizer"], _TOKENIZER)
    if wrong or wrong is None:
        fields = f" ({', '.join(wrong)})" if wrong else ""
        raise MoREError(f"{path} is no manifest of a dataset{fields}; preprocess again, or remove it")
    return dict(manifest)


def _wrong(values: dict[str, Any], types: dict[str, type]) -> list[str]:
    return [
        f"{name}: {values[name]!r:.40}"
        for name, kind in types.items()
        if type(values.get(name, kind())) is not kind and values[name] is not None
    ]
