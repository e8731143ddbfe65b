"""Blocks of the inputs to tokens, in this process or in several, in the order of the inputs."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context, parent_process

import numpy as np

from more_megatron.data.detokenize import Detokenize
from more_megatron.data.encoders import EncoderPlan, build_encoder
from more_megatron.data.encoding import Encoded
from more_megatron.data.errors import ResumableError
from more_megatron.data.output import Counts
from more_megatron.data.reading import Block, read_documents

__all__ = ["Work", "encode_blocks"]

# Workers inherit them: numerical libraries would start a thread for each core in each worker.
_ENVIRONMENT = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Work:
    """What is done to each block.

    Attributes:
        encoder: How documents are encoded.
        detokenize: How WikiText's spelling is undone.
        skip_bad_lines: Whether JSON lines without a text are left out.
    """

    encoder: EncoderPlan
    detokenize: Detokenize
    skip_bad_lines: bool


class _Worker:
    """Does the work on one block after the other."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._encoder = build_encoder(work.encoder)

    def __call__(self, block: Block) -> tuple[Encoded, Counts]:
        documents = read_documents(block, self._work.detokenize, self._work.skip_bad_lines)
        encoded = self._encoder.encode(documents.texts)
        counts = Counts(
            documents=len(documents.texts),
            tokens=len(encoded.tokens),
            text_bytes=sum(map(len, documents.texts)),
            words=_count_words(documents.texts),
            skipped=documents.skipped,
            blocks=1,
        )
        return encoded, counts


def _count_words(documents: list[bytes]) -> int:
    text = np.frombuffer(b" ".join([b"", *documents]), dtype=np.uint8)
    # Space, and the five bytes from tab to carriage return.
    white = text == 0x20
    white |= text - 0x09 < 5
    return int(np.count_nonzero(white[:-1] > white[1:]))


def encode_blocks(work: Work, blocks: Iterator[Block], workers: int) -> Iterator[tuple[Encoded, Counts]]:
    """Encode blocks.

    Args:
        work: What is done to each.
        blocks: The blocks; a bounded number is read ahead.
        workers: Processes to use.

    Yields:
        Tokens and counts of each block, in order.

    Raises:
        DataError: A block cannot be used; those before it have been yielded.
    """
    first = list(islice(blocks, workers))
    blocks = chain(first, blocks)
    if len(first) < 2:
        yield from map(_Worker(work), blocks)
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    # Fresh interpreters: forking a process that may run threads can lock up.
    pool = ProcessPoolExecutor(len(first), get_context("spawn"), _start_worker, (work,))
    pending: deque[Future[tuple[Encoded, Counts]]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_encode_block, block))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ResumableError(
            "a worker process died, most likely for want of memory; run again with --resume and fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        # An error line ends the process without more ado, and Python would warn of a lock that still exists then.
        del pool, pending


_worker: _Worker | None = None


def _start_worker(work: Work) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker alone would wait for ever: its queue stays open as long as any other worker lives.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = _Worker(work)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_block(block: Block) -> tuple[Encoded, Counts]:
    assert _worker is not None
    return _worker(block)
