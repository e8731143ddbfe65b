"""The stages and their cases."""

from dataclasses import dataclass, field
from typing import Any

from more_megatron.evaluation.gpu_check.plan import Plan

LETTERS = "abcdef"
# Systems of the dry run where one would find what all would: a slip in the script.
_IN_MINIATURE = 2


@dataclass(frozen=True)
class Case:
    """One question, answered in a world of its own."""

    name: str  # of the case within its stage
    work: str  # `module:function` that returns a `Finding`
    arguments: tuple = ()
    ranks: int = 1  # number of ranks that take part


@dataclass(frozen=True)
class Stage:
    """Cases that belong together."""

    letter: str
    title: str  # what is asked
    cases: list[Case]  # in the order in which they begin
    # What the CPU has to do before: data, and what the GPU's results are compared with
    before: list[Case] = field(default_factory=list)
    parallel: bool = True  # whether several cases may be under way at once
    alone: bool = False  # whether no other process may be on the device: what is measured takes all of it
    obstacle: str = ""  # why it cannot be done here; empty if it can


def stages(plan: Plan) -> list[Stage]:
    """Return all stages, the most valuable answers first."""
    no_te = "" if plan.dry or plan.has_te else "Transformer Engine is not there"
    one_gpu = "" if plan.ranks > 1 else "there is one GPU"
    corpus = [_case("corpus", "training:write_corpus", plan)]
    return [
        Stage("a", "environment", _environment(plan), parallel=False),
        Stage("b", "parity with the CPU", _parity(plan), before=_references(plan)),
        Stage("c", "training, resumption, export", _training(plan), before=corpus),
        Stage("d", "FP8 against bf16", _fp8(plan), before=corpus, obstacle=no_te),
        Stage("e", "speed", _speed(plan), parallel=False, alone=True),
        Stage("f", "layouts over several ranks", _layouts(plan), before=corpus, parallel=False, obstacle=one_gpu),
    ]


def _case(name: str, work: str, *arguments: Any, ranks: int = 1) -> Case:
    return Case(name, f"more_megatron.evaluation.gpu_check.work.{work}", arguments, ranks)


def _environment(plan: Plan) -> list[Case]:
    return [
        _case("packages", "environment:packages"),
        _case("defaults", "environment:defaults", plan),
        *([_case("attention", "environment:attention")] if plan.has_te else []),
        _case("ceilings", "environment:ceilings", plan),
    ]


def _references(plan: Plan) -> list[Case]:
    return [_case("state noise", "parity:save_noise", plan)] + [
        _case(f"{system}, {precision}", "parity:save_reference", plan, system, precision)
        for precision in plan.precisions
        for system in plan.systems
    ]


def _parity(plan: Plan) -> list[Case]:
    return [_case("state noise", "parity:compare_noise", plan)] + [
        _case(f"{system}, {backend} {precision}", "parity:compare", plan, system, precision, backend)
        for precision in plan.precisions
        for backend in plan.backends
        for system in plan.systems
    ]


def _training(plan: Plan) -> list[Case]:
    backends = list(plan.backends)[:1] if plan.dry else list(plan.backends)[::-1]
    return [
        _case(f"{system}, {backend}", "training:learn_and_hand_on", plan, system, backend)
        for system in plan.systems
        for backend in backends
    ]


def _fp8(plan: Plan) -> list[Case]:
    return [_case(system, "training:learn_in_fp8", plan, system) for system in plan.systems]


def _speed(plan: Plan) -> list[Case]:
    systems = plan.baseline_first
    few = _IN_MINIATURE if plan.dry else None
    in_fp8 = systems[:few] if plan.dry or plan.has_te else []
    return [
        _case("equal cost", "speed:save_target", plan),
        *(_case(f"{system}, bf16", "speed:measure", plan, system, "bf16") for system in systems),
        _case("kernels of the slowest", "speed:profile_slowest", plan),
        *(_case(f"{system}, fp8", "speed:measure", plan, system, "fp8") for system in in_fp8),
    ]


def _layouts(plan: Plan) -> list[Case]:
    found = []
    for system in plan.systems[: _IN_MINIATURE if plan.dry else None]:
        found.append(_case(f"{system}, one rank", "training:save_losses", plan, system))
        found += [
            _case(f"{system}, {layout}", "training:under_layout", plan, system, layout, ranks=plan.ranks)
            for layout in plan.layouts
        ]
    return found
