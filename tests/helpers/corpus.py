"""A dataset of a few hundred random documents, in Megatron's format."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

__all__ = ["shared_corpus", "write_corpus"]


def write_corpus(prefix: Path, documents: int = 200, vocab_size: int = 126, seed: int = 0) -> Path:
    """Write `prefix.bin` and `prefix.idx` and return the prefix.

    Args:
        prefix: Where to.
        documents: Number of documents, of 10 to 59 tokens each.
        vocab_size: Tokens are below it.
        seed: Of the random tokens.
    """
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in random.integers(10, 60, documents):
        builder.add_item(torch.from_numpy(random.integers(0, vocab_size, length)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@functools.cache
def shared_corpus() -> Path:
    """Write a corpus once for this test process, for runs that only need something to train on; return its prefix.

    Megatron's `--mock-data` would take seconds more a run: it draws hundred millions of tokens and shuffles them.
    """
    folder = Path(tempfile.gettempdir(), f"more-tests-{os.getuid()}-{os.environ.get('PYTEST_XDIST_WORKER', 'only')}")
    folder.mkdir(exist_ok=True)
    return write_corpus(folder / "corpus")
