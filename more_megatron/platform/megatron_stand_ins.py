"""Stand-ins inside Megatron: places where replacing `torch.cuda` is not enough.

Importing this module imports `megatron.training`; it is only read when a run starts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.training import training
from torch.utils.data.dataloader import _BaseDataLoaderIter

from more_megatron.platform.stand_in import StandIn

__all__ = ["MEGATRON_ON_CPU"]


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_START_DATA_ITERATOR = _BaseDataLoaderIter.__init__


def _start_data_iterator(self: _BaseDataLoaderIter, *args: Any, **kwargs: Any) -> None:
    state = torch.default_generator.get_state()
    _START_DATA_ITERATOR(self, *args, **kwargs)
    torch.default_generator.set_state(state)


MEGATRON_ON_CPU = (
    StandIn(
        "megatron.training.training",
        "initialize_megatron",
        functools.partial(training.initialize_megatron, allow_no_cuda=True),
        "`pretrain` has no argument that lets a run start without CUDA",
        "training/initialize.py",
        'assert torch.cuda.is_available(), "Megatron requires CUDA."',
    ),
    StandIn(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_rng_state,
        "tracked random states are read from the GPU's generator",
        "core/tensor_parallel/random.py",
        "torch.cuda.random.get_rng_state(device=device)",
    ),
    StandIn(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        "tracked random states are set on the GPU's generator",
        "core/tensor_parallel/random.py",
        "_lazy_call(cb)",
    ),
    StandIn(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _move_to_cpu,
        "the split sizes of the all-to-all stay tensors where no copy from a GPU turns them into numpy",
        "core/transformer/moe/moe_utils.py",
        "if torch.is_tensor(tensor) and tensor.is_cuda:",
    ),
    StandIn(
        "torch.utils.data.dataloader:_BaseDataLoaderIter",
        "__init__",
        _start_data_iterator,
        "it draws from the CPU's generator, which is the one for dropout here: a resumed run would drop others",
        "training/datasets/data_samplers.py",
        "torch.utils.data.DataLoader(",
    ),
)
