"""LSTMs along segments, one set of weights for each group of segments, all segments advancing together.

At a time step the segments that are not over form a rectangle, groups by segments, sorted so that the long ones come
first in both directions: a step is one batched product over the groups that are left. Beside these products and what
depends on the step before, everything is computed for all steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from more_megatron.blocks.rows import Segments


@dataclass(frozen=True)
class TimeSteps:
    """Where the rows of segments lie when they are laid out by time step, the rectangles of the steps end to end."""

    groups: list[int]  # number of groups that are not over at each step, descending
    segments: list[int]  # largest number of a group's segments that are not over at each step, descending
    order: torch.Tensor  # group in each line of the rectangles, int64 [groups]
    rows: torch.Tensor | None  # rows that are laid out, int64 [rows here]; None if all are
    places: torch.Tensor  # place of each of these rows, int64 [rows here]
    former: torch.Tensor  # for each place the one of the step before, int64 [places]; -1 in the first step

    @classmethod
    def of(cls, segments: Segments, groups: int, part: int = 0, parts: int = 1) -> TimeSteps:
        """Return the layout of segments.

        Args:
            segments: The same number for each group, sorted by group. The device is waited for.
            groups: Number of groups.
            part: Number of the part wanted; a group's segments are dealt out to the parts, the longest first.
            parts: Number of parts.
        """
        device, lengths = segments.offsets.device, segments.offsets.diff().long().view(groups, -1).cpu()
        lengths = torch.nn.functional.pad(lengths, (0, -lengths.size(1) % parts))
        by_length = lengths.argsort(dim=1, descending=True, stable=True)
        rank = by_length.argsort(dim=1)  # place of each segment among those of its group
        sizes = lengths.gather(1, by_length)[:, part::parts]
        order = sizes[:, 0].argsort(descending=True, stable=True)
        # As many lines and columns as have a segment that is longer.
        time = torch.arange(int(sizes.max())).unsqueeze(1)
        lines, columns = (sizes.amax(1) > time).sum(1), (sizes.amax(0) > time).sum(1)
        starts = torch.nn.functional.pad((lines * columns).cumsum(0), (1, 0))
        lengths = lengths.flatten()
        segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        within = torch.arange(len(segment)) - (lengths.cumsum(0) - lengths)[segment]
        rows = None
        if parts > 1:
            rows = (rank.flatten()[segment] % parts == part).nonzero().flatten()
            segment, within = segment[rows], within[rows]
        line, column = order.argsort()[segment // rank.size(1)], rank.flatten()[segment] // parts
        places = starts[within] + line * columns[within] + column
        tensors = (order, places, cls._former(lines, columns, starts))
        order, places, former = (x.to(device, non_blocking=True) for x in tensors)
        rows = None if rows is None else rows.to(device, non_blocking=True)
        return cls(lines.tolist(), columns.tolist(), order, rows, places, former)

    @staticmethod
    def _former(lines: torch.Tensor, columns: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        time = torch.repeat_interleave(torch.arange(len(lines)), lines * columns)
        within = torch.arange(len(time)) - starts[time]
        line, column = within // columns[time], within % columns[time]
        before = (time - 1).clamp(min=0)
        return torch.where(time > 0, starts[before] + line * columns[before] + column, -1)

    @property
    def num_places(self) -> int:
        """Number of places, those without a row among them."""
        return len(self.former)

    def lay(self, x: torch.Tensor) -> torch.Tensor:
        """Return [places, n] with zeros in places without a row, given [rows, n]."""
        x = x if self.rows is None else x.index_select(0, self.rows)
        return x.new_zeros(self.num_places, x.size(1)).index_copy_(0, self.places, x)

    def collect(self, laid: torch.Tensor, rows: int) -> torch.Tensor:
        """Return [rows, n] with zeros in rows that are not laid out, given [places, n]."""
        x = laid.index_select(0, self.places)
        return x if self.rows is None else x.new_zeros(rows, x.size(1)).index_copy_(0, self.rows, x)

    def before(self, laid: torch.Tensor) -> torch.Tensor:
        """Return what was in the places of the step before, zeros in the first, [places, n]."""
        return laid.index_select(0, self.former.clamp(min=0)).masked_fill_((self.former < 0).unsqueeze(1), 0.0)

    def rectangles(self, *laid: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Return each step's part of tensors, [groups, segments, n] each, given [places, n]."""
        shapes = list(zip(self.groups, self.segments, strict=True))
        sizes = [lines * columns for lines, columns in shapes]
        parts = [
            [part.view(*shape, part.size(1)) for part, shape in zip(x.split(sizes), shapes, strict=True)] for x in laid
        ]
        return list(zip(*parts, strict=True))


class _SegmentLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, products: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, steps: TimeSteps
    ) -> torch.Tensor:
        # Half precision rounds a gate that keeps nearly all to one that keeps all, and loses small sums beside large.
        gates = steps.lay(products.to(torch.promote_types(products.dtype, torch.float32)))
        cells = gates.new_empty(steps.num_places, gates.size(1) // 4)
        hidden = torch.empty_like(cells, dtype=products.dtype)
        _run(steps, weight.index_select(0, steps.order), gates, hidden, cells)
        output = steps.collect(hidden, len(products))
        ctx.save_for_backward(weight, ends, gates, cells, hidden)
        ctx.steps = steps
        return output

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[Any, ...]:
        weight, ends, gates, cells, hidden = ctx.saved_tensors
        steps: TimeSteps = ctx.steps
        laid = steps.lay(grad.to(gates.dtype))
        grads = _run_back(steps, weight.index_select(0, steps.order), gates, cells, laid)
        grad_products = steps.collect(grads, len(grad)).to(grad.dtype)
        former = steps.collect(steps.before(hidden), len(grad))
        grad_weight = torch.nn.functional.grouped_mm(grad_products.t(), former, offs=ends)
        return grad_products, grad_weight, None, None


def _run(
    steps: TimeSteps, weight: torch.Tensor, gates: torch.Tensor, hidden: torch.Tensor, cells: torch.Tensor
) -> None:
    """Run through the steps: activate the gates in place, and fill in hidden and cell states."""
    size, weight = hidden.size(1), weight.transpose(1, 2)
    former: tuple[torch.Tensor, torch.Tensor] | None = None
    for gate, shown, cell in steps.rectangles(gates, hidden, cells):
        lines, columns = gate.shape[:2]
        if former is not None:
            _add_product(gate, former[0][:lines, :columns], weight[:lines])
        gate[..., : 2 * size].sigmoid_()
        gate[..., 2 * size : 3 * size].tanh_()
        gate[..., 3 * size :].sigmoid_()
        write, keep, new, read = gate.chunk(4, dim=-1)
        torch.mul(write, new, out=cell)
        if former is not None:
            cell.addcmul_(keep, former[1][:lines, :columns])
        torch.mul(torch.tanh(cell), read, out=shown)
        former = shown, cell


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a batched product to a total that may be wider than its factors."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def _run_back(
    steps: TimeSteps, weight: torch.Tensor, gates: torch.Tensor, cells: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """Return the gradients of the gates before their activations, [places, 4n], given that of the hidden states."""
    size = cells.size(1)
    factors, through_cell = _factors(gates, cells, steps.before(cells))
    keep = gates[:, size : 2 * size]
    grad_hidden = grad.new_zeros(max(steps.groups, default=0), max(steps.segments, default=0), size)
    grad_cell = torch.zeros_like(grad_hidden)
    parts = steps.rectangles(factors, through_cell, keep.contiguous(), grad)
    for number in range(len(parts) - 1, -1, -1):
        factor, through, kept, own = parts[number]
        lines, columns = own.shape[:2]
        state, cell = grad_hidden[:lines, :columns], grad_cell[:lines, :columns]
        state += own
        cell.addcmul_(state, through)
        factor[..., : 3 * size].unflatten(-1, (3, size)).mul_(cell.unsqueeze(2))
        factor[..., 3 * size :].mul_(state)
        cell.mul_(kept)
        if number > 0:
            state.copy_(torch.bmm(factor.to(weight.dtype), weight[:lines]))
    return factors


def _factors(gates: torch.Tensor, cells: torch.Tensor, former_cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what gradients are multiplied with on their way back, for all steps at once.

    Returns:
        Factors [places, 4n], which times the gradient of the new cell state (i, f and g) or of the hidden state (o) are
        the gradients of the gates before their activations; and factors [places, n], which times the gradient of the
        hidden state are that of the cell state.
    """
    write, keep, new, read = gates.chunk(4, dim=1)
    shown = cells.tanh()
    factors = torch.empty_like(gates)
    of_write, of_keep, of_new, of_read = factors.chunk(4, dim=1)
    torch.mul(write, 1 - write, out=of_write).mul_(new)
    torch.mul(keep, 1 - keep, out=of_keep).mul_(former_cells)
    torch.mul(new, new, out=of_new).neg_().add_(1).mul_(write)
    torch.mul(read, 1 - read, out=of_read).mul_(shown)
    return factors, shown.square_().neg_().add_(1).mul_(read)


def segment_lstm(products: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, steps: TimeSteps) -> torch.Tensor:
    """Return the hidden states of LSTMs along segments, [rows, n], from zero states.

    Args:
        products: Of the inputs with the matrices of i, f, g and o, with biases, [rows, 4n].
        weight: Of the hidden state, [groups, 4n, n].
        ends: End of each group's rows, int32 [groups].
        steps: Layout of the segments.
    """
    return _SegmentLSTM.apply(products, weight, ends, steps)
