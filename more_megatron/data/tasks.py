"""The inputs cut into units of work, and the documents of one unit.

The cuts depend on the inputs and on one number of bytes, not on how many workers there are, so an interrupted run can
go on with any number of workers and the output never depends on them.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from more_megatron.data.detokenize import Detokenize, detokenize
from more_megatron.data.documents import PLAIN_GRID_BYTES, Layout, document_starts, find_start, tidy
from more_megatron.data.errors import DataError
from more_megatron.data.sources import Source, aligned_blocks, open_text, parquet_file

__all__ = ["BLOCK_BYTES", "Batch", "Task", "plan_tasks", "read_batches", "task_bytes"]

BLOCK_BYTES = 1 << 21
"""Text that a worker holds at a time; a constant, so that memory does not follow the size of the inputs."""

_SMALLEST_TASK = 1 << 21
_LARGEST_TASK = 1 << 24
_MOST_TASKS = 4096
_STREAM_BYTES = 1 << 22
_LOOK_BACK = 1024
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class Task:
    """A span of one input whose documents become one part of the output.

    Args:
        number: place in the order of the output.
        source: the input.
        start: first byte of the span in the text, or first row group of a Parquet file.
        stop: the byte or row group after it.
        data: the text itself where the input can only be read front to back.
    """

    number: int
    source: Source
    start: int
    stop: int
    data: bytes | None = None


@dataclass(frozen=True)
class Batch:
    """Consecutive documents of a task.

    Args:
        documents: the documents as UTF-8.
        size: bytes of input that they took.
    """

    documents: list[bytes]
    size: int


def task_bytes(sources: Sequence[Source], workers: int) -> int:
    """Size of a unit of work: several for each worker, yet no more units than a folder holds comfortably."""
    total = sum(source.size for source in sources)
    size = min(max(total // (32 * workers), _SMALLEST_TASK), _LARGEST_TASK)
    size = max(size, total // _MOST_TASKS)
    return -(-size // PLAIN_GRID_BYTES) * PLAIN_GRID_BYTES


def plan_tasks(sources: Sequence[Source], size: int) -> Iterator[Task]:
    """Cut all inputs into tasks, in order.

    Args:
        sources: the inputs.
        size: bytes of text in a task.

    Yields:
        Tasks. Those of compressed inputs carry their text, which is read only when the task is asked for.
    """
    number = 0
    for source in sources:
        if source.layout is None:
            spans: Iterator[tuple[int, int, bytes | None]] = (
                (group, group + 1, None) for group in range(parquet_file(source).num_row_groups)
            )
        elif source.seekable:
            spans = ((start, stop, None) for start, stop in _file_spans(source, size))
        else:
            spans = _stream_spans(source)
        for start, stop, data in spans:
            yield Task(number, source, start, stop, data)
            number += 1


def read_batches(task: Task, mode: Detokenize) -> Iterator[Batch]:
    """Read the documents of a task, a few megabytes at a time.

    Args:
        task: the unit of work.
        mode: how WikiText's spelling is undone.

    Yields:
        The documents. Text files give none for blank text; records with an empty text give an empty document.

    Raises:
        DataError: the text is not UTF-8, or a record has no text.
    """
    for texts, size in _raw_batches(task):
        if mode is not Detokenize.NONE:
            texts = [detokenize(text, mode) for text in texts]
        yield Batch([_encode(task, text) for text in texts], size)


def _raw_batches(task: Task) -> Iterator[tuple[list[str], int]]:
    layout = task.source.layout
    if layout is None:
        yield from _parquet_rows(task)
        return
    if task.data is not None:
        yield _documents(task.source, layout, task.start, task.data), len(task.data)
        return
    with open(task.source.path, "rb") as stream:
        stream.seek(task.start)
        for origin, block in aligned_blocks(stream, layout, task.start, task.stop - task.start, BLOCK_BYTES):
            yield _documents(task.source, layout, origin, block), len(block)


def _documents(source: Source, layout: Layout, origin: int, block: bytes) -> list[str]:
    if layout is Layout.JSONL:
        return _json_texts(source, origin, block)
    texts = []
    for start, end in document_starts(block, layout, origin):
        text = tidy(_decode(source, origin + start, block[start:end]))
        if text:
            texts.append(text)
    return texts


def _encode(task: Task, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{task.source.path}: a document between {task.start} and {task.stop} has half a surrogate pair ({half}), "
            "which no text may hold; repair or remove it"
        ) from error


def _decode(source: Source, origin: int, data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(
            f"{source.path} is not UTF-8: byte 0x{byte:02x} at offset {origin + error.start}; convert it to UTF-8 first"
        ) from error
    return text.removeprefix("\ufeff") if origin == 0 else text


def _json_texts(source: Source, origin: int, block: bytes) -> list[str]:
    texts = []
    offset = origin
    for line in io.BytesIO(block):
        if not line.isspace():
            texts.append(_json_text(source, offset, line))
        offset += len(line)
    return texts


def _json_text(source: Source, offset: int, line: bytes) -> str:
    try:
        text = json.loads(_decode(source, offset, line))[source.key]
    except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
        reason = f"no key '{source.key}'" if isinstance(error, KeyError) else "no JSON object"
        raise DataError(f"{source.path}: the line at byte {offset} holds {reason}; see --json-key") from error
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{source.path}: the line at byte {offset} has {kind}, not text, under '{source.key}'")
    return text


def _parquet_rows(task: Task) -> Iterator[tuple[list[str], int]]:
    source = task.source
    groups = list(range(task.start, task.stop))
    for batch in parquet_file(source).iter_batches(_ROWS_PER_BATCH, row_groups=groups, columns=[source.key]):
        rows = batch.column(0).to_pylist()
        texts = [row if isinstance(row, str) else "" for row in rows]
        yield texts, sum(map(len, texts))


def _file_spans(source: Source, size: int) -> Iterator[tuple[int, int]]:
    assert source.layout is not None
    start = 0
    with open(source.path, "rb") as stream:
        for target in range(size, source.size, size):
            if target <= start:
                continue
            stop = _find_in_file(stream, source, target)
            if stop > start:
                yield start, stop
                start = stop
    if start < source.size:
        yield start, source.size


def _find_in_file(stream: IO[bytes], source: Source, target: int) -> int:
    assert source.layout is not None
    # A heading needs the blank line above it.
    origin = max(0, target - _LOOK_BACK)
    stream.seek(origin)
    data = stream.read(1 << 16)
    while True:
        final = origin + len(data) >= source.size
        found = find_start(data, target - origin, source.layout, origin, final)
        if found is not None:
            return origin + found
        data += stream.read(len(data))


def _stream_spans(source: Source) -> Iterator[tuple[int, int, bytes | None]]:
    assert source.layout is not None
    with open_text(source) as stream:
        for origin, block in aligned_blocks(stream, source.layout, 0, None, _STREAM_BYTES):
            yield origin, origin + len(block), block
