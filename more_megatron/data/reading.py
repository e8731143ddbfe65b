"""The inputs as blocks of documents: the unit in which text is read, encoded and written."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from more_megatron.data.detokenize import detokenize
from more_megatron.data.documents import Layout, document_starts, find_start, tidy
from more_megatron.data.sources import Source, text_chunks
from more_megatron.errors import MoREError

BLOCK_BYTES = 1 << 21
"""Least size of a block. A constant: neither memory nor the output follows the inputs' size or the workers."""

_KINDS = {dict: "an object", list: "a list", float: "a number", bool: "a truth value", type(None): "null"}
# Python refuses to convert integers of more than 4,300 digits; a number beside the text may be as long as it likes.
_DECODER = json.JSONDecoder(parse_int=float)


@dataclass(frozen=True)
class Block:
    """Consecutive whole documents of one input, as they stand in it."""

    source: Source  # the input
    origin: int  # bytes of text before the block
    line: int  # lines before the block
    data: bytes  # the text


def read_blocks(sources: Iterable[Source]) -> Iterator[Block]:
    """Read all inputs, in order, in blocks that depend on the inputs alone."""
    for source in sources:
        line = 0
        for origin, data in cut_blocks(text_chunks(source), source.layout, BLOCK_BYTES):
            yield Block(source, origin, line, data)
            line += data.count(b"\n")


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


def read_all_documents(sources: Iterable[Source]) -> Iterator[bytes]:
    """Yield the documents of all inputs, in order, as UTF-8."""
    for block in read_blocks(sources):
        yield from read_documents(block)[0]


def read_documents(block: Block) -> tuple[list[bytes], int]:
    """Return the documents of a block as UTF-8, and the number of lines that hold no text and were left out.

    Text files give no document for blank text; records with an empty text give an empty document.

    Raises:
        MoREError: The text is not UTF-8, or a line holds no text and bad lines are not skipped.
    """
    source, texts, skipped = block.source, [], 0
    places = document_starts(block.data, source.layout, block.origin)
    for number, (start, end) in enumerate(places, block.line + 1):
        offset = block.origin + start
        try:
            text = _text(block.data[start:end], source, offset)
            if text is not None:
                texts.append(detokenize(text, source.detokenize).encode())
        except (ValueError, RecursionError) as error:
            where, mend = f"{source.path}: the document at byte {offset}", "convert the file to UTF-8"
            if source.layout is Layout.JSONL:
                where = f"{source.path}: line {number} (byte {offset})"
                mend = "mend it, or leave such lines out with --skip-bad-lines"
                if source.skip_bad_lines:
                    skipped += 1
                    continue
            raise MoREError(f"{where} cannot be used: {_fault(error, offset)}; {mend}") from error
    return texts, skipped


def _text(data: bytes, source: Source, offset: int) -> str | None:
    """The text of a document; None for blank text, or a blank line among JSON lines."""
    text = data.decode()
    if offset == 0:
        text = text.removeprefix("\ufeff")
    if source.layout is not Layout.JSONL:
        if "\0" in text:
            raise ValueError("it has NUL bytes, as binary files and UTF-16 have, and text has not")
        return tidy(text) or None
    return None if not data.strip() else _json_text(text.removesuffix("\n"), source.key)


def _json_text(line: str, key: str) -> str:
    record = _DECODER.decode(line)
    if not isinstance(record, dict):
        raise ValueError(f"it is {_KINDS.get(type(record), 'a text')}, no object")
    if key not in record:
        names = ", ".join(list(record)[:8])
        raise ValueError(f"it has no key '{key}', only {names[:200]}; see --json-key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"it has {_KINDS[type(text)]}, not text, under '{key}'")
    return text


def _fault(error: Exception, offset: int) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON object: {error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
    if isinstance(error, UnicodeEncodeError):
        return f"it has half a surrogate pair (\\u{ord(error.object[error.start]):04x}), which no text may hold"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
