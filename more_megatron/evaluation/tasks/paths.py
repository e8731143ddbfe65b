"""Ways between rooms, as in bAbI 19 and longer. Difficulty: steps of the way.

The rooms are a tree on a grid, so there is one way. The facts come in random order, and some lead elsewhere.
"""

from __future__ import annotations

import random

from more_megatron.evaluation.tasks.generation import Generator
from more_megatron.evaluation.tasks.problem import Problem

__all__ = ["GENERATOR"]

_ROOMS = (
    "attic", "balcony", "bathroom", "bedroom", "cellar", "garage", "garden", "hallway",
    "kitchen", "laundry", "library", "nursery", "office", "pantry", "porch", "studio",
)  # fmt: skip
_STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
_ELSEWHERE = 2

Place = tuple[int, int]


def _draw(source: random.Random, difficulty: int) -> Problem:
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


GENERATOR = Generator(_draw, trained=range(1, 5), beyond=range(5, 9))
