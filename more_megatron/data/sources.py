"""Which files hold the text, and how their bytes are read."""

import glob
import gzip
import hashlib
import importlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from more_megatron.data.documents import Layout, find_start, sniff_layout
from more_megatron.data.errors import DataError

__all__ = [
    "Compression",
    "Format",
    "Source",
    "aligned_blocks",
    "expand_inputs",
    "open_source",
    "open_text",
    "parquet_file",
    "sha256_of",
]

_SNIFF_BYTES = 1 << 20


class Format(StrEnum):
    """What a file holds once it is decompressed."""

    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"


class Compression(StrEnum):
    """How a file is compressed."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_COMPRESSIONS = {".gz": Compression.GZIP, ".zst": Compression.ZSTD, ".zstd": Compression.ZSTD}
_FORMATS = {
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSONL,
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
}


@dataclass(frozen=True)
class Source:
    """One input file.

    Args:
        path: the file.
        size: its size in bytes, as stored.
        format: what it holds.
        compression: how it is compressed.
        layout: how its text is divided; None for a Parquet file whose rows are documents.
        key: field or column that holds the text, for JSON lines and Parquet.
    """

    path: str
    size: int
    format: Format
    compression: Compression
    layout: Layout | None
    key: str

    @property
    def seekable(self) -> bool:
        """Whether spans of the text can be read without reading what lies before them."""
        return self.compression is Compression.NONE and self.format is not Format.PARQUET


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Replace globs by the files they match, in sorted order, each file once.

    Raises:
        DataError: a pattern matches nothing, or a file is missing, empty or unreadable.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [match for match in matches if not os.path.isdir(match)]
        if not matches:
            reason = "is a folder; name its files, or use a glob" if os.path.isdir(pattern) else "does not exist"
            raise DataError(f"input {pattern} {reason}")
        paths.update(dict.fromkeys(matches))
    for path in paths:
        if os.path.getsize(path) == 0:
            raise DataError(f"input {path} is empty")
        if not os.access(path, os.R_OK):
            raise DataError(f"input {path} cannot be read: permission denied")
    return list(paths)


def open_source(path: str, key: str, layout: Layout | None) -> Source:
    """Find out what an input file holds.

    Args:
        path: the file.
        key: field or column with the text, for JSON lines and Parquet.
        layout: division into documents that the user asked for; None finds out.

    Raises:
        DataError: the file is damaged or a library to read it is missing.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1], Compression.NONE) if suffixes else Compression.NONE
    if compression is not Compression.NONE:
        suffixes.pop()
    kind = _FORMATS.get(suffixes[-1], Format.TEXT) if suffixes else Format.TEXT
    source = Source(path, os.path.getsize(path), kind, compression, Layout.JSONL, key)
    if kind is Format.JSONL:
        return source
    if layout is None:
        layout = _sniff(source)
    if kind is Format.PARQUET and layout is Layout.PLAIN:
        layout = None
    return Source(path, source.size, kind, compression, layout, key)


def _sniff(source: Source) -> Layout:
    with open_text(source) as stream:
        return sniff_layout(stream.read(_SNIFF_BYTES))


@contextmanager
def open_text(source: Source) -> Iterator[IO[bytes]]:
    """Open the decompressed text of a source; the rows of a Parquet file follow each other as lines.

    Raises:
        DataError: the file is damaged, or the library that reads it is not installed.
    """
    try:
        if source.format is Format.PARQUET:
            yield io.BufferedReader(_ParquetLines(source), 1 << 20)
        elif source.compression is Compression.GZIP:
            with gzip.open(source.path, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif source.compression is Compression.ZSTD:
            zstandard = _require("zstandard", source.path)
            with (
                open(source.path, "rb") as file,
                zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream,
            ):
                yield stream
        else:
            with open(source.path, "rb") as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source.path} is a damaged gzip file: {error}") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise DataError(f"{source.path} is a damaged zstd file: {error}") from error
        raise


def aligned_blocks(
    stream: IO[bytes], layout: Layout, origin: int, size: int | None, block_bytes: int
) -> Iterator[tuple[int, bytes]]:
    """Read a text in blocks that begin and end where documents do.

    Args:
        stream: positioned at a document's start.
        layout: the division into documents.
        origin: offset of that start in the whole text.
        size: bytes to read; None reads to the end.
        block_bytes: least size of a block but the last; a longer document makes a longer block.

    Yields:
        Offset in the whole text, and the block.
    """
    buffer = b""
    remaining = size
    step = block_bytes
    while True:
        wanted = step if remaining is None else min(step, remaining)
        chunk = stream.read(wanted) if wanted else b""
        final = len(chunk) == 0 or remaining == len(chunk)
        remaining = None if remaining is None else remaining - len(chunk)
        buffer += chunk
        position = min(block_bytes, len(buffer))
        while position and (cut := find_start(buffer, position, layout, origin, final)):
            yield origin, buffer[:cut]
            buffer, origin = buffer[cut:], origin + cut
            position = block_bytes if len(buffer) >= block_bytes else (len(buffer) if final else 0)
        if final:
            return
        # A document longer than a block: read ever larger steps, so that searching it stays linear.
        step = max(block_bytes, len(buffer))


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parquet_file(source: Source) -> Any:
    """Open a Parquet file and check that it has the text column.

    Raises:
        DataError: pyarrow is not installed, the file is damaged, or the column is missing.
    """
    parquet = _require("pyarrow.parquet", source.path)
    try:
        file = parquet.ParquetFile(source.path)
    except Exception as error:
        raise DataError(f"{source.path} is not a readable Parquet file: {error}") from error
    if source.key not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{source.path} has no column '{source.key}'; it has {names}: choose one with --json-key")
    return file


class _ParquetLines(io.RawIOBase):
    """The rows of a text column as one text; an empty row is the blank line that WikiText's rows stand for."""

    def __init__(self, source: Source) -> None:
        batches = parquet_file(source).iter_batches(batch_size=4096, columns=[source.key])
        self._rows = (row or "" for batch in batches for row in batch.column(0).to_pylist())
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        parts = [self._pending]
        total = len(self._pending)
        while total < len(buffer) and (row := next(self._rows, None)) is not None:
            line = row.encode() if row.endswith("\n") else row.encode() + b"\n"
            parts.append(line)
            total += len(line)
        data = b"".join(parts)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self._pending = data[count:]
        return count


def _require(module: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"reading {path} needs {package}: pip install {package}") from error
