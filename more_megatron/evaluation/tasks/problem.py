"""A problem, files of problems, and when an answer is right."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from more_megatron.errors import MoREError
from more_megatron.json_lines import read_json_lines
from more_megatron.unfinished import write_whole

_FIELDS = {"prompt": str, "answer": str, "task": str, "difficulty": int}


@dataclass(frozen=True)
class Problem:
    """A problem."""

    prompt: str  # what is given, without white space at its end
    answer: str  # what is wanted, without white space around it
    task: str  # name of its task
    difficulty: int  # what grows with the steps to the answer; its unit is the task's

    @classmethod
    def ask(cls, question: str, answer: object, task: str, difficulty: int, story: Iterable[str] = ()) -> Problem:
        """Return a problem in the form that all have: a story if there is one, the question, and `Answer:`."""
        return cls("\n".join((*story, f"Question: {question}", "Answer:")), str(answer), task, difficulty)

    @property
    def text(self) -> str:
        """The prompt with its answer."""
        return f"{self.prompt} {self.answer}"


def is_match(generated: str, answer: str) -> bool:
    """Return whether what a model goes on with is the answer: up to a newline or full stop, letter case aside."""
    return generated.strip().split("\n")[0].split(".")[0].strip().casefold() == answer.strip().casefold()


def write_problems(path: str | os.PathLike[str], problems: Iterable[Problem]) -> None:
    """Write a file of problems; it gets its name when it is whole."""
    lines = [json.dumps(dataclasses.asdict(problem), ensure_ascii=False) + "\n" for problem in problems]
    write_whole(Path(path), "".join(lines))


def read_problems(path: str | os.PathLike[str]) -> list[Problem]:
    """Read a file of problems.

    Raises:
        MoREError: It is not there, has no problem, or a line that is none; the message says which and why.
    """
    form = 'a problem is {"prompt": text, "answer": text, "task": name, "difficulty": integer}'
    problems = []
    for number, record in read_json_lines(path, f"write it with tools/prepare_tasks.py; {form}").items():
        wrong = [name for name, kind in _FIELDS.items() if type(record.get(name)) is not kind]
        wrong += [name for name in ("prompt", "answer", "task") if name not in wrong and not record[name].strip()]
        if wrong:
            raise MoREError(f"{path}: line {number} has no usable {', '.join(wrong)}: {form}")
        problems.append(Problem(*(record[name] for name in _FIELDS)))
    return problems
