"""Which module was the first whose output is not finite, and which parameter of it.

Flags stay on the device, one for each call of a module, until somebody asks.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from more_megatron.monitoring.gradients import Owner
from more_megatron.platform.repairs.finite import Tracer


class FirstNonFinite(Tracer):
    """Looks at what the modules of the chunks on this rank return."""

    def __init__(self, chunks: Iterable[torch.nn.Module], owners: Mapping[torch.nn.Parameter, Owner]) -> None:
        named = [pair for chunk in chunks for pair in chunk.named_modules()]
        self._names = {module: name.replace("module.", "") for name, module in named if name}
        self._owners = owners
        self._hook: RemovableHandle | None = None
        self._seen: list[tuple[torch.nn.Module, torch.Tensor]] = []

    def begin(self) -> None:
        """Look at all calls from now on, and forget those before."""
        self._seen = []
        self._hook = self._hook or register_module_forward_hook(self._look)

    def end(self) -> None:
        """Look no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _look(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if module not in self._names:
            return
        for part in output if isinstance(output, tuple | list) else (output,):
            if isinstance(part, torch.Tensor) and part.is_floating_point():
                self._seen.append((module, torch.isfinite(part.detach()).all()))

    def explain(self, here: bool) -> str:
        """Return which module was the first, on this rank or on any of all that ask, to be added to a sentence."""
        found = self._first()
        if not here:
            all_found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(all_found, found)
            found = min((one for one in all_found if one is not None), default=None)
        return "" if found is None else f"; {found[-1]}"

    def _first(self) -> tuple[int, int, str] | None:
        """Return pipeline stage, number of the call and description of the first on this rank."""
        finite = torch.stack([flag for _, flag in self._seen]).tolist() if self._seen else []
        if all(finite):
            return None
        index = finite.index(False)
        modules = [module for module, _ in self._seen[: index + 1]]
        text = (
            f"the first module whose output is not finite is {self._names[modules[-1]]}, in call "
            f"{modules.count(modules[-1])} of the step{self._blame(modules[-1])}"
        )
        return parallel_state.get_pipeline_model_parallel_rank(), index, text

    def _blame(self, module: torch.nn.Module) -> str:
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
