"""Problems to an indexed dataset, and beside it one of the same shape that says which tokens are the answer's.

The mask of a dataset `P` is `P_answers`, uint8: 0 for tokens of the prompt, else one plus the number of the problem's
task in the list of tasks in the mask's manifest. The token that ends the document is part of the answer: a model has to
learn where to stop.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.check import check_dataset
from more_megatron.data.encoding import Counts, Encoded, Encoder, count, plan_encoder
from more_megatron.data.indexed import MANIFEST_VERSION, bin_path, idx_path, read_index, read_manifest
from more_megatron.data.output import Output
from more_megatron.data.tokenizers import Tokenizer
from more_megatron.errors import MoREError

_MOST_TASKS = 255


@dataclass(frozen=True)
class Exercise:
    """A text that begins with a prompt, and the name of its task."""

    text: str
    prompt: str
    task: str


def mask_prefix(prefix: str | os.PathLike[str]) -> str:
    """Return the prefix of the mask of a dataset."""
    return f"{os.fspath(prefix)}_answers"


def has_answers(prefix: str | os.PathLike[str]) -> bool:
    """Return whether a dataset has a mask."""
    return idx_path(mask_prefix(prefix)).is_file() or bin_path(mask_prefix(prefix)).is_file()


def write_answers(prefix: str, exercises: Sequence[Exercise], tokenizer: Tokenizer) -> int:
    """Write a dataset with its mask and return the number of its tokens.

    Raises:
        MoREError: The tokenizer has no end-of-document token, there are too many tasks, or a place is not writable.
    """
    if tokenizer.eod is None:
        raise MoREError(f"{tokenizer.options.tokenizer_type} has no end-of-document token, which ends answers")
    tasks = sorted({exercise.task for exercise in exercises})
    if len(tasks) > _MOST_TASKS:
        raise MoREError(f"there are {len(tasks)} tasks, and a mask tells {_MOST_TASKS} apart: write several datasets")
    documents = [exercise.text.encode() for exercise in exercises]
    plan = plan_encoder(tokenizer, True, documents)
    encoded = Encoder(plan).encode(documents)
    prompts = Encoder(replace(plan, append_eod=False)).encode([exercise.prompt.encode() for exercise in exercises])
    numbers = np.array([tasks.index(exercise.task) + 1 for exercise in exercises], dtype=np.uint8)
    mask = Encoded(_mask(encoded, prompts, numbers), encoded.lengths)
    counts = count(documents, encoded)
    # The mask first: a dataset that is there is never without it.
    _write(mask_prefix(prefix), mask, counts, {"tokenizer": {}, "tasks": tasks})
    _write(prefix, encoded, counts, {"tokenizer": tokenizer.facts()})
    return len(encoded.tokens)


def _mask(encoded: Encoded, prompts: Encoded, numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mask of all tokens: an answer begins where a text first differs from its prompt.

    Not where the prompt's tokens end: its last token may go on into the answer.
    """
    mask = np.repeat(numbers, encoded.lengths)
    ends, prompt_ends = np.cumsum(encoded.lengths), np.cumsum(prompts.lengths)
    for end, length, prompt_end, size in zip(ends, encoded.lengths, prompt_ends, prompts.lengths, strict=True):
        text, prompt = encoded.tokens[end - length : end], prompts.tokens[prompt_end - size : prompt_end]
        common = min(len(text), len(prompt))
        differs = text[:common] != prompt[:common]
        first = int(differs.argmax()) if differs.any() else common
        mask[end - length : end - length + first] = 0
    return mask


def _write(prefix: str, encoded: Encoded, counts: Counts, facts: dict[str, object]) -> None:
    with Output(prefix) as output:
        plan = {"version": MANIFEST_VERSION, **facts, "dtype": encoded.tokens.dtype.name, "options": {}}
        output.start(plan, resume=False)
        output.append(encoded, counts)
        output.publish(plan, counts)


def check_answers(prefix: str) -> None:
    """Check the mask of a dataset that has been checked itself.

    Raises:
        MoREError: The mask is damaged, of another shape than the dataset, or names no task for a number in it.
    """
    name = mask_prefix(prefix)
    check_dataset(name)
    mask, tokens = read_index(idx_path(name)), read_index(idx_path(prefix))
    mend = "write both with tools/prepare_tasks.py"
    if not np.array_equal(mask.lengths, tokens.lengths):
        raise MoREError(f"{name} is not of the shape of {prefix}, whose answers it tells apart: {mend}")
    if mask.dtype != np.uint8:
        raise MoREError(f"{name} holds {mask.dtype.name}, a mask of answers uint8: {mend}")
    largest, names = int(_values(prefix).max()), task_names(prefix)
    if largest == 0:
        raise MoREError(f"{name} marks no token as an answer's: {mend}")
    if largest > len(names):
        raise MoREError(f"{name} has answers of task {largest}, its manifest names {len(names)} tasks: {mend}")


def task_names(prefix: str) -> list[str]:
    """Return the names of the tasks of a dataset, in the order of their numbers; its own name if none are given."""
    manifest = read_manifest(mask_prefix(prefix)) or {}
    return [str(name) for name in manifest.get("tasks", [])] or [Path(prefix).name]


def answer_density(prefix: str) -> float:
    """Return the share of answers among the tokens that are predicted."""
    return np.count_nonzero(_values(prefix)) / max(
        1, len(_values(prefix)) - read_index(idx_path(prefix)).sequence_count
    )


def _values(prefix: str) -> NDArray[np.uint8]:
    return np.memmap(bin_path(mask_prefix(prefix)), np.uint8, mode="r")
