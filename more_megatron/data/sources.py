"""Which files hold the text, how each of them is read, and the stream of chunks that it becomes."""

import glob
import gzip
import hashlib
import importlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from more_megatron.data.detokenize import Detokenize
from more_megatron.data.documents import Layout, sniff_layout
from more_megatron.errors import MoREError

_CHUNK_BYTES = 1 << 20
_ROWS = 1024
_COMPRESSED = (".gz", ".zst", ".zstd")
_JSONL = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst|\.zstd)?$", re.IGNORECASE)
_PARQUET = re.compile(r"\.(parquet|pq)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One input file, and how it is read."""

    path: str
    size: int  # in bytes, as stored
    layout: Layout  # how it is divided into documents
    key: str  # field or column that holds the text, for JSON lines and Parquet
    detokenize: Detokenize  # how WikiText's spelling is undone
    skip_bad_lines: bool  # whether JSON lines without a text are left out and counted

    @property
    def is_parquet(self) -> bool:
        """Return whether the file is Parquet, by its name."""
        return _PARQUET.search(self.path) is not None

    @property
    def is_guessed(self) -> bool:
        """Return whether JSON lines were told by the contents, against the name."""
        return self.layout is Layout.JSONL and not self.is_parquet and not _JSONL.search(self.path)

    @property
    def text_size(self) -> int | None:
        """Return the bytes of text in it; None if that is unknown before it is read."""
        return None if self.is_parquet or self.path.lower().endswith(_COMPRESSED) else self.size


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Replace globs by the files they match, in sorted order, each file once.

    Raises:
        MoREError: There is no such file, or it is empty or not readable.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        matches = [match for match in matches if not os.path.isdir(match)]
        if not matches:
            reason = "is a folder; name its files, or use a glob" if os.path.isdir(pattern) else "does not exist"
            raise MoREError(f"input {pattern} {reason}")
        paths.update(dict.fromkeys(matches))
    for path in paths:
        if not os.path.isfile(path):
            raise MoREError(f"input {path} is a pipe or a device: write its text into a file first")
        if os.path.getsize(path) == 0:
            raise MoREError(f"input {path} is empty")
        if not os.access(path, os.R_OK):
            raise MoREError(f"input {path} cannot be read: permission denied")
    return list(paths)


def open_source(
    path: str,
    key: str = "text",
    layout: Layout | None = None,
    detokenize: Detokenize = Detokenize.NONE,
    skip_bad_lines: bool = False,
) -> Source:
    """Find out what an input file holds; a layout of None finds out that, too.

    Raises:
        MoREError: The file is damaged, or a library that reads it is not installed.
    """
    layout = Layout.JSONL if _JSONL.search(path) else layout
    source = Source(path, os.path.getsize(path), layout or Layout.PLAIN, key, detokenize, skip_bad_lines)
    layout = layout or _sniff(source)
    has_rows = source.is_parquet and layout is not Layout.WIKITEXT
    return replace(source, layout=Layout.JSONL if has_rows else layout)


def _sniff(source: Source) -> Layout:
    sample = b""
    for chunk in text_chunks(source):
        sample += chunk
        if len(sample) >= _CHUNK_BYTES:
            break
    return sniff_layout(sample[:_CHUNK_BYTES])


def text_chunks(source: Source) -> Iterator[bytes]:
    """Read the text of a source, decompressed; the rows of a Parquet file follow each other as lines.

    Raises:
        MoREError: The file is damaged, has no column of text, or a library that reads it is not installed.
    """
    if source.is_parquet:
        yield from _parquet_lines(source)
        return
    suffix = os.path.splitext(source.path.lower())[1]
    with open(source.path, "rb") as file:
        stream: Any = file
        damage: tuple[type[Exception], ...] = ()
        if suffix == ".gz":
            stream, damage = gzip.GzipFile(fileobj=file), (EOFError, zlib.error, gzip.BadGzipFile)
        elif suffix in _COMPRESSED:
            zstandard = _require("zstandard", source.path)
            stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            damage = (zstandard.ZstdError,)
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        except damage as error:
            raise MoREError(f"{source.path} is a damaged {suffix[1:]} file: {error}") from error


def _parquet_lines(source: Source) -> Iterator[bytes]:
    """Rows of a Parquet file as lines of JSON, or as lines of one text; a null counts as an empty text."""
    arrow, parquet = (_require(module, source.path) for module in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(source.path) as file:
            _check_column(arrow.types, file.schema_arrow, source)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[source.key]):
                rows = [row or "" for row in batch.column(0).to_pylist()]
                if source.layout is Layout.JSONL:
                    rows = [json.dumps({source.key: row}, ensure_ascii=False) for row in rows]
                yield "".join(row if row.endswith("\n") else f"{row}\n" for row in rows).encode()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise MoREError(f"{source.path} is a damaged Parquet file, or none: {reason}") from error


def _check_column(types: Any, schema: Any, source: Source) -> None:
    if source.key not in schema.names:
        names = ", ".join(schema.names)
        raise MoREError(f"{source.path} has no column '{source.key}'; it has {names}: choose one with --json-key")
    kind = schema.field(source.key).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_null(value)):
        raise MoREError(f"{source.path}: column '{source.key}' holds {kind}, not text; choose one with --json-key")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require(module: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MoREError(f"reading {path} needs {package}: pip install {package}") from error
