"""The stages and their cases."""

from __future__ import annotations

from dataclasses import dataclass

from more_megatron.evaluation.gpu_check.plan import BACKENDS, Backend, Flags, Plan, command_line, everywhere
from more_megatron.systems import get_system

__all__ = ["Case", "Stage", "references", "stages"]

_WORK = "more_megatron.evaluation.gpu_check.work"
_PRECISIONS: dict[str, Flags] = {"fp32": {"no-bf16": None}, "bf16": {"bf16": None}}
_LAYOUT_STEPS = 4
# Systems of the dry run where one would find what all would: a slip in the script.
_IN_MINIATURE = 2


@dataclass(frozen=True)
class Case:
    """One question, answered in a world of its own.

    Attributes:
        name: Of the case within its stage.
        work: `module:function` that returns a `Finding`.
        arguments: Its arguments.
        ranks: Number of ranks that take part.
    """

    name: str
    work: str
    arguments: tuple = ()
    ranks: int = 1


@dataclass(frozen=True)
class Stage:
    """Cases that belong together.

    Attributes:
        letter: Short name.
        title: What is asked.
        cases: In the order in which they begin.
        parallel: Whether several cases may be under way at once.
        alone: Whether no other process may be on the device: what is measured takes all of it.
        obstacle: Why it cannot be done here; empty if it can.
    """

    letter: str
    title: str
    cases: list[Case]
    parallel: bool = True
    alone: bool = False
    obstacle: str = ""


def stages(plan: Plan) -> list[Stage]:
    """Return all stages, the most valuable answers first."""
    no_te = "" if plan.dry or plan.has_te else "Transformer Engine is not there"
    one_gpu = "" if plan.ranks > 1 else "there is one GPU"
    return [
        Stage("a", "environment", _environment(plan), parallel=False),
        Stage("b", "parity with the CPU", _parity(plan)),
        Stage("c", "training, resumption, export", _training(plan)),
        Stage("d", "FP8 against bf16", _fp8(plan), obstacle=no_te),
        Stage("e", "speed", _speed(plan), parallel=False, alone=True),
        Stage("f", "layouts over several ranks", _layouts(plan), parallel=False, obstacle=one_gpu),
    ]


def references(plan: Plan) -> list[Case]:
    """Return what the CPU has to do meanwhile: the data, and what the GPU's results are compared with."""
    found = [
        Case("corpus", f"{_WORK}.training:write_corpus", (_corpus(plan),)),
        Case("state noise", f"{_WORK}.parity:save_noise", (str(plan.folder),)),
    ]
    for precision in _parity_precisions(plan):
        for system in plan.systems:
            flags = _parity_flags(plan, system, precision, BACKENDS["local"].flags | _PRECISIONS["fp32"])
            arguments = (_reference(plan, system, precision), flags)
            found.append(Case(f"{system}, {precision}", f"{_WORK}.parity:save_reference", arguments))
    return found


def _environment(plan: Plan) -> list[Case]:
    flags = command_line(plan.systems[0], plan.sizes.training)
    return [
        Case("packages", f"{_WORK}.environment:packages"),
        Case("defaults", f"{_WORK}.environment:defaults", (flags,)),
        *([Case("attention", f"{_WORK}.environment:attention")] if plan.has_te else []),
        Case("ceilings", f"{_WORK}.environment:ceilings", (plan.sizes.matmul, plan.sizes.copy_bytes, str(plan.folder))),
    ]


def _parity(plan: Plan) -> list[Case]:
    found = [Case("state noise", f"{_WORK}.parity:compare_noise", (str(plan.folder),))]
    for precision in _parity_precisions(plan):
        for backend in plan.backends:
            for system in plan.systems:
                flags = _parity_flags(plan, system, precision, backend.flags | _PRECISIONS[precision])
                arguments = (_reference(plan, system, precision), flags, precision)
                found.append(Case(f"{system}, {backend.name} {precision}", f"{_WORK}.parity:compare", arguments))
    return found


def _parity_precisions(plan: Plan) -> tuple[str, ...]:
    return ("fp32",) if plan.dry else tuple(_PRECISIONS)


def _parity_flags(plan: Plan, system: str, precision: str, more: Flags) -> str:
    # A rounding in bf16 could send a token elsewhere.
    routing = everywhere(system) if precision == "bf16" else {}
    return command_line(system, plan.sizes.parity, routing, more, steps=3, backprop_steps=2)


def _reference(plan: Plan, system: str, precision: str) -> str:
    return str(plan.folder / f"reference-{precision}-{system}")


def _corpus(plan: Plan) -> str:
    return str(plan.folder / "counting")


def _training(plan: Plan) -> list[Case]:
    sizes, found = plan.sizes, []
    exact = BACKENDS["local"].flags | _PRECISIONS["fp32"]
    for system in plan.systems:
        for backend in plan.backends[:1] if plan.dry else plan.backends[::-1]:
            other = next((b for b in plan.backends if b is not backend), backend)
            lines = [_training_flags(plan, system, backend), _training_flags(plan, system, other)]
            lines.append(command_line(system, sizes.training, {"data-path": _corpus(plan)}, exact))
            folder = str(plan.folder / f"training-{system}-{backend.name}")
            arguments = (*lines, folder, sizes.training_steps, sizes.fall)
            found.append(Case(f"{system}, {backend.name}", f"{_WORK}.training:learn_and_hand_on", arguments))
    return found


def _training_flags(plan: Plan, system: str, backend: Backend) -> str:
    return command_line(system, plan.sizes.training, {"data-path": _corpus(plan)}, backend.flags)


def _fp8(plan: Plan) -> list[Case]:
    found, flags = [], (plan.sizes.fp8, {"data-path": _corpus(plan)}, plan.backends[-1].flags)
    for system in plan.systems:
        recipes = {name: command_line(system, *flags, recipe) for name, recipe in plan.recipes.items()}
        arguments = (command_line(system, *flags), recipes, plan.sizes.fp8_steps)
        found.append(Case(system, f"{_WORK}.training:learn_in_fp8", arguments))
    return found


def _speed(plan: Plan) -> list[Case]:
    sizes, folder, backend = plan.sizes, str(plan.folder), plan.backends[-1].flags
    # What others are compared with comes first.
    systems = sorted(plan.systems, key=lambda name: get_system(name).recurrent)

    def lines(more: Flags) -> dict[str, str]:
        return {name: command_line(name, sizes.speed, backend, more, steps=sizes.steps) for name in systems}

    def measure(name: str, line: str, precision: str) -> Case:
        arguments = (name, precision, line, systems[0], folder, sizes)
        return Case(f"{name}, {precision}", f"{_WORK}.speed:measure", arguments)

    bf16 = lines({})
    fp8 = lines(next(iter(plan.recipes.values()))) if plan.dry or plan.has_te else {}
    return [
        Case("equal cost", f"{_WORK}.speed:save_target", (bf16, folder, sizes)),
        *(measure(name, line, "bf16") for name, line in bf16.items()),
        Case("kernels of the slowest", f"{_WORK}.speed:profile_slowest", (bf16, folder, sizes)),
        *(measure(name, line, "fp8") for name, line in list(fp8.items())[: _IN_MINIATURE if plan.dry else None]),
    ]


def _layouts(plan: Plan) -> list[Case]:
    found = []
    flags = (plan.sizes.training, {"data-path": _corpus(plan)}, BACKENDS["local"].flags, _PRECISIONS["fp32"])
    for system in plan.systems[: _IN_MINIATURE if plan.dry else None]:
        folder = str(plan.folder / f"layouts-{system}")
        alone = (command_line(system, *flags), _LAYOUT_STEPS, folder)
        found.append(Case(f"{system}, one rank", f"{_WORK}.training:save_losses", alone))
        layouts = {name: command_line(system, *flags, layout) for name, layout in plan.layouts.items()}
        together = (layouts, _LAYOUT_STEPS, folder)
        found.append(Case(system, f"{_WORK}.training:under_layouts", together, ranks=plan.ranks))
    return found
