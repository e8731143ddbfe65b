"""The curriculum of the mean number of steps."""

import pytest

from more_megatron.curriculum import Curriculum
from more_megatron.errors import MoREError


def test_each_entry_holds_from_its_iteration_on() -> None:
    curriculum = Curriculum("0:1,10:2, 20:4")
    assert [curriculum.at(step) for step in (0, 9, 10, 19, 20, 1_000_000)] == [1, 1, 2, 2, 4, 4]
    assert curriculum.values[-1] == 4


def test_steps_may_shrink() -> None:
    curriculum = Curriculum("0:8,5:2")
    assert [curriculum.at(step) for step in (4, 5)] == [8, 2]
    assert curriculum.values[-1] == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0:1,20:2,10:4", "out of order"),
        ("0:1,10:2,10:4", "out of order"),
        ("5:1,10:2", "0:NUMBER"),
        ("0:0", "'0:0'"),
        ("0:-1", "'0:-1'"),
        ("0:1,ten:2", "'ten:2'"),
        ("0:1,", "''"),
        ("0", "'0'"),
        ("", "''"),
        ("0:1.5", "'0:1.5'"),
    ],
)
def test_a_text_of_another_form_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(MoREError, match="--recurrence-curriculum") as refusal:
        Curriculum(text)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
