"""From input files to an indexed dataset and its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

from more_megatron import __version__
from more_megatron.data.documents import PLAIN_GRID_BYTES
from more_megatron.data.encoders import EncoderPlan, plan_encoder
from more_megatron.data.errors import DataError, DocumentError, ResumableError
from more_megatron.data.manifest import MANIFEST_VERSION
from more_megatron.data.output import Counts, Output
from more_megatron.data.reading import BLOCK_BYTES, Block, read_blocks, read_documents
from more_megatron.data.sources import sha256_of
from more_megatron.data.workers import Job, encode_blocks

__all__ = ["preprocess"]


Report = Callable[[int, int], None]
"""Told of bytes that are done, and of all tokens so far."""


def preprocess(job: Job, output: Output, say: Callable[[str], None], report: Report) -> dict[str, Any]:
    """Write `<prefix>.bin`, `<prefix>.idx` and the manifest `<prefix>.json`, which is returned.

    Args:
        job: What to do.
        output: Where to, held by this run.
        say: Told which encoder was chosen.
        report: Told of every block.

    Raises:
        DataError: An input, the tokenizer or the place to write to is at fault; nothing is left under a final name.
    """
    if job.append_eod and job.tokenizer.eod is None:
        kind = job.tokenizer.options.tokenizer_type
        raise DataError(f"{kind} has no end-of-document token; pass --no-append-eod to do without")
    blocks = read_blocks(job.sources)
    first = list(islice(blocks, 1))
    encoder = plan_encoder(job.tokenizer, job.append_eod, _texts(job, first), job.allow_fast)
    say(f"encoding by {encoder.name} ({encoder.reason})")
    done = output.start(_plan(job, encoder), job.resume)
    hashing = ThreadPoolExecutor(1)
    hashes = [hashing.submit(sha256_of, source.path) for source in job.sources]
    try:
        total = _write(job, encoder, chain(first, blocks), output, done, report)
        manifest = _manifest(job, total, [future.result() for future in hashes])
        return output.publish(manifest)
    finally:
        hashing.shutdown(wait=False, cancel_futures=True)


def _texts(job: Job, blocks: Sequence[Block]) -> Iterator[bytes]:
    for block in blocks:
        yield from read_documents(block, job.detokenize, job.skip_bad_lines).texts


def _write(
    job: Job, encoder: EncoderPlan, blocks: Iterator[Block], output: Output, total: Counts, report: Report
) -> Counts:
    """Encode and write the blocks that are not written yet, and return the counts of all."""
    for block in islice(blocks, total.blocks):
        report(block.size, total.tokens)
    try:
        for encoded, counts in encode_blocks(job, encoder, blocks):
            total += counts
            output.append(encoded, total)
            report(counts.read, total.tokens)
    except ResumableError:
        raise
    except DocumentError as error:
        output.discard()
        hint = "; --encoder reference does without gigatoken" if encoder.recipe is not None else ""
        index, reason = error.args
        raise DataError(f"document {total.documents + index} {reason}{hint}") from error
    except DataError as error:
        if total.blocks == 0:
            output.discard()
            raise
        raise ResumableError(f"{error}; --resume keeps what was written before it") from error
    if total.tokens == 0:
        output.discard()
        raise DataError(f"there is no text to write in {', '.join(source.path for source in job.sources[:3])}")
    return total


def _plan(job: Job, encoder: EncoderPlan) -> dict[str, Any]:
    """Everything that decides the output."""
    return {
        "inputs": [[source.path, source.size, os.stat(source.path).st_mtime_ns] for source in job.sources],
        "layouts": [[source.format, source.layout, source.key] for source in job.sources],
        "tokenizer": [asdict(job.tokenizer.options), job.tokenizer.sha256],
        "encoder": encoder.name,
        "dtype": job.tokenizer.dtype.name,
        "append_eod": job.append_eod,
        "detokenize": job.detokenize,
        "block_bytes": [BLOCK_BYTES, PLAIN_GRID_BYTES],
    }


def _manifest(job: Job, total: Counts, hashes: Sequence[str]) -> dict[str, Any]:
    tokenizer = job.tokenizer
    inputs = [
        {
            "path": os.path.abspath(source.path),
            "bytes": source.size,
            "sha256": sha256,
            "layout": source.layout or "rows",
        }
        for source, sha256 in zip(job.sources, hashes, strict=True)
    ]
    options = {key: value for key, value in asdict(tokenizer.options).items() if value}
    return {
        "version": MANIFEST_VERSION,
        "written_by": f"more-megatron {__version__}",
        "inputs": inputs,
        "tokenizer": {
            "type": tokenizer.options.tokenizer_type,
            "model": tokenizer.options.tokenizer_model,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "dtype": tokenizer.dtype.name,
        **{name: value for name, value in asdict(total).items() if name not in ("blocks", "read")},
        "options": {"append_eod": job.append_eod, "detokenize": job.detokenize, "tokenizer": options},
    }
