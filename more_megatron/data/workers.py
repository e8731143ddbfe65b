"""Blocks of the inputs to tokens, in this process or in several, in the order of the inputs."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
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
from more_megatron.data.sources import Source
from more_megatron.data.tokenizers import Tokenizer

__all__ = ["Job", "encode_blocks"]

# Workers inherit them: numerical libraries would start a thread for each core in each worker.
_ENVIRONMENT = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Job:
    """What is made of what.

    Attributes:
        sources: The inputs, in order.
        tokenizer: The tokenizer.
        append_eod: Whether documents end with the end-of-document token.
        detokenize: How WikiText's spelling is undone.
        workers: Processes to use.
        resume: Whether to go on where an interrupted run was.
        skip_bad_lines: Whether JSON lines without a text are left out and counted.
        allow_fast: Whether gigatoken may encode.
    """

    sources: Sequence[Source]
    tokenizer: Tokenizer
    append_eod: bool = True
    detokenize: Detokenize = Detokenize.NONE
    workers: int = 1
    resume: bool = False
    skip_bad_lines: bool = False
    allow_fast: bool = True


class _Worker:
    """Does the work on one block after the other."""

    def __init__(self, job: Job, encoder: EncoderPlan) -> None:
        self._job = job
        self._encoder = build_encoder(encoder)

    def __call__(self, block: Block) -> tuple[Encoded, Counts]:
        documents = read_documents(block, self._job.detokenize, self._job.skip_bad_lines)
        encoded = self._encoder.encode(documents.texts)
        counts = Counts(
            documents=len(documents.texts),
            tokens=len(encoded.tokens),
            text_bytes=sum(map(len, documents.texts)),
            words=_count_words(documents.texts),
            skipped=documents.skipped,
            blocks=1,
            read=block.size,
        )
        return encoded, counts


def _count_words(documents: list[bytes]) -> int:
    text = np.frombuffer(b" ".join([b"", *documents]), dtype=np.uint8)
    # Space, and the five bytes from tab to carriage return.
    white = text == 0x20
    white |= text - 0x09 < 5
    return int(np.count_nonzero(white[:-1] > white[1:]))


def encode_blocks(job: Job, encoder: EncoderPlan, blocks: Iterator[Block]) -> Iterator[tuple[Encoded, Counts]]:
    """Encode blocks, of which a bounded number is read ahead, and yield tokens and counts of each in order.

    Raises:
        DataError: A block cannot be used; those before it have been yielded.
    """
    first = list(islice(blocks, job.workers))
    blocks = chain(first, blocks)
    if len(first) < 2:
        yield from map(_Worker(job, encoder), blocks)
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    # Fresh interpreters: forking a process that may run threads can lock up.
    pool = ProcessPoolExecutor(len(first), get_context("spawn"), _start_worker, (job, encoder))
    pending: deque[Future[tuple[Encoded, Counts]]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_encode_block, block))
            if len(pending) > 2 * job.workers:
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


def _start_worker(job: Job, encoder: EncoderPlan) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker alone would wait for ever: its queue stays open as long as any other worker lives.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = _Worker(job, encoder)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_block(block: Block) -> tuple[Encoded, Counts]:
    assert _worker is not None
    return _worker(block)
