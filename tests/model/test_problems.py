"""Problems of one row: each is computed as if it stood alone."""

from types import SimpleNamespace

import torch

from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.model.noise import TokenGrid
from more_megatron.systems import systems
from more_megatron.training.problems import Problems
from tests.helpers.models import HIDDEN, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTH = 12
# Three problems and what fills up the row; one problem that takes all of it.
_STARTS = torch.tensor([[0, 5, 9, 11], [0, _LENGTH, _LENGTH, _LENGTH]])
_DEPTH = Depth(1, 2)


def test_a_record_carries_problems() -> None:
    sent = MicroBatch(_DEPTH, (7, 2**40), _STARTS)
    found = MicroBatch.of_layer(sent.block_kwargs(), None, training=True)  # type: ignore[arg-type]
    assert found == sent
    assert found.starts is not None
    assert found.starts.tolist() == _STARTS.tolist()
    assert found.parts == 4
    assert MicroBatch.of_layer(MicroBatch(_DEPTH, (), _STARTS).block_kwargs(), None, True).sample_ids == (0, 0)  # type: ignore[arg-type]


def test_positions_restart_and_sequences_differ() -> None:
    # The second half of the rows, as under sequence parallelism.
    config, group = SimpleNamespace(sequence_parallel=True, seed=0), SimpleNamespace(rank=lambda: 1)
    micro_batch = MicroBatch(_DEPTH, (3, 4), _STARTS)
    grid = TokenGrid.of(torch.empty(6, 2, HIDDEN), micro_batch, config, group, first_sequence=2)  # type: ignore[arg-type]
    coordinates = grid.coordinates.view(6, 2, 3)
    sequence, position, sample = coordinates.unbind(-1)
    assert position[:, 0].tolist() == [1, 2, 3, 0, 1, 0]
    assert sequence[:, 0].tolist() == [9, 9, 9, 10, 10, 11]
    assert (position[:, 1].tolist(), sequence[:, 1].unique().tolist()) == ([6, 7, 8, 9, 10, 11], [12])
    assert sample.unique().tolist() == [3, 4]


def test_the_attention_mask() -> None:
    problems = Problems(_STARTS, torch.tensor([[0, 1, 0, -1], [2, -1, -1, -1]]), _LENGTH)
    allowed = ~problems.attention_mask[:, 0]
    assert allowed[0, 7].nonzero().flatten().tolist() == [5, 6, 7]
    assert allowed[1].equal(torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).tril())


def _each_alone() -> None:
    start_ranks()
    embeddings = torch.randn(_LENGTH, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    for name in systems():
        config = small_config(name, num_layers=2, moe_router_topk=2, recurrence_state_std=1.0)
        model = gpt_model(config, _LENGTH, weight_std=0.2)
        for is_training in (True, False):
            model.train(is_training)
            ids = (5, 6) if is_training else ()
            depth = _DEPTH if is_training else Depth(3, 0)
            together = logits(model, embeddings, depth, ids, _STARTS)
            for start, end in ((0, 5), (5, 9), (9, 11)):
                alone = logits(model, embeddings[start:end, :1], depth, ids[:1])
                torch.testing.assert_close(
                    together[0, start:end], alone[0], rtol=1e-4, atol=1e-5, msg=f"{name} {start}"
                )
            whole = logits(model, embeddings[:, 1:], depth, ids[1:])
            torch.testing.assert_close(together[1], whole[0], rtol=1e-4, atol=1e-5, msg=name)


def test_each_problem_is_computed_as_if_alone() -> None:
    run_ranks(1, _each_alone)
