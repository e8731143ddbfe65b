"""Reasoning tasks: what generated problems say is true, splits have none in common, seeds give files bit for bit."""

import hashlib
import re
from pathlib import Path

import pytest

from more_megatron.errors import MoREError
from more_megatron.evaluation.tasks import (
    GENERATED,
    Problem,
    Split,
    generate,
    is_match,
    read_problems,
    write_problems,
)
from more_megatron.evaluation.tasks.babi import fetch_babi, read_babi

BABI = "1 Mary went home.\n2 Where is Mary? \thome\t1\n3 John is in the park.\n4 Where is John?\tpark\t3\n1 It rains.\n"
_STEPS = {"n": (0, 1), "s": (0, -1), "e": (1, 0), "w": (-1, 0)}


def _right(problem: Problem) -> int:
    numbers = [int(number) for number in re.findall(r"\d+", problem.prompt)]
    if "How many are left" in problem.prompt or " - " in problem.prompt:
        return numbers[0] - numbers[1]
    return numbers[0] + numbers[1]


def _solves(problem: Problem) -> bool:
    """Whether the two sides of an equation are equal at the answer, and differ one further on."""
    sides = re.search(r"Solve (.+) = (.+) for x", problem.prompt)
    assert sides is not None
    written = [re.sub(r"(\d)([x(])", r"\1*\2", side) for side in sides.groups()]

    def difference(x: int) -> int:
        return eval(written[0], {"x": x}) - eval(written[1], {"x": x})

    return difference(int(problem.answer)) == 0 != difference(int(problem.answer) + 1)


def _chain(problem: Problem) -> int:
    first, *parts = problem.prompt.removeprefix("Question: Start with ").split(".")[0].split(", ")
    value = int(first)
    for part in parts:
        number = int((re.findall(r"\d+", part) or [0])[0])
        value = {"a": value + number, "s": value - number, "d": 2 * value, "t": number - value}[part[0]]
    return value


def _leads(problem: Problem) -> bool:
    """Whether the answer's steps lead from the one room to the other, by the facts alone."""
    facts = re.findall(r"The (\w+) is (\w)\w+ of the (\w+)", problem.prompt)
    goes = {(start, step): end for end, step, start in facts}
    goes |= {(end, {"n": "s", "s": "n", "e": "w", "w": "e"}[step]): start for end, step, start in facts}
    (room, goal) = re.findall(r"from the (\w+) to the (\w+)\?", problem.prompt)[0]
    for step in problem.answer.split(","):
        room = goes[room, step]
    return room == goal


CHECKS = {
    "algebra": _solves,
    "arithmetic": lambda problem: _right(problem) == int(problem.answer),
    "chains": lambda problem: _chain(problem) == int(problem.answer),
    "paths": _leads,
}


@pytest.mark.parametrize("name", GENERATED)
def test_problems_are_right_and_splits_disjoint(name: str) -> None:
    splits = {split: generate(GENERATED[name], split, 600, seed=1) for split in Split}
    assert all(CHECKS[name](problem) for problems in splits.values() for problem in problems)
    assert all(is_match(f" {problem.answer}\nQ", problem.answer) for problem in splits[Split.BEYOND])
    prompts = {split: {problem.prompt for problem in problems} for split, problems in splits.items()}
    assert all(len(of_split) == 600 for of_split in prompts.values())
    # Whatever the seed, no test problem is trained on.
    trained = prompts[Split.TRAIN] | {p.prompt for p in generate(GENERATED[name], Split.TRAIN, 600, seed=2)}
    assert not trained & prompts[Split.TEST]
    assert len(trained) > 600
    trained_difficulties = {problem.difficulty for problem in splits[Split.TRAIN]}
    assert trained_difficulties == {problem.difficulty for problem in splits[Split.TEST]}
    assert min(p.difficulty for p in splits[Split.BEYOND]) > max(trained_difficulties)


def test_a_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name, generator in GENERATED.items():
        write_problems(tmp_path / f"{name}.jsonl", generate(generator, Split.TEST, 50, seed=7))
        assert read_problems(tmp_path / f"{name}.jsonl") == generate(generator, Split.TEST, 50, seed=7)
    together = b"".join((tmp_path / f"{name}.jsonl").read_bytes() for name in sorted(GENERATED))
    assert hashlib.sha256(together).hexdigest()[:16] == "73ca573dec3a9644"


def test_there_may_be_too_few() -> None:
    with pytest.raises(MoREError, match="difficulty 1: ask for fewer"):
        generate(GENERATED["algebra"], Split.TEST, 50000, seed=1)


def test_babi_is_read(tmp_path: Path) -> None:
    path = tmp_path / "qa1_facts_train.txt"
    path.write_text(BABI)
    prompt = "Mary went home.\nJohn is in the park.\nQuestion: Where is John?\nAnswer:"
    assert read_babi(tmp_path, Split.TRAIN, [1])[1] == Problem(prompt, "park", "babi_1", 1)
    with pytest.raises(MoREError, match=r"no qa2_\*_train.txt"):
        read_babi(tmp_path, Split.TRAIN, [1, 2])
    path.write_text(BABI + "2 Where is Mary?\thome\n")
    with pytest.raises(MoREError, match="line 6 is not"):
        read_babi(tmp_path, Split.TRAIN, [1])


def test_babi_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MoREError, match="no network; give local files"):
        fetch_babi(Split.TEST)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"prompt": "1 + 1", "answer": 2, "task": "sums", "difficulty": 1}', "line 2 has no usable answer"),
        ('{"prompt": "1 + 1", "answer": " ", "task": "sums"}', "line 2 has no usable difficulty, answer"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "problems.jsonl"
    write_problems(path, [Problem("1 + 1 =", "2", "sums", 1)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(MoREError, match=message):
        read_problems(path)


def test_a_text_may_hold_any_mark_of_a_line_end(tmp_path: Path) -> None:
    problems = [Problem("one\u2028two\x85three\r\nfour\x0bWhich?", "fi\u2029ve", "lines", 1)]
    write_problems(tmp_path / "lines.jsonl", problems)
    assert read_problems(tmp_path / "lines.jsonl") == problems


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(MoREError, match="cannot be read"):
        read_problems(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(MoREError, match="is empty"):
        read_problems(tmp_path / "empty.jsonl")


def test_answers_match_up_to_a_full_stop_or_newline() -> None:
    assert is_match(" Kitchen. Then", "kitchen")
    assert is_match("s,e\nQuestion", "s,e")
    assert not is_match("kitchens", "kitchen")
