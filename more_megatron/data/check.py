"""Can a dataset be trained on? Cheap checks for the trainer's start: sizes and the manifest, never the tokens."""

import os
from collections.abc import Sequence
from typing import Any

from more_megatron.data.errors import DatasetError
from more_megatron.data.indexed import IndexFile, bin_path, idx_path, read_index
from more_megatron.data.manifest import manifest_path, read_manifest

__all__ = ["check_dataset", "check_datasets"]


def check_dataset(
    prefix: str | os.PathLike[str], *, vocab_size: int | None = None, tokenizer_sha256: str | None = None
) -> None:
    """Check one dataset.

    Args:
        prefix: the dataset's prefix, as in `--data-path`.
        vocab_size: vocabulary size of the run's tokenizer, without padding.
        tokenizer_sha256: hash of the run's tokenizer from `tokenizer_sha256`.

    Raises:
        DatasetError: a file is missing, truncated or damaged, or the manifest names another tokenizer. A dataset
            without a manifest, such as one by Megatron's own tool, is checked for its structure only.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            hint = " (give the prefix without .bin or .idx)" if str(prefix).endswith((".bin", ".idx")) else ""
            raise DatasetError(f"dataset {prefix}: {path} does not exist; preprocess again or mend --data-path{hint}")
    index = read_index(idx_path(prefix))
    _check_bin(prefix, index)
    manifest = read_manifest(prefix)
    if manifest is not None:
        _check_manifest(prefix, manifest, index, vocab_size, tokenizer_sha256)


def check_datasets(
    prefixes: Sequence[str], *, vocab_size: int | None = None, tokenizer_sha256: str | None = None
) -> None:
    """Check the datasets of a blend.

    Args:
        prefixes: prefixes, or Megatron's alternation of weights and prefixes.
        vocab_size: see `check_dataset`.
        tokenizer_sha256: see `check_dataset`.

    Raises:
        DatasetError: the first fault found.
    """
    names = list(prefixes)
    if len(names) > 1 and len(names) % 2 == 0 and all(_is_number(weight) for weight in names[::2]):
        names = names[1::2]
    for name in names:
        check_dataset(name, vocab_size=vocab_size, tokenizer_sha256=tokenizer_sha256)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_bin(prefix: str | os.PathLike[str], index: IndexFile) -> None:
    path = bin_path(prefix)
    size = path.stat().st_size
    if size < index.bin_bytes:
        raise DatasetError(
            f"{path} is truncated: {size} bytes, its index needs {index.bin_bytes}; copy it again or preprocess again"
        )
    if index.bin_bytes == 0:
        raise DatasetError(f"dataset {prefix} holds no tokens; preprocess again from inputs that hold text")


def _check_manifest(
    prefix: str | os.PathLike[str],
    manifest: dict[str, Any],
    index: IndexFile,
    vocab_size: int | None,
    tokenizer_sha256: str | None,
) -> None:
    path = manifest_path(prefix)
    documents = manifest.get("documents")
    if documents is not None and documents != index.document_count:
        raise DatasetError(
            f"dataset {prefix}: its index has {index.document_count} documents, {path} says {documents}: "
            "the files are of different runs; preprocess again"
        )
    tokenizer = manifest["tokenizer"]
    made_for = f"dataset {prefix} was made with {tokenizer.get('type')} {tokenizer.get('model') or ''}".rstrip()
    hint = "give the run that tokenizer, or preprocess with this one"
    size = tokenizer.get("vocab_size")
    if vocab_size is not None and size is not None and size != vocab_size:
        raise DatasetError(f"{made_for} of {size} tokens, the run's tokenizer has {vocab_size}; {hint}")
    sha256 = tokenizer.get("sha256")
    if tokenizer_sha256 is not None and sha256 is not None and sha256 != tokenizer_sha256:
        raise DatasetError(
            f"{made_for} ({sha256[:12]}), the run's tokenizer is another file ({tokenizer_sha256[:12]}); {hint}"
        )
