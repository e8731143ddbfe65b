"""Linear equations in one unknown with a whole solution. Difficulty: steps that isolate it."""

from __future__ import annotations

import random

from more_megatron.evaluation.tasks.generation import Generator
from more_megatron.evaluation.tasks.problem import Problem

__all__ = ["GENERATOR"]


def _draw(source: random.Random, difficulty: int) -> Problem:
    solution = source.randint(-50, 50)
    left = _side(source, 1 if difficulty == 1 else source.randint(2, 9))
    right = (0, 0)
    if difficulty >= 3:
        right = _side(source, source.choice([factor for factor in range(1, 10) if factor != left[0]]))
    written = _written(*left)
    if difficulty >= 4:
        # The left side is multiplied out in the solution.
        outer = source.randint(2, 9)
        written, left = f"{outer}({written})", (outer * left[0], outer * left[1])
        right = right if right[0] != left[0] else (right[0] - 1, right[1])
    value = left[0] * solution + left[1] - right[0] * solution
    other = str(value) if right[0] == 0 else _written(right[0], value)
    return Problem.ask(f"Solve {written} = {other} for x.", solution, "algebra", difficulty)


def _side(source: random.Random, factor: int) -> tuple[int, int]:
    """Return factor and summand of one side of an equation."""
    return factor, source.choice([-1, 1]) * source.randint(1, 99)


def _written(factor: int, summand: int) -> str:
    unknown = "x" if factor == 1 else f"{factor}x"
    if summand == 0:
        return unknown
    return f"{unknown} {'+' if summand > 0 else '-'} {abs(summand)}"


GENERATOR = Generator(_draw, trained=range(1, 4), beyond=range(4, 5))
