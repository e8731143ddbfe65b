"""Texts as the model saw them in training: documents of the data room, as windows of tokens."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from more_megatron.data.detokenize import Detokenize
from more_megatron.data.reading import read_all_documents
from more_megatron.data.sources import expand_inputs, open_source
from more_megatron.errors import MoREError


def read_texts(path: str | Path, mode: Detokenize = Detokenize.NONE) -> list[str]:
    """Return the documents of a file of any kind that the preprocessing tool reads, divided as it divides them.

    Raises:
        MoREError: If the file is missing, damaged or without text.
    """
    sources = [open_source(name, detokenize=mode) for name in expand_inputs([str(path)])]
    texts = [text.decode() for text in read_all_documents(sources)]
    if not any(texts):
        raise MoREError(f"{path} holds no text")
    return texts


def token_windows(tokenizer: Any, texts: Sequence[str], length: int, limit: int | None = None) -> Iterator[list[int]]:
    """Yield the tokens of documents one after the other, each ended as in training, in windows of a length.

    The last window may be shorter. With a limit, it ends after so many tokens.
    """
    tokens = itertools.chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts)
    yield from map(list, itertools.batched(itertools.islice(tokens, limit), length))


def batches(windows: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Yield windows together, at most so many at a time, of one length each time."""
    for _, alike in itertools.groupby(windows, key=len):
        yield from (list(batch) for batch in itertools.batched(alike, size))
