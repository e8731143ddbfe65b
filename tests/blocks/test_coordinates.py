"""Where each token stands travels with it: every row that reaches an expert is the row that its coordinates name."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from more_megatron.blocks.dispatch import DISPATCHERS, RowMoELayer
from more_megatron.blocks.layer import LayerInputs
from more_megatron.blocks.rows import Rows
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.model.noise import TokenGrid
from tests.helpers.models import EXPERTS, HIDDEN, gpt_model, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH, _BATCH = 8, 2
_TOPK = 2


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1


_LAYOUTS = {
    "one": Layout(),
    "ep2": Layout(expert=2),
    "ep4": Layout(expert=4),
    "tp2 etp2": Layout(tensor=2, expert_tensor=2),
    "tp2 ep2 etp1": Layout(tensor=2, expert=2),
    "tp2 ep2 etp2": Layout(tensor=2, expert=2, expert_tensor=2),
    "tp4 ep2 etp2": Layout(tensor=4, expert=2, expert_tensor=2),
    "tp4 ep4 etp1": Layout(tensor=4, expert=4),
    "ep2 etp2": Layout(expert=2, expert_tensor=2),
}
# What only the whole matrix tries: with the others attention is split more than experts are, less, alike, or not.
_IN_MATRIX = ("ep2", "tp2 ep2 etp2", "tp4 ep2 etp2", "tp4 ep4 etp1")

# Fields of the configuration for each way of dropping tokens; Megatron drops with either dispatcher.
_DROPPING: dict[str, dict[str, Any]] = {
    "dropless": {},
    "dropped by probability": {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "probs"},
    "dropped by position": {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position"},
}


@dataclass
class Arrival:
    """What reached the experts of a rank."""

    hidden_states: torch.Tensor  # rows, [rows, h]: a token's first channels are the place it has in the world
    coordinates: torch.Tensor  # as they came with the rows, [rows, 3]
    rows: Rows  # the rows, sorted
    order: torch.Tensor
    sent: int  # rows that this rank's tokens were sent to
    group: int  # number of the group of ranks that hold the experts together
    experts: int  # first of the local experts


def _layer(layout: Layout, dispatcher: str, dropping: str) -> RowMoELayer:
    config = small_config(
        "recurrent_experts",
        moe_router_topk=_TOPK,
        moe_token_dispatcher_type=dispatcher,
        tensor_model_parallel_size=layout.tensor,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        **_DROPPING[dropping],
    )
    return gpt_model(config, _LENGTH).train().decoder.layers[0].mlp


def _arrival(layout: Layout, dispatcher: str, dropping: str) -> Arrival:
    layer = _layer(layout, dispatcher, dropping)
    hidden, samples = _encoded_tokens(layout)
    # Any routing will do, as long as it is not the same everywhere.
    generator = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
    layer.router.gating = lambda x: torch.randn(*x.shape[:2], EXPERTS, generator=generator)
    seen: dict[str, Any] = {}
    route, send, compute = layer.route, layer.token_dispatcher.dispatch_coordinates, layer._compute_sorted

    def watched_route(*args: Any) -> tuple:
        probs, routing_map = route(*args)
        seen["sent"] = int(routing_map.sum())
        return probs, routing_map

    def watched_send(coordinates: torch.Tensor) -> torch.Tensor:
        seen["coordinates"] = send(coordinates)
        return seen["coordinates"]

    def watched_compute(dispatched: torch.Tensor, probs: torch.Tensor, rows: Rows, order: Any, depth: Depth) -> Any:
        seen.update(hidden_states=dispatched.detach().clone(), rows=rows, order=order)
        return compute(dispatched, probs, rows, order, depth)

    layer.route, layer._compute_sorted = watched_route, watched_compute
    layer.token_dispatcher.dispatch_coordinates = watched_send
    layer(hidden, LayerInputs(MicroBatch(Depth(0, 1), samples)))
    return Arrival(
        **seen,
        group=torch.distributed.get_rank() // (layout.expert * layout.expert_tensor),
        experts=layer.local_expert_indices[0],
    )


def _encoded_tokens(layout: Layout) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return hidden states that say in their first channels sequence, position and sample, and the samples."""
    replica, shard = parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    samples = tuple(1000 + 7 * (replica * _BATCH + index) for index in range(_BATCH))
    length = _LENGTH // layout.tensor
    hidden = torch.zeros(length, _BATCH, HIDDEN)
    for position in range(length):
        for index in range(_BATCH):
            place = [replica * _BATCH + index, shard * length + position, samples[index]]
            hidden[position, index, :3] = torch.tensor(place, dtype=torch.float32)
    return hidden, samples


def _check(arrivals: list[Arrival], layout: Layout, dropping: str) -> None:
    ranks_of_experts = layout.expert * layout.expert_tensor
    sequences = ranks_of_experts // layout.tensor * _BATCH
    for arrival in arrivals:
        places = arrival.hidden_states[:, :3].long()
        # Sequences are numbered within the ranks that share experts.
        coordinates = torch.stack((places[:, 0] % sequences, places[:, 1], places[:, 2]), dim=1)
        assert torch.equal(arrival.coordinates, coordinates)
        _check_sorted(arrival, coordinates, sequences)
    for group in {arrival.group for arrival in arrivals}:
        of_group = [arrival for arrival in arrivals if arrival.group == group]
        received = sum(len(arrival.coordinates) for arrival in of_group)
        # Every rank that holds a part of an expert computes all of its rows.
        assert received == layout.expert_tensor * sum(arrival.sent for arrival in of_group)
        tokens = len(of_group) * _LENGTH // layout.tensor * _BATCH
        assert (received == layout.expert_tensor * tokens * _TOPK) == (dropping == "dropless")
        _check_all_meet(of_group)


def _check_sorted(arrival: Arrival, coordinates: torch.Tensor, sequences: int) -> None:
    rows = arrival.rows
    sequence, position, sample = coordinates[arrival.order].unbind(1)
    assert torch.equal(rows.positions, position)
    assert torch.equal(rows.sample_ids, sample)
    offsets = rows.segments.offsets.tolist()
    assert len(offsets) == len(rows.groups.ends) * sequences + 1
    for number, (start, end) in enumerate(itertools.pairwise(offsets)):
        assert (sequence[start:end] == number % sequences).all()
        assert (rows.group_ids[start:end] == number // sequences).all()
        assert (position[start:end].diff() > 0).all()
    counts = torch.bincount(rows.group_ids, minlength=len(rows.groups.ends))
    assert torch.equal(counts.cumsum(0), rows.groups.ends.long())


def _check_all_meet(arrivals: list[Arrival]) -> None:
    """Check that ranks that hold the same experts hold the same rows, and that no two others hold an expert."""
    by_experts: dict[int, torch.Tensor] = {}
    for arrival in arrivals:
        rows = arrival.hidden_states[arrival.order]
        assert torch.equal(by_experts.setdefault(arrival.experts, rows), rows)


def _arrivals(names: list[str]) -> dict[tuple[str, str, str], Arrival]:
    found = {}
    for name in names:
        layout = _LAYOUTS[name]
        start_ranks(tensor=layout.tensor, expert=layout.expert, expert_tensor=layout.expert_tensor)
        for dispatcher in DISPATCHERS:
            for dropping in _DROPPING:
                found[name, dispatcher, dropping] = _arrival(layout, dispatcher, dropping)
    return found


@pytest.mark.parametrize("ranks", [1, 4])
def test_each_row_that_arrives_is_the_token_that_its_coordinates_name(ranks: int, whole_matrix: bool) -> None:
    names = [name for name in _LAYOUTS if (name == "one") == (ranks == 1) and (whole_matrix or name not in _IN_MATRIX)]
    worlds = run_ranks(ranks, _arrivals, names)
    for case in worlds[0]:
        name, _, dropping = case
        try:
            _check([world[case] for world in worlds], _LAYOUTS[name], dropping)
        except AssertionError as failure:
            raise AssertionError(case) from failure


def test_coordinates_follow_the_order_of_flattened_hidden_states() -> None:
    config, group = SimpleNamespace(sequence_parallel=True, seed=0), SimpleNamespace(rank=lambda: 1)

    def coordinates(shape: tuple[int, ...], sample_ids: tuple[int, ...], first: int) -> list[list[int]]:
        micro_batch = MicroBatch(Depth(0, 1), sample_ids)
        return TokenGrid.of(torch.empty(shape), micro_batch, config, group, first_sequence=first).coordinates.tolist()  # type: ignore[arg-type]

    expected = [[6, 2, 70], [7, 2, 71], [8, 2, 72], [6, 3, 70], [7, 3, 71], [8, 3, 72]]
    assert coordinates((2, 3, 8), (70, 71, 72), 6) == expected
    assert [sample for _, _, sample in coordinates((1, 2, 8), (), 0)] == [0, 0]
