"""LSTMs along segments of any length, against PyTorch's own along one segment at a time."""

import itertools

import pytest
import torch

from more_megatron.blocks.rows import Segments
from more_megatron.blocks.segment_lstm import TimeSteps, segment_lstm

_SIZE = 8
# Lengths of the segments of each group.
_LENGTHS = [
    [[3, 0, 4], [1, 0, 0], [5, 2, 2]],
    [[7]],
    [[0], [0]],
    [[0, 0], [5, 1]],
    [[1, 1, 1], [1, 9, 1]],
    [[2], [2], [2], [2]],
    [[0, 30, 1, 0], [2, 0, 0, 29]],
]


def _one_at_a_time(products: torch.Tensor, weight: torch.Tensor, lengths: list[list[int]]) -> torch.Tensor:
    """Return the hidden states, PyTorch's LSTM given the products as its input."""
    outputs, rows = [products[:0, :_SIZE]], iter(products.split([n for group in lengths for n in group]))
    for group, sizes in enumerate(lengths):
        parameters = {
            "weight_ih_l0": torch.eye(4 * _SIZE),
            "weight_hh_l0": weight[group],
            "bias_ih_l0": torch.zeros(4 * _SIZE),
            "bias_hh_l0": torch.zeros(4 * _SIZE),
        }
        for _ in sizes:
            segment = next(rows)
            if len(segment) > 0:
                lstm = torch.nn.LSTM(4 * _SIZE, _SIZE)
                outputs.append(torch.func.functional_call(lstm, parameters, (segment,))[0])
    return torch.cat(outputs)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("lengths", _LENGTHS, ids=str)
def test_all_segments_together_equal_one_at_a_time(lengths: list[list[int]], parts: int) -> None:
    flat = [length for group in lengths for length in group]
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(sum(flat), 4 * _SIZE, generator=generator).requires_grad_()
    weight = (0.4 * torch.randn(len(lengths), 4 * _SIZE, _SIZE, generator=generator)).requires_grad_()
    offsets = torch.tensor([0, *itertools.accumulate(flat)], dtype=torch.int32)
    ends = offsets[len(lengths[0]) :: len(lengths[0])].contiguous()
    steps = [TimeSteps.of(Segments(offsets, 99), len(lengths), part, parts) for part in range(parts)]
    outputs = torch.stack([segment_lstm(products, weight, ends, part) for part in steps])
    # Each segment is run by one of the parts.
    assert (outputs.detach().abs().amax(-1) > 0).sum(0).eq(1).all()
    expected = _one_at_a_time(products, weight, lengths)
    torch.testing.assert_close(outputs.sum(0), expected, rtol=1e-5, atol=1e-6)
    weighing = torch.randn(expected.shape, generator=generator)
    gradients = [
        torch.autograd.grad((output * weighing).sum(), [products, weight], allow_unused=True)
        for output in (outputs.sum(0), expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-5, atol=1e-5)


def test_a_step_has_room_for_the_segments_that_are_left() -> None:
    offsets = torch.tensor([0, 3, 3, 7, 8, 8, 8], dtype=torch.int32)
    steps = TimeSteps.of(Segments(offsets, 99), groups=2)
    assert steps.groups == [2, 1, 1, 1]
    assert steps.segments == [2, 2, 2, 1]
    assert steps.num_places == 4 + 2 + 2 + 1
    assert sorted(set(steps.places.tolist())) == sorted(steps.places.tolist())


def test_half_precision_keeps_what_long_segments_gather() -> None:
    generator, length = torch.Generator().manual_seed(0), 600
    products = torch.randn(length, 4 * _SIZE, generator=generator)
    # Little is written in each step, and nearly all of it kept.
    products[:, :_SIZE] -= 6.0
    products[:, _SIZE : 2 * _SIZE] += 8.0
    products[:, 2 * _SIZE : 3 * _SIZE] = products[:, 2 * _SIZE : 3 * _SIZE].abs()
    weight = 0.1 * torch.randn(1, 4 * _SIZE, _SIZE, generator=generator)
    offsets, ends = torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    steps, found = TimeSteps.of(Segments(offsets, length), groups=1), []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (products, weight)]
        output = segment_lstm(*leaves, ends, steps)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        found.append([output.float(), *(leaf.grad.float() for leaf in leaves)])
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.03 * exact.norm()
