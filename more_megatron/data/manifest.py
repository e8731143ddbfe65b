"""The manifest beside a dataset: where it came from, and whether it fits the tokenizer of a run."""

from __future__ import annotations

import json
import os
from typing import Any

from more_megatron.data.errors import DatasetError

__all__ = ["MANIFEST_VERSION", "manifest_path", "read_manifest"]

MANIFEST_VERSION = 2
"""Version 1 had no hashes of the files and no count of skipped lines."""

_COUNTS = ("documents", "tokens", "text_bytes", "words")


def manifest_path(prefix: str | os.PathLike[str]) -> str:
    """Return the path of the manifest of a dataset prefix."""
    return f"{os.fspath(prefix)}.json"


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the manifest of a dataset.

    Args:
        prefix: The dataset's prefix.

    Returns:
        Its contents; None where there is none, as for datasets that Megatron's own tool wrote.

    Raises:
        DatasetError: It is damaged.
    """
    path = manifest_path(prefix)
    try:
        with open(path, encoding="utf-8") as stream:
            manifest: Any = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged: {error}; preprocess again, or remove it to skip its checks") from error
    fault = _fault(manifest)
    if fault:
        raise DatasetError(f"{path} is no manifest of a dataset: {fault}; preprocess again, or remove it")
    return dict(manifest)


def _fault(manifest: Any) -> str | None:
    """Which field is absent or of another type than the checks and tools rely on."""
    if not isinstance(manifest, dict):
        return "it is no object"
    groups = {name: manifest.get(name, {}) for name in ("tokenizer", "options", "sha256")}
    wrong = [name for name, group in groups.items() if not isinstance(group, dict)]
    if wrong:
        return f"'{wrong[0]}' is no object"
    tokenizer = groups["tokenizer"]
    numbers = {name: manifest.get(name) for name in _COUNTS}
    numbers |= {f"tokenizer.{name}": tokenizer.get(name) for name in ("vocab_size", "eod")}
    texts = {f"tokenizer.{name}": tokenizer.get(name) for name in ("type", "model", "sha256")}
    texts |= {"dtype": manifest.get("dtype")} | {f"sha256.{name}": value for name, value in groups["sha256"].items()}
    if "type" not in tokenizer:
        return "'tokenizer.type' is absent"
    for kind, named in ((int, numbers), (str, texts)):
        for name, value in named.items():
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"'{name}' is {value!r:.40}"
    return None
