"""Operations one after the other, each on the result of the one before. Difficulty: their number."""

from __future__ import annotations

import random

from more_megatron.evaluation.tasks.generation import Generator
from more_megatron.evaluation.tasks.problem import Problem

__all__ = ["GENERATOR"]

_LARGEST = 99


def _draw(source: random.Random, difficulty: int) -> Problem:
    value = source.randint(0, _LARGEST)
    parts = [f"Start with {value}"]
    for _ in range(difficulty):
        part, value = source.choice(_operations(source, value))
        parts.append(part)
    return Problem.ask(f"{', '.join(parts)}. What is the result?", value, "chains", difficulty)


def _operations(source: random.Random, value: int) -> list[tuple[str, int]]:
    """Return operations whose result stays in the range, with their results."""
    number = source.randint(1, 9)
    operations = [
        (f"add {number}", value + number),
        (f"subtract {number}", value - number),
        (f"take it from {_LARGEST}", _LARGEST - value),
        ("double it", 2 * value),
    ]
    return [(part, result) for part, result in operations if 0 <= result <= _LARGEST]


GENERATOR = Generator(_draw, trained=range(1, 7), beyond=range(7, 13))
