"""The twenty bAbI tasks (Weston et al., arXiv 1502.05698), from their text files or from the hub.

Difficulty: facts that support the answer, as the files list them; 0 from the hub, which does not list them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from more_megatron.data.hub import fetching
from more_megatron.errors import MoREError
from more_megatron.evaluation.tasks.generated import Split
from more_megatron.evaluation.tasks.problem import Problem

TASKS = range(1, 21)
_HUB = "Muennighoff/babi"
_LINE = re.compile(r"(\d+) (.+)")


def read_babi(folder: str | os.PathLike[str], split: Split, tasks: Sequence[int] = TASKS) -> list[Problem]:
    """Return the problems of the text files `qa1_*_train.txt` to `qa20_*_test.txt` of a folder.

    Raises:
        MoREError: A file is missing, or a line is not in bAbI's format.
    """
    problems: list[Problem] = []
    for task in tasks:
        paths = sorted(Path(folder).glob(f"qa{task}_*_{split}.txt"))
        if not paths:
            raise MoREError(f"there is no qa{task}_*_{split}.txt in {folder}: name the folder of bAbI's text files")
        problems += _problems(paths[0], f"babi_{task}")
    return problems


def _problems(path: Path, task: str) -> Iterator[Problem]:
    story: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise MoREError(f"{path} cannot be read ({error}): fetch it again") from error
    for number, line in enumerate(lines, 1):
        parts = line.rstrip().split("\t")
        match = _LINE.fullmatch(parts[0].strip())
        if match is None or len(parts) not in (1, 3) or (len(parts) == 3 and not parts[1].strip()):
            raise MoREError(f"{path}: line {number} is not `N fact` or `N question TAB answer TAB facts`: mend it")
        if match[1] == "1":
            story = []
        if len(parts) == 1:
            story.append(match[2].strip())
        else:
            yield Problem.ask(match[2].strip(), parts[1].strip(), task, len(parts[2].split()), story)


def fetch_babi(split: Split, tasks: Sequence[int] = TASKS) -> list[Problem]:
    """Return the problems from the Hugging Face hub.

    Raises:
        MoREError: It cannot be reached.
    """
    from datasets import load_dataset

    with fetching(_HUB):
        rows = load_dataset(_HUB, split=str(split))
    problems = []
    for row in (row for row in rows if int(row["task"]) in tasks):
        story = map(str.strip, row["passage"].strip().splitlines())
        problems.append(Problem.ask(row["question"].strip(), row["answer"].strip(), f"babi_{row['task']}", 0, story))
    return problems
