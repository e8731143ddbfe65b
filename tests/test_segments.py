"""Variable-length sequences in the padded layout and back."""

from __future__ import annotations

import itertools

import pytest
import torch

from more_megatron.segments import Segments


def _segments(lengths: list[int]) -> Segments:
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Segments(offsets, longest=max([*lengths, 8]))


@pytest.mark.parametrize("lengths", [[3, 1, 4], [0, 2, 0, 0, 5, 0], [1], [0, 0], [], [6, 6]], ids=str)
def test_padding_lays_each_segment_in_a_row_of_its_own(lengths: list[int]) -> None:
    segments, present = _segments(lengths), [length for length in lengths if length > 0]
    rows = torch.arange(1.0, sum(lengths) * 6 + 1).view(sum(lengths), 2, 3)
    padded = segments.pad(rows)
    longest = max(present, default=0)
    assert padded.shape == (len(present), 2, longest, 3)
    for index, part in enumerate(rows.split(present) if present else []):
        assert torch.equal(padded[index, :, : len(part)].transpose(0, 1), part)
        assert torch.count_nonzero(padded[index, :, len(part) :]) == 0
    assert torch.equal(segments.unpad(padded), rows)


def test_gradients_go_both_ways() -> None:
    segments = _segments([2, 0, 3])
    rows = torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: segments.unpad(segments.pad(x) * 2.0), rows)


def test_what_lies_in_the_padding_goes_nowhere() -> None:
    segments = _segments([1, 3])
    padded = segments.pad(torch.ones(4, 1, 1))
    padded[0, :, 1:] = torch.nan
    assert torch.equal(segments.unpad(padded), torch.ones(4, 1, 1))
