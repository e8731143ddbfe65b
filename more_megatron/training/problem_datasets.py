"""Datasets of a run that trains on answers: rows of whole problems, and plain text as Megatron cuts it."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from numpy.typing import NDArray

from more_megatron.console import say
from more_megatron.data.answers import has_answers, mask_prefix, task_names
from more_megatron.errors import MoREError
from more_megatron.training.problems import NO_TASK, Tasks, slots


class AnswerDataset(torch.utils.data.Dataset):
    """A dataset of a blend, of the kind that its files are of: Megatron blends those of one class only.

    A subclass names the tasks of the run. Arguments are those of Megatron's datasets.
    """

    tasks: ClassVar[Tasks]
    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)
    numel_low_level_dataset = staticmethod(GPTDataset.numel_low_level_dataset)

    def __init__(self, dataset: IndexedDataset, path: str, *args: Any) -> None:
        numbers = [self.tasks.names.index(name) for name in task_names(path)]
        kind: Any = ProblemDataset if has_answers(path) else _TextDataset
        self.rows = kind(numbers, dataset, path, *args)
        self.index_split, self.unique_identifiers = self.rows.index_split, self.rows.unique_identifiers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        return self.rows[idx]


class _TextDataset(GPTDataset):
    """Megatron's dataset, each of whose rows is one problem of which every token counts."""

    def __init__(self, tasks: list[int], *args: Any) -> None:
        super().__init__(*args)
        self._table = _table([0], tasks, self.config.sequence_length)

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        return super().__getitem__(idx) | {"problems": self._table}


class ProblemDataset(MegatronDataset):
    """Rows of whole problems, in random order: an evaluation of few rows sees all tasks as well.

    A problem of n tokens takes n - 1 places: its last token is a label only. One that is longer than a row is left out.
    The beginning of another problem fills up a row and counts nowhere: to routers it looks like any other.

    Arguments are those of Megatron's datasets, behind the numbers of the tasks in the order of the mask's.
    `num_samples` are the fewest rows wanted; None for one epoch, which is the least.
    """

    def __init__(
        self,
        tasks: list[int],
        dataset: IndexedDataset,
        path: str,
        indices: NDArray[np.int32],
        num_samples: int | None,
        split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, path, indices, num_samples, split, config)
        self._tasks = np.array([NO_TASK, *tasks])
        self._mask = IndexedDataset(mask_prefix(path), mmap=config.mmap_bin_files)
        sizes = dataset.sequence_lengths[indices] - 1
        fits = sizes <= config.sequence_length
        self.left_out = int(len(fits) - fits.sum())
        if self.left_out:
            say(
                f"> {path}, {split.name}: {self.left_out} of {len(fits)} problems are longer than --seq-length "
                f"{config.sequence_length} and left out"
            )
        if not fits.any():
            raise MoREError(
                f"{path} has no problem for the {split.name} set that fits into --seq-length {config.sequence_length}: "
                "raise it, or change --split"
            )
        self._problems, self._ends = self._pack(indices[fits], sizes[fits], num_samples)

    def _pack(
        self, problems: NDArray[np.int32], sizes: NDArray[np.int32], num_samples: int | None
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the problems of all rows, epoch by epoch, and where among them each row ends."""
        epochs: list[NDArray[np.int32]] = []
        ends = [0]
        while not epochs or len(ends) <= (num_samples or 0):
            order = np.random.default_rng([self.config.random_seed, len(epochs)]).permutation(len(problems))
            first = len(epochs) * len(problems)
            ends += [first + end for end in self._row_ends(sizes[order])]
            epochs.append(problems[order])
        return np.concatenate(epochs), np.array(ends, np.int64)

    def _row_ends(self, sizes: NDArray[np.int32]) -> Iterator[int]:
        """Yield how many problems there are up to the end of each row of an epoch."""
        length = self.config.sequence_length
        places = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        end = 0
        while end < len(sizes):
            fitting = int(np.searchsorted(places, places[end] + length, side="right")) - 1
            # One slot is for what fills up the row.
            end = min(fitting, end + slots(length) - 1)
            yield end

    def _row(self, idx: int) -> NDArray[np.int32]:
        return self._problems[self._ends[idx] : self._ends[idx + 1]]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return a row; None: one that fills up a batch, of which nothing counts."""
        length = self.config.sequence_length
        row = np.zeros((4, length), np.int64)  # tokens, labels, whether these count, and positions
        starts, tasks, place = [], [], 0
        for problem in self._row(idx) if idx is not None else ():
            text, answer = self.dataset.get(int(problem)), self._mask.get(int(problem))
            end = place + len(text) - 1
            row[:, place:end] = text[:-1], text[1:], answer[1:] > 0, np.arange(end - place)
            starts.append(place)
            tasks.append(self._tasks[answer.max()])
            place = end
        if place < length:
            following = self._row(0 if idx is None else (idx + 1) % len(self))[0]
            row[0, place:] = np.resize(self.dataset.get(int(following)), length - place)
            row[3, place:] = np.arange(length - place)
            starts.append(place)
            tasks.append(NO_TASK)
        tokens, labels, counts, positions = torch.from_numpy(row)
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": counts.float(),
            "position_ids": positions,
            "problems": _table(starts, tasks, length),
        }


def _table(starts: list[int], tasks: list[int], seq_length: int) -> torch.Tensor:
    table = torch.tensor([seq_length, NO_TASK]).repeat(slots(seq_length), 1)
    table[: len(starts)] = torch.tensor([starts, tasks]).t()
    return table
