"""From input files to an indexed dataset and its manifest, and back to check it."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from more_megatron import __version__
from more_megatron.data.check import check_dataset, check_hashes
from more_megatron.data.documents import PLAIN_GRID_BYTES
from more_megatron.data.encoding import Counts, EncoderPlan, ResumableError, encode_blocks, plan_encoder
from more_megatron.data.fast import DocumentError
from more_megatron.data.indexed import MANIFEST_VERSION
from more_megatron.data.output import Output
from more_megatron.data.reading import BLOCK_BYTES, Block, read_all_documents, read_blocks, read_documents
from more_megatron.data.sources import Source, sha256_of
from more_megatron.data.tokenizers import Tokenizer, build_megatron
from more_megatron.errors import MoREError

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What is made of what."""

    sources: Sequence[Source]  # in order
    tokenizer: Tokenizer
    append_eod: bool = True  # whether documents end with the end-of-document token
    workers: int = 1  # processes to use
    resume: bool = False  # whether to go on where an interrupted run was
    allow_fast: bool = True  # whether gigatoken may encode


def preprocess(job: Job, output: Output, say: Callable[[str], None], report: Report) -> dict[str, Any]:
    """Write `<prefix>.bin`, `<prefix>.idx` and the manifest `<prefix>.json`, which is returned.

    `say` is told which encoder was chosen, `report` the bytes of every block that is done and all tokens so far.

    Raises:
        MoREError: An input, the tokenizer or the place to write to is at fault; nothing is left under a final name.
    """
    if job.append_eod and job.tokenizer.eod is None:
        raise MoREError(f"{job.tokenizer.options.tokenizer_type} has no end-of-document token; pass --no-append-eod")
    blocks = read_blocks(job.sources)
    first = list(islice(blocks, 1))
    documents = read_documents(first[0])[0] if first else []
    encoder = plan_encoder(job.tokenizer, job.append_eod, documents, job.allow_fast)
    say(f"encoding by {encoder.name} ({encoder.reason})")
    plan = _plan(job, encoder)
    done = output.start(plan, job.resume)
    hashing = ThreadPoolExecutor(1)
    hashes = [hashing.submit(sha256_of, source.path) for source in job.sources]
    try:
        total = _write(job, encoder, chain(first, blocks), output, done, report)
        inputs = [{**entry, "sha256": sha256.result()} for entry, sha256 in zip(plan["inputs"], hashes, strict=True)]
        return output.publish({**plan, "inputs": inputs}, total)
    finally:
        hashing.shutdown(wait=False, cancel_futures=True)


def _write(
    job: Job, encoder: EncoderPlan, blocks: Iterator[Block], output: Output, total: Counts, report: Report
) -> Counts:
    """Encode and write the blocks that are not written yet, and return the counts of all."""
    for block in islice(blocks, total.blocks):
        report(len(block.data), total.tokens)
    try:
        for encoded, counts in encode_blocks(encoder, blocks, job.workers):
            total += counts
            output.append(encoded, total)
            report(counts.read, total.tokens)
    except ResumableError:
        raise
    except DocumentError as error:
        output.discard()
        hint = "; --encoder reference does without gigatoken" if encoder.recipe is not None else ""
        index, reason = error.args
        raise MoREError(f"document {total.documents + index} {reason}{hint}") from error
    except MoREError as error:
        if total.blocks == 0:
            output.discard()
            raise
        raise ResumableError(f"{error}; --resume keeps what was written before it") from error
    if total.tokens == 0:
        output.discard()
        raise MoREError(f"there is no text to write in {', '.join(source.path for source in job.sources[:3])}")
    return total


def _plan(job: Job, encoder: EncoderPlan) -> dict[str, Any]:
    """Everything that decides the output, of which the manifest tells. Bad lines may still be left out later."""
    inputs = [
        {
            "path": os.path.abspath(source.path),
            "bytes": source.size,
            "modified": os.stat(source.path).st_mtime_ns,
            "layout": source.layout,
            "key": source.key,
        }
        for source in job.sources
    ]
    tokenizer = {key: value for key, value in asdict(job.tokenizer.options).items() if value}
    return {
        "version": MANIFEST_VERSION,
        "written_by": f"more-megatron {__version__}",
        "inputs": inputs,
        "tokenizer": job.tokenizer.facts(),
        "encoder": encoder.name,
        "dtype": job.tokenizer.dtype.name,
        "block_bytes": [BLOCK_BYTES, PLAIN_GRID_BYTES],
        "options": {"append_eod": job.append_eod, "detokenize": job.sources[0].detokenize, "tokenizer": tokenizer},
    }


def verify(job: Job, prefix: str, manifest: dict[str, Any], samples: int = 200) -> str:
    """Check a dataset against its manifest and the inputs it was made from, and say what was found.

    Evenly spaced documents, the first and the last among them, are encoded again with Megatron's own tokenizer.

    Raises:
        MoREError: A hash, a count or a document differs.
    """
    tokenizer = job.tokenizer
    check_dataset(prefix, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
    hashes = check_hashes(prefix)
    megatron = build_megatron(tokenizer.options)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    documents, tokens = manifest["documents"], manifest["tokens"]
    wanted = set(np.linspace(0, documents - 1, min(samples, documents), dtype=np.int64).tolist())
    seen = exact = 0
    for number, document in enumerate(read_all_documents(job.sources)):
        seen += 1
        if number not in wanted:
            continue
        text = document.decode()
        ids = [int(id) for id in megatron.tokenize(text)]
        ends = [tokenizer.eod] if ids and job.append_eod and tokenizer.eod is not None else []
        _compare(prefix, dataset, number, ids + ends)
        exact += megatron.detokenize(ids) == text if ids else text == ""
    if seen != documents:
        raise MoREError(f"dataset {prefix} has {documents} documents, its inputs have {seen}")
    return (
        f"verified: {hashes}; {documents} documents, {tokens} tokens; {len(wanted)} documents encoded again by "
        f"Megatron's tokenizer are the same, {exact} of them decode to their exact text"
    )


def _compare(prefix: str, dataset: Any, number: int, expected: list[int]) -> None:
    first, last = (int(place) for place in dataset.document_indices[number : number + 2])
    found = [int(id) for sequence in range(first, last) for id in dataset[sequence]]
    if found != expected:
        what = f"document {number} differs from its source ({len(found)} tokens, {len(expected)} expected)"
        raise MoREError(f"dataset {prefix}: {what}; please report this")
