"""The inputs as blocks of documents: the unit in which text is read, encoded and written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from more_megatron.data.detokenize import Detokenize, detokenize
from more_megatron.data.documents import Layout, document_starts, find_start, tidy
from more_megatron.data.errors import DataError
from more_megatron.data.sources import Source, parquet_rows, text_chunks

__all__ = ["BLOCK_BYTES", "Block", "Documents", "cut_blocks", "read_blocks", "read_documents"]

BLOCK_BYTES = 1 << 21
"""Least size of a block. A constant: neither memory nor the output follows the inputs' size or the workers."""

_KINDS = {dict: "an object", list: "a list", float: "a number", bool: "a truth value", type(None): "null"}


@dataclass(frozen=True)
class Block:
    """Consecutive whole documents of one input, as they stand in it.

    Attributes:
        source: The input.
        origin: Bytes of text before the block, or rows of a Parquet file.
        line: Lines before the block.
        data: The text, or the rows.
    """

    source: Source
    origin: int
    line: int
    data: bytes | list[str]

    @property
    def size(self) -> int:
        """Return the bytes of the text, or the characters of the rows."""
        return len(self.data) if isinstance(self.data, bytes) else sum(map(len, self.data))


@dataclass(frozen=True)
class Documents:
    """The documents of a block.

    Attributes:
        texts: The documents as UTF-8.
        skipped: Lines that hold no text and were left out.
    """

    texts: list[bytes]
    skipped: int = 0


def read_blocks(sources: Iterable[Source]) -> Iterator[Block]:
    """Read all inputs, in order, in blocks that depend on the inputs alone."""
    for source in sources:
        if source.layout is None:
            yield from _row_blocks(source)
            continue
        line = 0
        for origin, data in cut_blocks(text_chunks(source), source.layout, BLOCK_BYTES):
            yield Block(source, origin, line, data)
            line += data.count(b"\n")


def _row_blocks(source: Source) -> Iterator[Block]:
    rows: list[str] = []
    origin = size = 0
    for more in parquet_rows(source):
        rows += more
        size += sum(map(len, more))
        if size >= BLOCK_BYTES:
            yield Block(source, origin, origin, rows)
            origin, rows, size = origin + len(rows), [], 0
    if rows:
        yield Block(source, origin, origin, rows)


def cut_blocks(chunks: Iterable[bytes], layout: Layout, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cut a text that comes in chunks where documents begin, and yield the offset and the text of each block.

    A block is at least `block_bytes` long, but for the last; a longer document makes a longer block.
    """
    buffer, origin, wanted = b"", 0, block_bytes
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= wanted:
            cut = find_start(buffer, block_bytes, layout, origin, final=False)
            if cut is None:
                # A document longer than a block: wait for twice as much, so that searching it stays linear.
                wanted = 2 * len(buffer)
                break
            yield origin, buffer[:cut]
            buffer, origin, wanted = buffer[cut:], origin + cut, block_bytes
    if buffer:
        yield origin, buffer


def read_documents(block: Block, mode: Detokenize, skip_bad_lines: bool = False) -> Documents:
    """Divide a block into documents, and undo WikiText's spelling.

    Text files give no document for blank text; records with an empty text give an empty document.

    Raises:
        DataError: The text is not UTF-8, or a line holds no text and bad lines are not skipped.
    """
    if isinstance(block.data, list):
        return Documents([detokenize(row, mode).encode() for row in block.data])
    assert block.source.layout is not None
    if block.source.layout is Layout.JSONL:
        return _json_documents(block, block.data, mode, skip_bad_lines)
    texts = []
    for start, end in document_starts(block.data, block.source.layout, block.origin):
        try:
            text = tidy(_decode(block, start, block.data[start:end]))
        except UnicodeDecodeError as error:
            what = _not_utf8(block, start, error)
            raise DataError(f"{block.source.path} is {what}; convert it to UTF-8 first") from error
        if text:
            texts.append(detokenize(text, mode).encode())
    return Documents(texts)


def _decode(block: Block, start: int, data: bytes) -> str:
    text = data.decode()
    return text.removeprefix("\ufeff") if block.origin + start == 0 else text


def _not_utf8(block: Block, start: int, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {block.origin + start + error.start}"


def _json_documents(block: Block, data: bytes, mode: Detokenize, skip_bad_lines: bool) -> Documents:
    texts: list[bytes] = []
    skipped = start = 0
    # Not splitlines: a carriage return alone ends no record.
    for number, line in enumerate(data.split(b"\n"), block.line + 1):
        if line and not line.isspace():
            try:
                texts.append(detokenize(_json_text(block, start, line), mode).encode())
            except (ValueError, RecursionError) as error:
                if not skip_bad_lines:
                    raise _bad_line(block, number, start, error) from error
                skipped += 1
        start += len(line) + 1
    return Documents(texts, skipped)


def _json_text(block: Block, start: int, line: bytes) -> str:
    # Python refuses to convert integers of more than 4,300 digits; a number beside the text may be as long as it likes.
    record = json.loads(_decode(block, start, line), parse_int=float)
    key = block.source.key
    if not isinstance(record, dict):
        raise ValueError(f"it is {_KINDS.get(type(record), 'a text')}, no object")
    if key not in record:
        names = ", ".join(list(record)[:8])
        raise ValueError(f"it has no key '{key}', only {names[:200]}; see --json-key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"it has {_KINDS[type(text)]}, not text, under '{key}'")
    return text


def _bad_line(block: Block, number: int, start: int, error: Exception) -> DataError:
    reason = str(error)
    if isinstance(error, json.JSONDecodeError):
        reason = f"it is no JSON object: {error.msg} at column {error.colno}"
    elif isinstance(error, UnicodeDecodeError):
        reason = f"it is {_not_utf8(block, start, error)}"
    elif isinstance(error, UnicodeEncodeError):
        reason = f"it has half a surrogate pair (\\u{ord(error.object[error.start]):04x}), which no text may hold"
    elif isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    where = f"{block.source.path}: line {number} (byte {block.origin + start})"
    return DataError(f"{where} cannot be used: {reason}; mend it, or leave such lines out with --skip-bad-lines")
