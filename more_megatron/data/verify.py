"""Reading a finished dataset back with Megatron and comparing it with its source."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from more_megatron.data.check import check_dataset, check_hashes
from more_megatron.data.errors import DatasetError
from more_megatron.data.reading import read_blocks, read_documents
from more_megatron.data.tokenizers import build_megatron
from more_megatron.data.workers import Job

__all__ = ["verify"]


def verify(job: Job, prefix: str, manifest: dict[str, Any], samples: int = 200) -> str:
    """Check a dataset against its manifest and the inputs it was made from, and say what was found.

    Evenly spaced documents, the first and the last among them, are encoded again with Megatron's own tokenizer.

    Raises:
        DatasetError: A hash, a count or a document differs.
    """
    tokenizer = job.tokenizer
    check_dataset(prefix, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
    hashes = check_hashes(prefix)
    dataset = _open_with_megatron(prefix)
    documents, tokens = manifest["documents"], manifest["tokens"]
    megatron = build_megatron(tokenizer.options)
    wanted = set(np.linspace(0, documents - 1, min(samples, documents), dtype=np.int64).tolist())
    seen = exact = 0
    for number, document in enumerate(_documents(job)):
        seen += 1
        if number not in wanted:
            continue
        text = document.decode()
        ids = [int(id) for id in megatron.tokenize(text)]
        ends = [tokenizer.eod] if ids and job.append_eod and tokenizer.eod is not None else []
        _compare(prefix, dataset, number, ids + ends)
        exact += megatron.detokenize(ids) == text if ids else text == ""
    if seen != documents:
        raise DatasetError(f"dataset {prefix} has {documents} documents, its inputs have {seen}")
    return (
        f"verified: {hashes}; {documents} documents, {tokens} tokens; {len(wanted)} documents encoded again by "
        f"Megatron's tokenizer are the same, {exact} of them decode to their exact text"
    )


def _open_with_megatron(prefix: str) -> Any:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(prefix)


def _documents(job: Job) -> Iterator[bytes]:
    for block in read_blocks(job.sources):
        yield from read_documents(block, job.detokenize, job.skip_bad_lines).texts


def _compare(prefix: str, dataset: Any, number: int, expected: list[int]) -> None:
    first, last = (int(place) for place in dataset.document_indices[number : number + 2])
    found = [int(id) for sequence in range(first, last) for id in dataset[sequence]]
    if found != expected:
        counts = f"{len(found)} tokens, {len(expected)} expected"
        raise DatasetError(
            f"dataset {prefix}: document {number} differs from its source ({counts}); please report this"
        )
