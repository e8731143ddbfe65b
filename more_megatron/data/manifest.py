"""The manifest beside a dataset: where it came from, and whether it fits the tokenizer of a run."""

import json
import os
from typing import Any

from more_megatron.data.errors import DatasetError

__all__ = ["MANIFEST_VERSION", "manifest_path", "read_manifest"]

MANIFEST_VERSION = 1


def manifest_path(prefix: str | os.PathLike[str]) -> str:
    """Path of the manifest of a dataset prefix."""
    return f"{os.fspath(prefix)}.json"


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the manifest of a dataset.

    Args:
        prefix: the dataset's prefix.

    Returns:
        Its contents; None where there is none, as for datasets that Megatron's own tool wrote.

    Raises:
        DatasetError: it is damaged.
    """
    path = manifest_path(prefix)
    try:
        with open(path, encoding="utf-8") as stream:
            manifest: Any = json.load(stream)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} is damaged: {error}; preprocess again, or remove it to skip its checks") from error
    if not isinstance(manifest, dict) or "tokenizer" not in manifest:
        raise DatasetError(f"{path} is no manifest of a dataset; preprocess again, or remove it to skip its checks")
    return manifest
