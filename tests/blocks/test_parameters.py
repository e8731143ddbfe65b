"""Weights of several experts in one tensor: their shapes, their marks, and their place in checkpoints."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.errors import MoREError
from more_megatron.model.initialization import BlockInitializer
from tests.helpers.models import small_config, start_ranks
from tests.helpers.ranks import run_ranks

_EXPERTS = 4
# Shape of one expert's weight and the dimension that is split over ranks.
_WEIGHTS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "wide": ((6, 4), 0),
    "long": ((3, 8), 1),
    "gated": ((2, 6, 4), 1),
    "whole": ((5, 3), None),
    "norm": ((7,), None),
}
# The same of biases, which are laid out flat on a rank.
_BIASES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "split_bias": ((6,), 0),
    "gates_bias": ((4, 6), 1),
    "whole_bias": ((5,), None),
}


@dataclass(frozen=True)
class _Group:
    """A process group as a placement sees it."""

    ranks: int
    own: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def _whole(name: str, expert: int) -> torch.Tensor:
    """Return an expert's weight, of numbers that occur once."""
    everything = _WEIGHTS | _BIASES
    shape, number = everything[name][0], list(everything).index(name)
    size = torch.Size(shape).numel()
    return torch.arange(float(size)).view(shape) + 1000 * expert + 100_000 * number


def _draw(initializer: BlockInitializer, shape: tuple[int, ...], name: str) -> torch.Tensor:
    weight, expert = name.split("/")
    assert _whole(weight, int(expert)).shape == shape
    return _whole(weight, int(expert))


def _module(placement: Placement) -> GroupedModule:
    module = GroupedModule(small_config("recurrent_experts"), placement)
    for name, (shape, split_dim) in (_WEIGHTS | _BIASES).items():
        create = module.stacked_bias if name in _BIASES else module.stacked_weight
        module.register_parameter(name, create(Weight(shape, f"{name}/{{}}", _draw, split_dim)))
    module.initialize(1)
    return module


def _placements(expert_ranks: int, split: int) -> list[Placement]:
    local = _EXPERTS // expert_ranks
    return [
        Placement(range(rank * local, (rank + 1) * local), _EXPERTS, _Group(split, part), replica_rank=0)
        for rank, part in itertools.product(range(expert_ranks), range(split))
    ]


def _slices(prefix: str = "", layer: tuple = ()) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Return each global tensor as it comes together from the slices of all ranks, for each placement."""
    start_ranks()
    metadata = {"dp_cp_group": torch.distributed.group.WORLD}
    found = {}
    for expert_ranks, split in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        together: dict[str, torch.Tensor] = {}
        for placement in _placements(expert_ranks, split):
            module = _module(placement)
            for key, shard in module.sharded_state_dict(prefix, layer, metadata).items():
                _lay(together, key, shard.build() if isinstance(shard, ShardedTensorFactory) else shard)
        found[expert_ranks, split] = together
    return found


def _lay(together: dict[str, torch.Tensor], key: str, shard: ShardedTensor) -> None:
    target = together.setdefault(key, torch.full(shard.global_shape, torch.nan))
    assert target.shape == torch.Size(shard.global_shape)
    place = tuple(
        slice(start, start + size)
        for start, size in zip(shard.global_offset, (1,) * shard.prepend_axis_num + shard.local_shape, strict=True)
    )
    values = shard.data.detach().view(target[place].shape)
    # Every number is written once, but for replicas, which write the same.
    is_main = set(shard.replica_id) == {0}
    assert torch.isnan(target[place]).all() if is_main else torch.equal(target[place], values)
    target[place] = values


def test_slices_of_all_ranks_make_the_same_tensor_under_every_placement() -> None:
    (found,) = run_ranks(1, _slices, "experts.")
    for together in found.values():
        assert set(together) == {f"experts.{name}" for name in _WEIGHTS | _BIASES}
        for name in _WEIGHTS | _BIASES:
            experts = [_whole(name, expert) for expert in range(_EXPERTS)]
            expected = torch.cat(experts) if name == "norm" else torch.stack(experts)
            assert torch.equal(together[f"experts.{name}"], expected)


def test_layers_are_an_axis_before_the_experts() -> None:
    (found,) = run_ranks(1, _slices, "", ((0, 1, 3),))
    for together in found.values():
        assert together["wide"].shape == (3, _EXPERTS, 6, 4)
        assert torch.equal(together["wide"][1, 2], _whole("wide", 2))
        assert torch.isnan(together["wide"][[0, 2]]).all()


def _marks() -> None:
    start_ranks()
    config = small_config("recurrent_experts")
    split = GroupedModule(config, Placement(range(2), 2, _Group(2, 1), 0))
    whole = GroupedModule(config, Placement(range(2), 2, None, 0))

    def weight(shape: tuple[int, ...], split_dim: int | None = None) -> Weight:
        return Weight(shape, "", BlockInitializer.zeros, split_dim)

    parameter = split.stacked_weight(weight((6, 4), 0))
    assert parameter.shape == (2, 3, 4)
    assert parameter.tensor_model_parallel
    assert parameter.partition_dim == 1
    for module, split_dim in ((whole, 0), (split, None)):
        parameter = module.stacked_weight(weight((6, 4), split_dim))
        assert parameter.shape == (2, 6, 4)
        assert not parameter.tensor_model_parallel
    # Megatron decays no parameter of one dimension.
    assert split.stacked_weight(weight((5,))).shape == (10,)
    bias = split.stacked_bias(weight((4, 6), 1))
    assert bias.shape == (2 * 4 * 3,)
    assert bias.tensor_model_parallel
    assert not split.stacked_bias(weight((6,))).tensor_model_parallel
    with pytest.raises(MoREError, match="--expert-tensor-parallel-size"):
        split.stacked_weight(weight((5, 4), 0))


def test_shapes_and_marks_are_what_megatron_reads() -> None:
    run_ranks(1, _marks)


def _replicas() -> None:
    start_ranks()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    one, four = (Placement(range(1), 1, _Group(ranks, 0), replica_rank=0) for ranks in (1, 4))
    assert one.enter(x) is x
    assert one.leave(x) is x
    # Four ranks: a dispatcher hands `x` to all of them, and adds up their outputs and their gradients.
    output = sum(four.leave(four.enter(x).square()) for _ in range(4))
    torch.testing.assert_close(output, x.square())
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, 2.0 * x)


def test_replicas_are_parts_of_a_sum() -> None:
    run_ranks(1, _replicas)
