"""Sums and differences, bare and in words. Difficulty: digits of the larger number."""

from __future__ import annotations

import random

from more_megatron.evaluation.tasks.generation import Generator
from more_megatron.evaluation.tasks.problem import Problem

__all__ = ["GENERATOR"]

_WORDS_SHARE = 1 / 3
_SUMS = (
    "If you have {a} apples and buy {b} more, how many do you have?",
    "You walked {a} steps yesterday and {b} steps today. How many in total?",
)
_DIFFERENCES = ("A store had {a} items. They sold {b}. How many are left?",)


def _draw(source: random.Random, difficulty: int) -> Problem:
    large = source.randrange(10 ** (difficulty - 1), 10**difficulty)
    small = source.randrange(10, large + 1)
    if source.random() < _WORDS_SHARE:
        template = source.choice(_SUMS + _DIFFERENCES)
        result = large - small if template in _DIFFERENCES else large + small
        return Problem.ask(template.format(a=large, b=small), result, "word_problems", difficulty)
    first, second = source.sample((large, small), 2)
    sign = source.choice("+-")
    result = first + second if sign == "+" else first - second
    return Problem.ask(f"What is {first} {sign} {second}?", result, "arithmetic", difficulty)


GENERATOR = Generator(_draw, trained=range(2, 5), beyond=range(5, 7))
