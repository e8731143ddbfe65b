"""Can a dataset be trained on? Cheap checks for the trainer's start, and the hashes of the files on demand."""

import os
from typing import Any

import numpy as np

from more_megatron.data.indexed import IndexFile, bin_path, idx_path, manifest_path, read_index, read_manifest
from more_megatron.data.sources import sha256_of
from more_megatron.errors import MoREError

_SMALL_INDEX = 1 << 26
_SAMPLES = 64
_SAMPLE_TOKENS = 4096


def check_dataset(
    prefix: str | os.PathLike[str], *, vocab_size: int | None = None, tokenizer_sha256: str | None = None
) -> None:
    """Check one dataset: the whole index, sizes, the manifest, and a sample of the tokens.

    The run's tokenizer has `vocab_size` ids, without padding, and the hash that `tokenizers.tokenizer_sha256` gives.

    Raises:
        MoREError: A file is missing, truncated or damaged, or the manifest names another tokenizer. A dataset
            without a manifest, such as one by Megatron's own tool, is checked for its structure only.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            hint = " (give the prefix without .bin or .idx)" if str(prefix).endswith((".bin", ".idx")) else ""
            raise MoREError(f"dataset {prefix}: {path} does not exist; preprocess again or mend --data-path{hint}")
    index = read_index(idx_path(prefix))
    _check_bin(prefix, index)
    manifest = read_manifest(prefix)
    if manifest is not None:
        _check_manifest(prefix, manifest, index, vocab_size, tokenizer_sha256)
        vocab_size = vocab_size or manifest["tokenizer"].get("vocab_size")
    if vocab_size is not None:
        _check_ids(prefix, index, vocab_size)


def check_hashes(prefix: str | os.PathLike[str]) -> str:
    """Read a dataset's files whole, and say whether they are those of its manifest.

    Raises:
        MoREError: A file is not the one that was written.
    """
    hashes = (read_manifest(prefix) or {}).get("sha256")
    if not hashes:
        return "no manifest with hashes"
    for path, name in ((bin_path(prefix), "bin"), (idx_path(prefix), "idx")):
        if hashes.get(name) != sha256_of(path):
            raise MoREError(f"{path} is not the file that was written (its hash differs): copy or preprocess again")
    return "hashes as written"


def _check_bin(prefix: str | os.PathLike[str], index: IndexFile) -> None:
    path = bin_path(prefix)
    size = path.stat().st_size
    if size != index.bin_bytes:
        state = "truncated" if size < index.bin_bytes else "of another dataset than its index"
        raise MoREError(f"{path} is {state}: {size} bytes, its index needs {index.bin_bytes}; copy or preprocess again")
    if index.bin_bytes == 0:
        raise MoREError(f"dataset {prefix} holds no tokens; preprocess again from inputs that hold text")


def _check_manifest(
    prefix: str | os.PathLike[str],
    manifest: dict[str, Any],
    index: IndexFile,
    vocab_size: int | None,
    tokenizer_sha256: str | None,
) -> None:
    tokens = index.bin_bytes // index.dtype.itemsize
    found = {"documents": index.document_count, "tokens": tokens, "dtype": index.dtype.name}
    for name, value in found.items():
        said = manifest.get(name)
        if said is not None and said != value:
            raise MoREError(
                f"dataset {prefix}: its index says {value} for {name}, {manifest_path(prefix)} says {said}: the files "
                "are of different runs; preprocess again"
            )
    path = idx_path(prefix)
    hashes = manifest.get("sha256", {})
    # Shifted bounds of documents are sound in themselves; an index of this size is hashed in no time.
    if "idx" in hashes and path.stat().st_size <= _SMALL_INDEX and hashes["idx"] != sha256_of(path):
        raise MoREError(f"{path} is damaged: its hash is not that of its manifest; copy or preprocess again")
    tokenizer = manifest["tokenizer"]
    made_for = f"dataset {prefix} was made with {tokenizer.get('type')} {tokenizer.get('model') or ''}".rstrip()
    hint = "give the run that tokenizer, or preprocess with this one"
    size = tokenizer.get("vocab_size")
    if vocab_size is not None and size is not None and size != vocab_size:
        raise MoREError(f"{made_for} of {size} tokens, the run's tokenizer has {vocab_size}; {hint}")
    sha256 = tokenizer.get("sha256")
    if tokenizer_sha256 is not None and sha256 is not None and sha256 != tokenizer_sha256:
        raise MoREError(
            f"{made_for} ({sha256[:12]}), the run's tokenizer is another file ({tokenizer_sha256[:12]}); {hint}"
        )


def _check_ids(prefix: str | os.PathLike[str], index: IndexFile, vocab_size: int) -> None:
    """Look at evenly spaced stretches of the tokens, all of a small dataset."""
    tokens = np.memmap(bin_path(prefix), index.dtype, mode="r")
    for start in np.linspace(0, max(0, len(tokens) - _SAMPLE_TOKENS), _SAMPLES, dtype=np.int64).tolist():
        ids = tokens[start : start + _SAMPLE_TOKENS]
        wrong = (ids < 0) | (ids >= vocab_size)
        if wrong.any():
            place = int(wrong.argmax())
            raise MoREError(
                f"dataset {prefix}: token {start + place} is {ids[place]}, the vocabulary has {vocab_size}: give the "
                "run the tokenizer that the data were made with, or preprocess again"
            )
