"""Problems from a seed, in splits that have no problem in common.

Which split a problem belongs to is a function of the problem itself, so that no seed and no number of problems can
bring one that is trained on into a test. The same words in another order count as the same problem.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from more_megatron.data.errors import DataError
from more_megatron.evaluation.tasks.problem import Problem

__all__ = ["Generator", "Split", "generate"]

# One problem in so many is for tests.
_TEST_SHARE = 8
# Draws for each problem wanted before a difficulty counts as exhausted.
_PATIENCE = 1000


class Split(StrEnum):
    """What problems are for."""

    TRAIN = "train"
    TEST = "test"
    BEYOND = "beyond"


@dataclass(frozen=True)
class Generator:
    """How the problems of a set are made.

    Attributes:
        draw: Returns a problem of a difficulty.
        trained: Difficulties of training and test.
        beyond: Difficulties beyond those of training.
    """

    draw: Callable[[random.Random, int], Problem]
    trained: range
    beyond: range


def generate(generator: Generator, split: Split, count: int, seed: int) -> list[Problem]:
    """Return different problems, as many of each difficulty, in random order.

    Args:
        generator: How they are made.
        split: What they are for.
        count: How many.
        seed: The same seed gives the same problems.

    Raises:
        DataError: If there are not as many.
    """
    source = random.Random(f"{split}/{seed}")
    difficulties = generator.beyond if split is Split.BEYOND else generator.trained
    problems: dict[str, Problem] = {}
    for index in range(count):
        difficulty = difficulties[index % len(difficulties)]
        for _ in range(_PATIENCE):
            problem = generator.draw(source, difficulty)
            if problem.prompt not in problems and (split is Split.BEYOND or _split(problem) is split):
                problems[problem.prompt] = problem
                break
        else:
            raise DataError(f"there are no {count} {split} problems of difficulty {difficulty}: ask for fewer")
    shuffled = list(problems.values())
    source.shuffle(shuffled)
    return shuffled


def _split(problem: Problem) -> Split:
    words = " ".join(sorted(re.findall(r"[\w+-]+", problem.prompt)))
    return Split.TEST if hashlib.blake2b(words.encode()).digest()[0] % _TEST_SHARE == 0 else Split.TRAIN
