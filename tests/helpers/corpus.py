"""What tests train on: a dataset of a few hundred random documents, in Megatron's format, and a text."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

_SHARED = "MORE_TEST_CORPUS"


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


def shared_corpus() -> Path:
    """Return the prefix of a corpus for runs that only need something to train on.

    It is written once for this process and all that it starts, and removed at its end. Megatron's `--mock-data` would
    take seconds more a run: it draws hundred millions of tokens and shuffles them.
    """
    if _SHARED not in os.environ:
        folder = tempfile.mkdtemp(prefix="more-tests-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ[_SHARED] = str(write_corpus(Path(folder, "corpus")))
    return Path(os.environ[_SHARED])


def sample_text(size: int) -> str:
    """Return the first characters of the English that ships with Python."""
    return _sample_text()[:size]


@functools.cache
def _sample_text() -> str:
    from tools.sample_text import write_sample_text

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text")
        write_sample_text(path)
        return path.read_text()
