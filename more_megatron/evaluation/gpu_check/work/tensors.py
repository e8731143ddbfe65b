"""Weights and gradients of a model as checkpoints store them, whatever backend and layout hold them."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel


def sharded(model: GPTModel) -> dict[str, Any]:
    """Return the sharded state of a model."""
    groups = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": groups})


def gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    """Return the gradient of every weight as checkpoints store the weight."""
    found: dict[str, torch.Tensor] = {}
    for value in nested_values(sharded(model)):
        if not isinstance(value, ShardedTensor | ShardedTensorFactory) or value.data is None:
            continue
        if not isinstance(value.data, torch.nn.Parameter):
            continue
        lay(found, replace(value, data=gradient(value.data)))
    return found


def lay(found: dict[str, torch.Tensor], value: ShardedTensor | ShardedTensorFactory | list[ShardedTensor]) -> None:
    """Lay slices where they belong in the whole tensors."""
    if isinstance(value, list):
        for part in value:
            lay(found, part)
    elif isinstance(value, ShardedTensorFactory):
        lay(found, value.build())
    else:
        whole = found.setdefault(value.key, torch.full(value.global_shape, torch.nan))
        sizes = (1,) * value.prepend_axis_num + tuple(value.local_shape)
        place = tuple(slice(start, start + size) for start, size in zip(value.global_offset, sizes, strict=True))
        whole[place] = value.data.detach().view(whole[place].shape).to(whole)


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what the optimizer would see."""
    own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    main: torch.Tensor | None = getattr(parameter, "main_grad", None)
    if main is None:
        return own
    # As in Megatron's hook.
    takes = not getattr(parameter, "grad_added_to_main_grad", False) or getattr(parameter, "zero_out_wgrad", False)
    return main + own if takes else main
