"""Blocks of text to token ids as they lie on disk, in this process or in several, in the order of the inputs.

The reference of the tokenizer encodes, or gigatoken where it gives the same ids.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context

import numpy as np
from numpy.typing import ArrayLike, NDArray

from more_megatron.data.fast import DocumentError, Encode, FastEncode, Recipe, checked, first_difference
from more_megatron.data.reading import Block, read_documents
from more_megatron.data.reference import open_reference
from more_megatron.data.tokenizers import Tokenizer
from more_megatron.errors import MoREError, last_line
from more_megatron.lifetime import end_with_starter


class ResumableError(MoREError):
    """What ended a run lies outside its inputs: it can go on later from what it has written."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of consecutive documents."""

    tokens: NDArray[np.generic]  # ids of all documents, end to end [tokens]
    # Tokens of each document with its end-of-document token, int32 [documents]; 0 for a document that has no token
    # of its own, which then has no end-of-document token either, as in Megatron's tool
    lengths: NDArray[np.int32]


@dataclass(frozen=True)
class Counts:
    """Counts of one block, or of several added up."""

    documents: int = 0  # documents, empty ones included
    tokens: int = 0  # tokens, those that end documents included
    text_bytes: int = 0  # bytes of the documents' text as UTF-8
    words: int = 0  # runs of bytes between ASCII white space in that text
    skipped: int = 0  # lines of the inputs that were left out
    blocks: int = 0  # blocks of the inputs
    read: int = 0  # bytes of the inputs, decompressed

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class EncoderPlan:
    """An encoder that has been decided on, small enough to hand to every worker."""

    tokenizer: Tokenizer
    append_eod: bool  # whether documents end with the end-of-document token
    recipe: Recipe | None  # how gigatoken encodes; None for the reference
    name: str  # the library, with its version: parts of a dataset by two of them are not mixed
    reason: str  # why it is this one


def plan_encoder(
    tokenizer: Tokenizer, append_eod: bool, documents: Iterable[bytes], allow_fast: bool = True
) -> EncoderPlan:
    """Choose the encoder of a run; gigatoken is tried on the documents, the first of what will be encoded."""
    from importlib.metadata import version

    reference = open_reference(tokenizer)
    recipe = reference.recipe() if allow_fast else "--encoder reference was given"
    if isinstance(recipe, Recipe):
        try:
            name, fast = f"gigatoken {version('gigatoken')}", FastEncode(recipe, reference.normalize)
            different = first_difference(fast, reference.encode, reference.pieces(), documents)
        except ImportError:
            recipe = "it is not installed (pip install 'more-megatron[fast]', several times faster)"
        except Exception as error:
            recipe = f"it refuses this tokenizer ({last_line(error)[:120]})"
        else:
            if different is None:
                reason = "its ids are the reference's on every piece, on hostile texts and on the first megabyte"
                return EncoderPlan(tokenizer, append_eod, recipe, name, reason)
            recipe = f"its ids differ from the reference's, first in {different}"
    return EncoderPlan(tokenizer, append_eod, None, reference.name, f"not gigatoken: {recipe}")


class Encoder:
    """Encodes as planned, and puts the ids of documents together."""

    def __init__(self, plan: EncoderPlan) -> None:
        tokenizer, reference = plan.tokenizer, open_reference(plan.tokenizer)
        self._encode: Encode = reference.encode
        if plan.recipe is not None:
            self._encode = checked(FastEncode(plan.recipe, reference.normalize), reference.encode)
        self._vocab_size = tokenizer.vocab_size
        # Of the dtype on disk, with which the ids' own dtype is not widened.
        ends = [tokenizer.eod] if plan.append_eod and tokenizer.eod is not None else []
        self._eod = np.array(ends, dtype=tokenizer.dtype)

    def encode(self, documents: list[bytes]) -> Encoded:
        """Return the tokens of documents that come as UTF-8.

        Raises:
            DocumentError: A document cannot be encoded, or gives an id that the tokenizer does not have.
        """
        parts: list[ArrayLike] = [self._eod[:0]]
        lengths = np.zeros(len(documents), dtype=np.int32)
        for index, ids in enumerate(self._encode(documents)):
            if count := len(ids):  # type: ignore[arg-type]
                parts += [ids, self._eod]
                lengths[index] = count + len(self._eod)
        tokens = np.concatenate(parts)
        wrong = (tokens < 0) | (tokens >= self._vocab_size)
        if wrong.any():
            place = int(wrong.argmax())
            index = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise DocumentError(index, f"gives the id {tokens[place]}, the tokenizer has 0 to {self._vocab_size - 1}")
        return Encoded(tokens.astype(self._eod.dtype), lengths)


def encode_blocks(plan: EncoderPlan, blocks: Iterator[Block], workers: int) -> Iterator[tuple[Encoded, Counts]]:
    """Encode blocks, of which a bounded number is read ahead, and yield tokens and counts of each in order.

    Raises:
        MoREError: A block cannot be used; those before it have been yielded.
    """
    first = list(islice(blocks, workers))
    blocks = chain(first, blocks)
    if len(first) < 2:
        yield from map(partial(_encode_block, Encoder(plan)), blocks)
        return
    # Numerical libraries would start a thread for each core in each worker.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Fresh interpreters: forking a process that may run threads can lock up.
    pool = ProcessPoolExecutor(len(first), get_context("spawn"), _start_worker, (plan,))
    pending: deque[Future[tuple[Encoded, Counts]]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_encode_in_worker, block))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        reason = "a worker process died, most likely for want of memory"
        raise ResumableError(f"{reason}; run again with --resume and fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
        # An error line ends the process without more ado, and Python would warn of a lock that still exists then.
        del pool, pending


def _encode_block(encoder: Encoder, block: Block) -> tuple[Encoded, Counts]:
    texts, skipped = read_documents(block)
    encoded = encoder.encode(texts)
    return encoded, replace(count(texts, encoded), skipped=skipped, read=len(block.data))


def count(documents: list[bytes], encoded: Encoded) -> Counts:
    """Return the counts of a block of documents, which come as UTF-8."""
    text_bytes = sum(map(len, documents))
    return Counts(len(documents), len(encoded.tokens), text_bytes, _count_words(documents), blocks=1)


def _count_words(documents: list[bytes]) -> int:
    text = np.frombuffer(b" ".join([b"", *documents]), dtype=np.uint8)
    # Space, and the five bytes from tab to carriage return.
    white = (text == 0x20) | (text - 0x09 < 5)
    return int(np.count_nonzero(white[:-1] > white[1:]))


_encoder: Encoder


def _start_worker(plan: EncoderPlan) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker alone would wait for ever: its queue stays open as long as any other worker lives.
    end_with_starter()
    # With which the pool ends those that are left when one has died.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _encoder = Encoder(plan)


def _encode_in_worker(block: Block) -> tuple[Encoded, Counts]:
    return _encode_block(_encoder, block)
