"""Problems in the rows of a micro-batch: what keeps them apart, and how they are answered.

They travel beside tokens and labels as int64 [b, problems, 2]: where each problem begins, and the number of its task.
Slots behind the last problem begin at the end of the row. What fills up a row is a problem without a task.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from megatron.core import mpu
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim

from more_megatron.data.answers import has_answers, task_names

NO_TASK = -1
# Tokens of a row for each of its slots.
_TOKENS_A_SLOT = 8


def slots(seq_length: int) -> int:
    """Return the number of problems that a row can have, what fills it up included."""
    return max(4, seq_length // _TOKENS_A_SLOT)


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run."""

    names: tuple[str, ...]  # their names; a task's number is its place among them
    texts: frozenset[str]  # names of those that are text, which is not to be answered

    @classmethod
    @functools.cache
    def of(cls, prefixes: tuple[str, ...]) -> Tasks:
        """Return the tasks of some datasets."""
        names = sorted({name for prefix in prefixes for name in task_names(prefix)})
        texts = {name for prefix in prefixes if not has_answers(prefix) for name in task_names(prefix)}
        return cls(tuple(names), frozenset(texts))


@dataclass(frozen=True)
class Problems:
    """The problems of a micro-batch."""

    starts: torch.Tensor  # where they begin, int64 [b, problems]
    tasks: torch.Tensor  # numbers of their tasks, int64 [b, problems]
    seq_length: int  # length of a row
    read: torch.Tensor | None = None  # both as they were read, [b, problems, 2], on the host; None on other ranks

    @classmethod
    def share(cls, table: torch.Tensor | None, rows: int, seq_length: int) -> Problems:
        """Give the others the table that the first tensor-parallel rank has read, [b, problems, 2]."""
        read, device = table, torch.cuda.current_device()
        if table is None:
            table = torch.empty(rows, slots(seq_length), 2, dtype=torch.int64)
        table = table.to(device, non_blocking=True)
        group = mpu.get_tensor_model_parallel_group()
        if group.size() > 1:
            torch.distributed.broadcast(table, mpu.get_tensor_model_parallel_src_rank(), group=group)
        return cls(table[..., 0].contiguous(), table[..., 1].contiguous(), seq_length, read)

    @property
    def host_starts(self) -> torch.Tensor:
        """Where they begin, in host memory; the device is waited for on ranks that have not read them."""
        return self.starts.to(torch.device("cpu")) if self.read is None else self.read[..., 0]

    @property
    def numbers(self) -> torch.Tensor:
        """The problem that each token is of, int64 [b, s]."""
        positions = torch.arange(self.seq_length, device=self.starts.device).expand(len(self.starts), -1).contiguous()
        return torch.searchsorted(self.starts, positions, right=True) - 1

    @property
    def attention_mask(self) -> torch.Tensor:
        """True where attention is forbidden: what comes later, and what is of another problem; [b, 1, s, s]."""
        numbers = self.numbers
        later = torch.ones(self.seq_length, self.seq_length, dtype=torch.bool, device=numbers.device).triu(1)
        return ((numbers.unsqueeze(1) != numbers.unsqueeze(2)) | later).unsqueeze(1)

    def report(
        self, tasks: Tasks, mask: torch.Tensor, losses: torch.Tensor, is_right: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return by task the loss, and the share of problems all of whose answer is right: sum and weight of each.

        Args:
            tasks: All tasks.
            mask: 1 for tokens that count, [b, s].
            losses: Loss of each token, [b, s].
            is_right: Whether the likeliest token is the label, [b, s].
        """
        numbers, weights = self.numbers, mask.float()
        of_token = self.tasks.gather(1, numbers)
        zeros = torch.zeros_like(self.starts, dtype=torch.float32)
        wrong = zeros.scatter_add(1, numbers, weights * ~is_right)
        has_answer = zeros.scatter_add(1, numbers, weights) > 0
        report = {}
        for task, name in enumerate(tasks.names):
            own, asked = weights * (of_token == task), has_answer & (self.tasks == task)
            report[f"{name} loss"] = torch.stack(((losses.float() * own).sum(), own.sum()))
            if name not in tasks.texts:
                report[f"{name} exact match"] = torch.stack(((asked & (wrong == 0)).sum(), asked.sum())).float()
        return report


@torch.no_grad()
def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest tokens, int64 [b, s], given this rank's part of the vocabulary, [s, b, v]."""
    group = mpu.get_tensor_model_parallel_group()
    values, tokens = logits.float().max(dim=-1)
    tokens = tokens + group.rank() * logits.size(-1)
    values, tokens = (_gather_along_first_dim(x, group=group).view(-1, *x.shape) for x in (values, tokens))
    return tokens.gather(0, values.argmax(dim=0, keepdim=True))[0].t().contiguous()
