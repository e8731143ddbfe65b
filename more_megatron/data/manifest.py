"""The manifest beside a dataset: where it came from, and whether it fits the tokenizer of a run."""

from __future__ import annotations

import json
import os
from typing import Any

from more_megatron.data.errors import DatasetError

__all__ = ["MANIFEST_VERSION", "manifest_path", "read_manifest"]

MANIFEST_VERSION = 2
"""Version 1 had no hashes of the files and no count of skipped lines."""

# Fields on whose types the checks and tools rely.
_FIELDS: dict[str, type] = {"documents": int, "tokens": int, "text_bytes": int, "words": int, "dtype": str}
_GROUPS: dict[str, type] = {"tokenizer": dict, "options": dict, "sha256": dict}
_TOKENIZER: dict[str, type] = {"type": str, "model": str, "sha256": str, "vocab_size": int, "eod": int}


def manifest_path(prefix: str | os.PathLike[str]) -> str:
    """Return the path of the manifest of a dataset prefix."""
    return f"{os.fspath(prefix)}.json"


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the manifest of a dataset; None where there is none, as for datasets that Megatron's own tool wrote.

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
    wrong: list[str] | None = None
    if isinstance(manifest, dict) and "tokenizer" in manifest:
        wrong = _wrong(manifest, _FIELDS | _GROUPS) or _wrong(manifest["tokenizer"], _TOKENIZER)
    if wrong or wrong is None:
        fields = f" ({', '.join(wrong)})" if wrong else ""
        raise DatasetError(f"{path} is no manifest of a dataset{fields}; preprocess again, or remove it")
    return dict(manifest)


def _wrong(values: dict[str, Any], types: dict[str, type]) -> list[str]:
    return [
        f"{name}: {values[name]!r:.40}"
        for name, kind in types.items()
        if type(values.get(name, kind())) is not kind and values[name] is not None
    ]
