"""Sets of problems that are generated from a seed, in splits that have no problem in common.

Which split a problem belongs to is a function of the problem itself, so that no seed and no number of problems can
bring one that is trained on into a test. The same words in another order count as the same problem.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from more_megatron.errors import MoREError
from more_megatron.evaluation.tasks.problem import Problem

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
    """How the problems of a set are made: what draws one of a difficulty, and the difficulties of the splits."""

    draw: Callable[[random.Random, int], Problem]
    trained: range
    beyond: range


def generate(generator: Generator, split: Split, count: int, seed: int) -> list[Problem]:
    """Return different problems, as many of each difficulty, in random order: the same ones for the same seed.

    Raises:
        MoREError: If there are not as many.
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
            raise MoREError(f"there are no {count} {split} problems of difficulty {difficulty}: ask for fewer")
    shuffled = list(problems.values())
    source.shuffle(shuffled)
    return shuffled


def _split(problem: Problem) -> Split:
    words = " ".join(sorted(re.findall(r"[\w+-]+", problem.prompt)))
    return Split.TEST if hashlib.blake2b(words.encode()).digest()[0] % _TEST_SHARE == 0 else Split.TRAIN


def _algebra(source: random.Random, difficulty: int) -> Problem:
    """Linear equations in one unknown with a whole solution. Difficulty: steps that isolate it."""
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
    return unknown if summand == 0 else f"{unknown} {'+' if summand > 0 else '-'} {abs(summand)}"


_WORDS_SHARE = 1 / 3
_SUMS = (
    "If you have {a} apples and buy {b} more, how many do you have?",
    "You walked {a} steps yesterday and {b} steps today. How many in total?",
)
_DIFFERENCES = ("A store had {a} items. They sold {b}. How many are left?",)


def _arithmetic(source: random.Random, difficulty: int) -> Problem:
    """Sums and differences, bare and in words. Difficulty: digits of the larger number."""
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


_LARGEST = 99


def _chains(source: random.Random, difficulty: int) -> Problem:
    """Operations one after the other, each on the result of the one before. Difficulty: their number."""
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


_ROOMS = (
    "attic", "balcony", "bathroom", "bedroom", "cellar", "garage", "garden", "hallway",
    "kitchen", "laundry", "library", "nursery", "office", "pantry", "porch", "studio",
)  # fmt: skip
_STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
_ELSEWHERE = 2

Place = tuple[int, int]


def _paths(source: random.Random, difficulty: int) -> Problem:
    """Ways between rooms, as in bAbI 19 and longer. Difficulty: steps of the way.

    The rooms are a tree on a grid, so there is one way. The facts come in random order, and some lead elsewhere.
    """
    way, directions = _walk(source, difficulty)
    rooms = dict(zip(way, source.sample(_ROOMS, len(way)), strict=True))
    facts = [_fact(source, rooms, *step) for step in zip(way, way[1:], directions, strict=False)]
    for room in source.sample([room for room in _ROOMS if room not in rooms.values()], _ELSEWHERE):
        start = source.choice(list(rooms))
        free = [step for step in _STEPS if _after(start, step) not in rooms]
        if free:
            step = source.choice(free)
            rooms[_after(start, step)] = room
            facts.append(_fact(source, rooms, start, _after(start, step), step))
    source.shuffle(facts)
    answer = ",".join(direction[0] for direction in directions)
    question = f"How do you go from the {rooms[way[0]]} to the {rooms[way[-1]]}?"
    return Problem.ask(question, answer, "paths", difficulty, facts)


def _walk(source: random.Random, length: int) -> tuple[list[Place], list[str]]:
    """Return the places of a way that never meets itself, and its directions."""
    while True:
        way: list[Place] = [(0, 0)]
        directions: list[str] = []
        while len(directions) < length:
            free = [step for step in _STEPS if _after(way[-1], step) not in way]
            if not free:
                break
            directions.append(source.choice(free))
            way.append(_after(way[-1], directions[-1]))
        else:
            return way, directions


def _after(place: Place, direction: str) -> Place:
    x, y = _STEPS[direction]
    return place[0] + x, place[1] + y


def _fact(source: random.Random, rooms: dict[Place, str], start: Place, end: Place, direction: str) -> str:
    if source.random() < 0.5:
        start, end, direction = end, start, _OPPOSITE[direction]
    return f"The {rooms[end]} is {direction} of the {rooms[start]}."


GENERATED = {
    "algebra": Generator(_algebra, trained=range(1, 4), beyond=range(4, 5)),
    "arithmetic": Generator(_arithmetic, trained=range(2, 5), beyond=range(5, 7)),
    "chains": Generator(_chains, trained=range(1, 7), beyond=range(7, 13)),
    "paths": Generator(_paths, trained=range(1, 5), beyond=range(5, 9)),
}
"""The sets that are generated."""
