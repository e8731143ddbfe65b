"""Stand-ins inside Megatron: places where replacing `torch.cuda` is not enough.

Importing this module imports `megatron.training`; it is only read when a run starts.
"""

from typing import Any

import torch

from more_megatron.platform.stand_in import Table

MEGATRON_ON_CPU = Table()


@MEGATRON_ON_CPU.surrounds(
    "megatron.training.training:initialize_megatron",
    why="`pretrain` has no argument that lets a run start without CUDA",
    text='assert torch.cuda.is_available(), "Megatron requires CUDA."',
    file="training/initialize.py",
)
def _initialize_megatron(former: Any, *args: Any, **kwargs: Any) -> Any:
    return former(*args, **kwargs, allow_no_cuda=True)


@MEGATRON_ON_CPU.replaces(
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
    why="tracked random states are read from the GPU's generator",
    text="torch.cuda.random.get_rng_state(device=device)",
)
def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.default_generator.get_state()


@MEGATRON_ON_CPU.replaces(
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    why="tracked random states are set on the GPU's generator",
    text="_lazy_call(cb)",
)
def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


@MEGATRON_ON_CPU.replaces(
    "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
    why="the split sizes of the all-to-all stay tensors where no copy from a GPU turns them into numpy",
    text="if torch.is_tensor(tensor) and tensor.is_cuda:",
    file="core/transformer/moe/moe_utils.py",
)
def _move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@MEGATRON_ON_CPU.surrounds(
    "torch.utils.data.dataloader:_BaseDataLoaderIter.__init__",
    why="it draws from the CPU's generator, which is the one for dropout here: a resumed run would drop others",
    text="torch.utils.data.DataLoader(",
    file="training/datasets/data_samplers.py",
)
def _start_data_iterator(former: Any, *args: Any, **kwargs: Any) -> None:
    state = torch.default_generator.get_state()
    former(*args, **kwargs)
    torch.default_generator.set_state(state)
