"""`parallel_experts`: each expert mixes a feed-forward network and an LSTM along the tokens that were sent to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Memory
from .context import CallContext
from .experts import CellExperts, MoREMoE, lstm_cell
from .fields import Config
from .interface import System
from .parts import grouped_linear
from .routing import Routing

_GATE_WIDTH = 64
States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TimeOrder:
    """The rows that LSTMs run along, sorted by step, and within a step by expert.

    A segment is what one LSTM runs along: the tokens of one document that were sent to one expert.
    """

    rows: Tensor  # the rows, as `Routing` sorts them, [rows here]
    segments: Tensor  # number of each row's segment, [rows here]
    sizes: list[int]  # number of rows of each step
    ends: Tensor  # end of each expert's rows within each step, int32 [steps, N]
    firsts: Tensor  # first row of each segment, as `Routing` sorts them, [segments]

    @classmethod
    def of(cls, routing: Routing, document: Tensor) -> TimeOrder:
        """Return the order, given the number of each row's document among those of all sequences; below 0: padding."""
        num_experts, rows = len(routing.ends), (document >= 0).nonzero().flatten()
        key = torch.stack((routing.experts[rows], document[rows]), dim=1)
        segment, lengths = torch.unique(key, dim=0, return_inverse=True, return_counts=True)[1:]
        order = (segment * (int(routing.tokens.max()) + 1) + routing.tokens[rows]).argsort()
        rows, segment = rows[order], segment[order]
        starts = lengths.cumsum(0) - lengths
        step = torch.arange(len(rows), device=rows.device) - starts[segment]
        by_step, steps = step.argsort(stable=True), max(lengths.tolist(), default=0)
        places = step * num_experts + routing.experts[rows]
        counts = torch.bincount(places, minlength=steps * num_experts).view(steps, num_experts)
        ends = counts.cumsum(1).to(torch.int32)
        return cls(rows[by_step], segment[by_step], counts.sum(1).tolist(), ends, rows[starts])


class ParallelExperts(CellExperts):
    """y = w0 FFN(x) + w1 LSTM(x), w = softmax(W4 relu(W3 x + b3) + b4)."""

    lstm_state: Tensor
    gate_fc2: Tensor
    gate_fc2_bias: Tensor

    def __init__(self, config: Config) -> None:
        hidden = config.hidden_size
        cell = {"lstm_input": (4, hidden, hidden), "lstm_input_bias": (4, hidden), "lstm_state": (4, hidden, hidden)}
        gate = {"gate_fc1": (_GATE_WIDTH, hidden), "gate_fc1_bias": (_GATE_WIDTH,)}
        super().__init__(config, {**cell, **gate, "gate_fc2": (2, _GATE_WIDTH), "gate_fc2_bias": (2,)})

    def forward(self, rows: Tensor, routing: Routing, order: TimeOrder, states: States) -> tuple[Tensor, States]:
        """Return outputs, [rows, h], and hidden and cell state behind each row, [rows, h] each."""
        states = self.run(rows, routing, order, states)
        inner = self.linear(rows, "gate_fc1", routing).relu().unsqueeze(1)
        logits = (inner * self.gate_fc2[routing.experts]).sum(-1) + self.gate_fc2_bias[routing.experts]
        weights = logits.softmax(-1)
        return weights[:, :1] * self.feed_forward(rows, routing) + weights[:, 1:] * states[0], states

    def run(self, rows: Tensor, routing: Routing, order: TimeOrder, states: States) -> States:
        """Return hidden and cell state behind each row, [rows, h] each, zeros behind padding.

        `states` are those that segments start from, [segments, h] each.
        """
        inputs = self.linear(rows, "lstm_input", routing)[order.rows]
        weight = self.lstm_state.flatten(1, 2)
        hidden, cell = (state.to(inputs.dtype) for state in states)
        passed: list[States] = []
        place = torch.empty(len(hidden), dtype=torch.long, device=rows.device)
        for part, segment, ends in zip(
            inputs.split(order.sizes), order.segments.split(order.sizes), order.ends, strict=True
        ):
            # Where these segments' rows were in the step before.
            at = segment if not passed else place[segment]
            gates = part + grouped_linear(hidden[at], weight, ends)
            hidden, cell = lstm_cell(gates, cell[at])
            place[segment] = torch.arange(len(segment), device=rows.device)
            passed.append((hidden, cell))
        if not passed:
            return torch.zeros_like(rows), torch.zeros_like(rows)
        after = (torch.cat(parts) for parts in zip(*passed, strict=True))
        hidden, cell = (x.new_zeros(rows.shape).index_copy(0, order.rows, x) for x in after)
        return hidden, cell


class ParallelExpertsMoE(MoREMoE):
    """A layer of them. The cache has the states behind every token, so that it can be cut back."""

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: Memory) -> Tensor:
        batch, topk, length = routing.shape
        rows, documents = routing.dispatch(x), _documents(context, batch, x.device)
        document = documents[:, memory.past :].flatten()[routing.tokens]
        order = TimeOrder.of(routing, document)
        first = order.firsts
        starts = self._held(memory, documents, routing.tokens[first] // length, document[first], routing.experts[first])
        output, states = self.experts(rows, routing, order, starts)
        # [b, k, s, h], as keys and values are kept.
        memory.extend("states", *(state[routing.restore].view(batch, topk, length, -1) for state in states))
        memory.extend("experts", routing.chosen.unsqueeze(1), routing.chosen.unsqueeze(1))
        return routing.weigh(output)

    def _held(self, memory: Memory, documents: Tensor, sequence: Tensor, document: Tensor, expert: Tensor) -> States:
        """Return the states that segments go on from: zeros, or those behind the last token in the cache.

        `documents` are those of all tokens, [b, T]; segments are of a sequence, document and expert each.
        """
        held, routed = memory.held("states"), memory.held("experts")
        if held is None or routed is None or held[0].size(2) == 0 or len(sequence) == 0:
            shape, dtype = (len(sequence), self.config.hidden_size), self.experts.lstm_state.dtype
            zeros = torch.zeros(shape, dtype=dtype, device=sequence.device)
            return zeros, zeros
        chosen = routed[0].squeeze(1)[sequence]  # [segments, past, k]
        mine = chosen == expert[:, None, None]
        mine &= (documents[:, : chosen.size(1)][sequence] == document.unsqueeze(1)).unsqueeze(2)
        # The last of them, and the place among the token's experts.
        age = mine.any(-1).flip(1).to(torch.uint8).argmax(1)
        last = chosen.size(1) - 1 - age
        slot = mine[torch.arange(len(last), device=last.device), last].to(torch.uint8).argmax(1)
        found = mine.flatten(1).any(1, keepdim=True)
        hidden, cell = (state[sequence, slot, last] * found for state in held)
        return hidden, cell


def _documents(context: CallContext, batch: int, device: torch.device) -> Tensor:
    """Return the number of each token's document among those of all sequences, [b, T]; -1 for padding."""
    documents = torch.zeros(batch, context.memory.past + context.positions.size(1), dtype=torch.long, device=device)
    if context.documents is not None:
        documents = documents + context.documents
    documents = documents + torch.arange(batch, device=device).unsqueeze(1) * (documents.max() + 1)
    return documents if context.padding is None else documents.masked_fill(context.padding, -1)


# Recurrence runs along the text: the number of steps means nothing, and an LSTM takes as many steps as tokens were sent
# to its expert.
SYSTEM = System(moe_class=ParallelExpertsMoE, experts_class=ParallelExperts, recurrent=False, traceable=False)
