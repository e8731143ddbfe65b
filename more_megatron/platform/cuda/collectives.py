"""Collectives over tensors of unequal size, which NCCL can do and gloo cannot.

Under expert-tensor parallelism the all-to-all dispatcher gathers what each rank received, and that differs. Gloo's
all-to-all does take unequal sizes, so it serves for the others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from more_megatron.platform.stand_in import Table

__all__ = ["UNEVEN_COLLECTIVES"]

UNEVEN_COLLECTIVES = Table()


@UNEVEN_COLLECTIVES.surrounds(
    "torch.distributed",
    "all_gather",
    why="gloo gathers tensors of equal size only",
    text="torch.distributed.all_gather(output_tensor_list, input_, group=group)",
    file="core/tensor_parallel/mappings.py",
)
def _all_gather(
    former: Any, tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Gather as PyTorch does, and also where the ranks' tensors differ in their first dimension."""
    sizes = [len(part) if part.dim() > 0 else 1 for part in tensor_list]
    if async_op or len(set(sizes)) == 1:
        return former(tensor_list, tensor, group=group, async_op=async_op)
    gathered = tensor.new_empty(sum(sizes), *tensor.shape[1:])
    copies = tensor.contiguous().repeat(len(sizes), *(1 for _ in tensor.shape[1:]))
    torch.distributed.all_to_all_single(gathered, copies, sizes, [len(tensor)] * len(sizes), group=group)
    for part, received in zip(tensor_list, gathered.split(sizes), strict=True):
        part.copy_(received)
    return None


@UNEVEN_COLLECTIVES.surrounds(
    "torch.distributed",
    "reduce_scatter",
    why="gloo scatters parts of equal size only",
    text="torch.distributed.reduce_scatter(output, input_tensor_list, group=group)",
    file="core/tensor_parallel/mappings.py",
)
def _reduce_scatter(
    former: Any, output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Sum and scatter as PyTorch does, and also where the parts differ in their first dimension."""
    sizes = [len(part) for part in input_list]
    if args or kwargs.keys() - {"group"} or len(set(sizes)) == 1:
        return former(output, input_list, *args, **kwargs)
    received = output.new_empty(len(sizes) * len(output), *output.shape[1:])
    torch.distributed.all_to_all_single(
        received, torch.cat(input_list), [len(output)] * len(sizes), sizes, group=kwargs.get("group")
    )
    torch.sum(received.view(len(sizes), *output.shape), dim=0, out=output)
    return None
