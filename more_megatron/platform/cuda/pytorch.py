"""PyTorch on a CPU where Megatron means GPUs: tensors that are asked for on one, and collectives of unequal size."""

from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

from more_megatron.platform.stand_in import Table

PYTORCH = Table()


def _on_cpu(device: Any) -> Any:
    """Return the CPU for a CUDA device in any of its spellings, anything else as it is."""
    is_cuda = (
        (isinstance(device, str) and device.startswith("cuda"))
        or (isinstance(device, torch.device) and device.type == "cuda")
        or (isinstance(device, int) and not isinstance(device, bool))
    )
    return torch.device("cpu") if is_cuda else device


class CpuInPlaceOfCuda(TorchFunctionMode):
    """While active, `device='cuda'` and its other spellings mean the CPU, and types have the names of CUDA's.

    Megatron names the device in a hundred places (`device='cuda'`, `device=torch.cuda.current_device()`); a mode
    catches them all where a tensor is made or moved. The optimizer and gradient clipping compare names of types.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The mode may be active twice, as in a backward pass.
            return f"torch.cuda.{func(*args).removeprefix('torch.').removeprefix('cuda.')}"
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


_MODE = CpuInPlaceOfCuda()


# PyTorch takes a mode off while it handles a function, and `torch.autograd.backward` is such a function.
@PYTORCH.surrounds(
    "torch.autograd:_engine_run_backward",
    why="what a backward pass calls, recomputation above all, would run without the device mode",
    text="torch.autograd.backward(",
    file="core/tensor_parallel/random.py",
)
def _run_backward_in_mode(former: Any, *args: Any, **kwargs: Any) -> Any:
    with _MODE:
        return former(*args, **kwargs)


def enter_for_good() -> None:
    """Make the mode active in this thread until the process ends."""
    _MODE.__enter__()


# Under expert-tensor parallelism the all-to-all dispatcher gathers what each rank received, and that differs. NCCL does
# that; gloo's all-to-all does take unequal sizes, so it serves for the others.
@PYTORCH.surrounds(
    "torch.distributed:all_gather",
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


@PYTORCH.surrounds(
    "torch.distributed:reduce_scatter",
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
