"""Files in the place of datasets of the hub: texts for perplexity, and HellaSwag's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from more_megatron.data.detokenize import Detokenize, detokenize
from more_megatron.errors import MoREError, last_line
from more_megatron.evaluation.texts import read_texts

__all__ = ["load_documents", "load_rows", "process_results", "text"]

_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")


def load_documents(path: str, detokenization: str = Detokenize.NONE, **_: Any) -> dict[str, Any]:
    """Return the documents of a text file as the split `test`.

    Args:
        path: A file of any kind that the preprocessing tool reads.
        detokenization: How far WikiText's spelling is undone, as it was for training.
    """
    from datasets import Dataset

    # Words and bytes are those of the text as it was, by the harness's convention for WikiText.
    documents = [
        {"text": detokenize(text, Detokenize(detokenization)), "words": len(text.split()), "bytes": len(text.encode())}
        for text in read_texts(path)
        if text
    ]
    return {"test": Dataset.from_list(documents)}


def text(document: dict[str, Any]) -> str:
    """Return what is predicted."""
    return str(document["text"])


def process_results(document: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Return what each measure adds up."""
    (loglikelihood,) = results
    return {
        "word_perplexity": (loglikelihood, document["words"]),
        "byte_perplexity": (loglikelihood, document["bytes"]),
        "bits_per_byte": (loglikelihood, document["bytes"]),
    }


def load_rows(path: str, **_: Any) -> dict[str, Any]:
    """Return the rows of a file of HellaSwag's JSON lines as the split `test`.

    Raises:
        MoREError: If it is missing, or a line is not one of HellaSwag's.
    """
    from datasets import Dataset

    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise MoREError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({name: row[name] for name in _HELLASWAG})
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join(_HELLASWAG)
            raise MoREError(f"{path}: line {number} is no JSON object with {names} ({last_line(error)})") from error
    if not rows:
        raise MoREError(f"{path} is empty")
    return {"test": Dataset.from_list(rows)}
