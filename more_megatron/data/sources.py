"""Which files hold the text, what they hold, and the one stream of chunks that all of them become."""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from more_megatron.data.documents import Layout, sniff_layout
from more_megatron.data.errors import DataError

__all__ = ["Format", "Source", "expand_inputs", "open_source", "parquet_rows", "sha256_of", "text_chunks"]

_SNIFF_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_ROWS = 1024
_COMPRESSED = (".gz", ".zst", ".zstd")


class Format(StrEnum):
    """What a file holds once it is decompressed."""

    TEXT = "text"
    JSONL = "JSON lines"
    PARQUET = "Parquet"


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

    Attributes:
        path: The file.
        size: Its size in bytes, as stored.
        format: What it holds.
        layout: How its text is divided; None for a Parquet file whose rows are documents.
        key: Field or column that holds the text, for JSON lines and Parquet.
        guessed: Whether the format was told from the contents against the name.
    """

    path: str
    size: int
    format: Format
    layout: Layout | None
    key: str
    guessed: bool = False

    @property
    def text_size(self) -> int | None:
        """Bytes of text in it; None if that is unknown before it is read."""
        return None if self.format is Format.PARQUET or self.path.lower().endswith(_COMPRESSED) else self.size


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Replace globs by the files they match, in sorted order, each file once."""
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
        path: The file.
        key: Field or column with the text, for JSON lines and Parquet.
        layout: Division into documents that the user asked for; None finds out.
    """
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    kind = _FORMATS.get(suffixes[-1], Format.TEXT) if suffixes else Format.TEXT
    source = Source(path, os.path.getsize(path), kind, Layout.JSONL, key)
    if kind is Format.JSONL:
        return source
    if layout is None:
        sample = _sample(source)
        if kind is Format.TEXT and _is_json(sample):
            return Source(path, source.size, Format.JSONL, Layout.JSONL, key, guessed=True)
        layout = sniff_layout(sample)
    rows = kind is Format.PARQUET and layout is Layout.PLAIN
    return Source(path, source.size, kind, None if rows else layout, key)


def _sample(source: Source) -> bytes:
    sample = b""
    for chunk in text_chunks(source):
        sample += chunk
        if len(sample) >= _SNIFF_BYTES:
            break
    return sample[:_SNIFF_BYTES]


def _is_json(sample: bytes) -> bool:
    """Whether the first line is a JSON object, or the beginning of one that is longer than the sample."""
    line, end, _ = sample.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line, parse_int=float), dict)
    except (ValueError, RecursionError):
        return not end and len(sample) == _SNIFF_BYTES and line.startswith(b'{"')


def text_chunks(source: Source) -> Iterator[bytes]:
    """Read the text of a source, decompressed; the rows of a Parquet file follow each other as lines."""
    if source.format is Format.PARQUET:
        for rows in parquet_rows(source):
            yield "".join(row if row.endswith("\n") else f"{row}\n" for row in rows).encode()
        return
    with open(source.path, "rb") as file:
        stream: Any = file
        damage: tuple[type[Exception], ...] = ()
        if source.path.lower().endswith(".gz"):
            stream, damage = gzip.GzipFile(fileobj=file), (EOFError, zlib.error, gzip.BadGzipFile)
        elif source.path.lower().endswith((".zst", ".zstd")):
            zstandard = _require("zstandard", source.path)
            stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            damage = (zstandard.ZstdError,)
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        except damage as error:
            raise DataError(f"{source.path} is a damaged {Path(source.path).suffix[1:]} file: {error}") from error


def parquet_rows(source: Source) -> Iterator[list[str]]:
    """Read the text column of a Parquet file, some rows at a time; a null counts as an empty text."""
    parquet = _require("pyarrow.parquet", source.path)
    arrow = _require("pyarrow", source.path)
    try:
        with parquet.ParquetFile(source.path) as file:
            _check_column(arrow, file.schema_arrow, source)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[source.key]):
                yield [row or "" for row in batch.column(0).to_pylist()]
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{source.path} is a damaged Parquet file, or none: {reason}") from error


def _check_column(arrow: Any, schema: Any, source: Source) -> None:
    if source.key not in schema.names:
        names = ", ".join(schema.names)
        raise DataError(f"{source.path} has no column '{source.key}'; it has {names}: choose one with --json-key")
    kind = schema.field(source.key).type
    value = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not (arrow.types.is_string(value) or arrow.types.is_large_string(value) or arrow.types.is_null(value)):
        raise DataError(f"{source.path}: column '{source.key}' holds {kind}, not text; choose one with --json-key")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require(module: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(f"reading {path} needs {package}: pip install {package}") from error
