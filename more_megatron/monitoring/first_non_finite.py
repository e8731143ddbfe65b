"""Which module was the first whose output is not finite, and which parameter of it.

Flags stay on the device, one for each call of a module, until somebody asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from megatron.core import parallel_state

from more_megatron.monitoring.gradients import Owner

__all__ = ["FirstNonFinite"]


class FirstNonFinite:
    """Looks at what the modules of a model return.

    Args:
        chunks: Chunks of the model on this rank.
        owners: Whom each parameter belongs to.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module], owners: Mapping[torch.nn.Parameter, Owner]) -> None:
        self._modules = [
            (name.replace("module.", ""), module) for chunk in chunks for name, module in chunk.named_modules()
        ]
        self._owners = owners
        self._is_looking = False
        self._names: list[str] = []
        self._flags: list[torch.Tensor] = []

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look at all calls inside the block; within another such block, begin anew."""
        self._names, self._flags = [], []
        if self._is_looking:
            yield
            return
        self._is_looking = True
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules if name]
        try:
            yield
        finally:
            self._is_looking = False
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            for part in output if isinstance(output, tuple | list) else (output,):
                if isinstance(part, torch.Tensor) and part.is_floating_point():
                    self._names.append(name)
                    self._flags.append(torch.isfinite(part.detach()).all())

        return look

    def describe(self, here: bool = False) -> str | None:
        """Return which module was the first on any rank, or on this one; None if all was finite.

        Args:
            here: Whether to look at this rank alone; else every rank calls it.
        """
        found = self._first()
        if torch.distributed.is_initialized() and not here:
            all_found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(all_found, found)
            found = min((one for one in all_found if one is not None), default=None)
        return None if found is None else found[-1]

    def _first(self) -> tuple[int, int, str] | None:
        """Return pipeline stage, number of the call and description of the first on this rank."""
        if not self._flags:
            return None
        finite = torch.stack(self._flags).tolist()
        if all(finite):
            return None
        index = finite.index(False)
        name = self._names[index]
        call = self._names[: index + 1].count(name)
        text = f"the first module whose output is not finite is {name}, in call {call} of the step"
        return parallel_state.get_pipeline_model_parallel_rank(), index, text + self._blame(name)

    def _blame(self, name: str) -> str:
        module = next(module for known, module in self._modules if known == name)
        for parameter_name, parameter in module.named_parameters():
            if bool(torch.isfinite(parameter).all()):
                continue
            text = f"; its parameter {parameter_name} is not finite"
            owner = self._owners.get(parameter, Owner(""))
            if not owner.experts:
                return text
            parts = parameter.detach().reshape(len(owner.experts), -1)
            wrong = torch.isfinite(parts).all(1).logical_not().nonzero().flatten().tolist()
            return f"{text}, expert {owner.experts[wrong[0]]} of {owner.place}"
        return "; all its parameters are finite"
