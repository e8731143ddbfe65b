"""Variable-length sequences in the padded layout and back."""

import itertools

import pytest
import torch

from more_megatron.blocks.rows import Segments


def _segments(lengths: list[int]) -> Segments:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Segments(offsets, longest=max([*lengths, 8]))


@pytest.mark.parametrize("lengths", [[3, 1, 4], [0, 2, 0, 0, 5, 0], [1], [0, 0], [], [6, 6]], ids=str)
def test_padding_lays_each_segment_in_a_row_of_its_own(lengths: list[int]) -> None:
    segments, present = _segments(lengths), [length for length in lengths if length > 0]
    rows = torch.arange(1.0, sum(lengths) * 6 + 1).view(sum(lengths), 2, 3)
    rectangles = segments.pad(rows)
    assert sum(len(rectangle) for rectangle in rectangles) == len(present)
    found = [row for rectangle in rectangles for row in rectangle.transpose(1, 2)]
    for part in rows.split(present) if present else []:
        [row] = [row for row in found if torch.equal(row[: len(part)], part)]
        assert torch.count_nonzero(row[len(part) :]) == 0
    assert torch.equal(segments.unpad(rectangles), rows)


def test_short_segments_are_not_padded_to_the_length_of_long_ones() -> None:
    lengths = [50, 3, 2, 40, 1, 60, 58, 9]
    rectangles = _segments(lengths).pad(torch.ones(sum(lengths), 1, 1))
    assert [tuple(rectangle.shape[::2]) for rectangle in rectangles] == [(2, 2), (2, 9), (2, 50), (2, 60)]


def test_gradients_go_both_ways() -> None:
    segments = _segments([2, 0, 3])
    rows = torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segments.unpad(2.0 * part for part in segments.pad(x)), rows)


def test_what_lies_in_the_padding_goes_nowhere() -> None:
    segments = _segments([1, 2, 3, 9])
    rectangles = segments.pad(torch.ones(15, 1, 1))
    for rectangle in rectangles:
        rectangle[rectangle == 0.0] = torch.nan
    assert torch.equal(segments.unpad(rectangles), torch.ones(15, 1, 1))
