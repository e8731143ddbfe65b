"""Tensors of a CPU that pass for a GPU's: who mixes them with the host's, and who lets the host wait for them.

Storages are told apart by where they would be. What a GPU's kernels compute is computed here by the CPU's.
"""

import collections
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from more_megatron.platform.cuda.pytorch import _on_cpu

_Tensor, _CPU, _GPU = torch.Tensor, torch.device("cpu"), torch.device("cuda:0")
# Operations whose result has a size that only the device knows, or that is a number.
_WAITING = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "unique_dim", "_unique2"}
_GETTERS = {getattr(_Tensor, name).__get__: name for name in ("device", "is_cuda", "is_cpu")}
_FROM_HOST = (torch.tensor, torch.as_tensor, _Tensor.new_tensor)


class ImitatedGPU(TorchFunctionMode):
    """While active, tensors that are asked for on a GPU pass for being there; `faults` counts what was done where."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: collections.Counter[str] = collections.Counter()
        self._here: set[int] = set()
        self._below = _Below(self)

    def take(self, module: torch.nn.Module) -> None:
        """Let the tensors of a module pass for being on the GPU."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.put(tensor, True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Be active inside the block, in backward passes too."""
        run = torch.autograd._engine_run_backward

        def run_in_mode(*args: Any, **kwargs: Any) -> Any:
            with self:
                return run(*args, **kwargs)

        torch.autograd._engine_run_backward = run_in_mode
        try:
            with self, self._below:
                yield
        finally:
            torch.autograd._engine_run_backward = run

    def has(self, x: Any) -> bool:
        """Return whether something is a tensor on the GPU."""
        return isinstance(x, _Tensor) and _storage(x) in self._here

    def put(self, x: Any, on_gpu: bool) -> Any:
        """Say where a new tensor is, and return it."""
        if isinstance(x, _Tensor):
            (self._here.add if on_gpu else self._here.discard)(_storage(x))
        return x

    def note(self, what: str) -> None:
        """Count a fault at the innermost line of ours; those of Megatron's lines are none."""
        passed = ("/torch/", "/more_megatron/platform/", __file__)
        frames = [frame for frame in traceback.extract_stack() if not any(part in frame.filename for part in passed)]
        if "more_megatron" in frames[-1].filename:
            self.faults[f"{what}: {Path(frames[-1].filename).name}, {frames[-1].name}"] += 1

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _GETTERS and self.has(first):
            return {"device": _GPU, "is_cuda": True, "is_cpu": False}[_GETTERS[func]]
        if func is _Tensor.tolist and self.has(first):
            self.note("waits in tolist")
            with self._below.apart():
                return func(first)
        target = self._target(func, args, kwargs)
        if target is None:
            return func(*args, **kwargs)
        on_gpu, blocks = _on_cpu(target) != target, not kwargs.get("non_blocking", False)
        moves = func in (_Tensor.to, _Tensor.cpu, _Tensor.cuda)
        if moves and self.has(first) == on_gpu:
            return func(*args, **kwargs)
        if blocks and (moves or (on_gpu and func in _FROM_HOST)):
            self.note(f"waits in {func.__name__}")
        with self._below.apart():
            made = func(*args, **kwargs)
            return self.put(made.clone() if made is first else made, on_gpu)

    def _target(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Return the device that a call names; None if it names none."""
        if func is _Tensor.cpu or (func is torch.tensor and "device" not in kwargs):
            return _CPU
        if func is _Tensor.cuda:
            return _GPU
        if func is _Tensor.to and len(args) > 1 and not isinstance(args[1], torch.dtype):
            return (_GPU if self.has(args[1]) else _CPU) if isinstance(args[1], _Tensor) else args[1]
        return kwargs.get("device")


class _Below(TorchDispatchMode):
    """Sees each operation, those of backward passes too."""

    def __init__(self, gpu: ImitatedGPU) -> None:
        super().__init__()
        self._gpu, self._apart = gpu, 0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside the block, tensors are made and moved."""
        self._apart += 1
        try:
            yield
        finally:
            self._apart -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, _Tensor)]
        on_gpu = [x for x in tensors if self._gpu.has(x)]
        if on_gpu and not self._apart and func.namespace == "aten":
            self._look(func, args, kwargs, [x for x in tensors if not self._gpu.has(x) and x.dim() > 0])
        known, result = set(map(_storage, tensors)), func(*args, **kwargs)
        for x in tree_iter(result):
            if isinstance(x, _Tensor) and _storage(x) not in known:
                self._gpu.put(x, bool(on_gpu))
        return result

    def _look(self, func: Any, args: tuple, kwargs: dict, on_host: list[_Tensor]) -> None:
        name = func.overloadpacket.__name__
        is_index = name in ("index", "index_put", "index_put_")
        masks = is_index and any(isinstance(x, _Tensor) and x.dtype is torch.bool for x in args[1])
        repeats = func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        if name in _WAITING or masks or repeats:
            self._gpu.note(f"waits in {name}")
        # What the engine makes for a backward pass is made out of sight.
        if on_host and name != "copy_" and torch._C._current_graph_task_id() == -1:
            self._gpu.note(f"mixes in {name}")
        if name == "copy_" and on_host and not (len(args) > 2 and args[2]):
            self._gpu.note("waits in copy_")


def _storage(x: _Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata
