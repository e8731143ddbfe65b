"""One checkpoint, every layout: the same losses and gradient norms."""

from __future__ import annotations

import collections
import functools
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY, History, dense

_TOLERANCE = 1e-5
# Three steps follow the first: the last of them feels what the optimizer made of what it loaded.
_RUN = f"{TINY} --split 1,0,0 --train-iters 4"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_SELECTIVE = "--recompute-granularity selective --recompute-modules moe"


@dataclass(frozen=True)
class Layout:
    """Ranks and flags; `optimizer` names the checkpoint whose optimizer state fits."""

    ranks: int
    flags: str = ""
    optimizer: str = "--use-distributed-optimizer"


_OFF = "--no-use-distributed-optimizer"
_TP2, _PP2, _EP2 = (f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline", "expert"))
_INTERLEAVED = f"{_PP2} --num-layers-per-virtual-pipeline-stage 1"
_ALLGATHER = "--moe-token-dispatcher-type allgather"

LAYOUTS = {
    "1": Layout(1),
    "1 allgather": Layout(1, _ALLGATHER),
    "1 selective": Layout(1, _SELECTIVE),
    "1 full": Layout(1, _FULL),
    "1 optimizer off": Layout(1, optimizer=_OFF),
    "dp2": Layout(2),
    "dp2 optimizer off": Layout(2, optimizer=_OFF),
    "tp2": Layout(2, _TP2),
    "tp2 full": Layout(2, f"{_TP2} {_FULL}"),
    "tp2 allgather full": Layout(2, f"{_TP2} {_ALLGATHER} {_FULL}"),
    "tp2 optimizer off": Layout(2, _TP2, optimizer=_OFF),
    "pp2": Layout(2, _PP2),
    "pp2 full": Layout(2, f"{_PP2} {_FULL}"),
    "pp2 interleaved": Layout(2, _INTERLEAVED),
    "pp2 interleaved selective": Layout(2, f"{_INTERLEAVED} {_SELECTIVE}"),
    "ep2": Layout(2, _EP2),
    "ep2 allgather": Layout(2, f"{_EP2} {_ALLGATHER}"),
    "ep2 selective": Layout(2, f"{_EP2} {_SELECTIVE}"),
    "ep2 optimizer off": Layout(2, _EP2, optimizer=_OFF),
    "tp2 ep2": Layout(4, f"{_TP2} {_EP2} --expert-tensor-parallel-size 1"),
    "tp2 ep2 allgather selective": Layout(
        4, f"{_TP2} {_EP2} --expert-tensor-parallel-size 1 {_ALLGATHER} {_SELECTIVE}"
    ),
    "pp2 ep2": Layout(4, f"{_PP2} {_EP2}"),
    # For systems whose layers are one group: embeddings and layers on one stage, the output layer on the other.
    "pp2 whole group": Layout(2, f"{_PP2} --pipeline-model-parallel-layout Et*4|L"),
    "pp2 whole group full": Layout(2, f"{_PP2} --pipeline-model-parallel-layout E|t*4L {_FULL}"),
    "pp2 whole group interleaved": Layout(2, f"{_PP2} --pipeline-model-parallel-layout E|t*4||L"),
    "tp2 selective": Layout(2, f"{_TP2} --recompute-granularity selective --recompute-modules moe core_attn"),
}
_ALL = tuple(LAYOUTS)
# Stages that do not cut a group of the two layers in the middle.
_CODA_WITH_THE_HEAD = {
    "pp2 3|1": Layout(2, f"{_PP2} --decoder-first-pipeline-num-layers 3"),
    "pp2 1|3 full": Layout(2, f"{_PP2} --decoder-first-pipeline-num-layers 1 {_FULL}"),
    "pp2 interleaved 0|1|2|1": Layout(2, f"{_PP2} --pipeline-model-parallel-layout E|t|tt|tL"),
    "pp2 interleaved 0|1|2|1 full": Layout(2, f"{_PP2} --pipeline-model-parallel-layout E|t|tt|tL {_FULL}"),
}
_AROUND_THE_CORE = _CODA_WITH_THE_HEAD | {
    "pp2 interleaved 1|2|1|0": Layout(2, f"{_PP2} --pipeline-model-parallel-layout Et|tt|t|L"),
}
# All layers are one group, which lies on the first stage.
_HEAD_ALONE = {
    "pp2 4|0": Layout(2, f"{_PP2} --pipeline-model-parallel-layout Etttt|L"),
    "pp2 4|0 full": Layout(2, f"{_PP2} --pipeline-model-parallel-layout Etttt|L {_FULL}"),
}
LAYOUTS |= _AROUND_THE_CORE | _HEAD_ALONE


# Layouts that between them have every kind of parallelism, dispatcher and recomputation.
_SPREAD = (
    "1 full",
    "1 selective",
    "dp2",
    "tp2",
    "tp2 allgather full",
    "pp2 interleaved selective",
    "ep2 allgather",
    "ep2 optimizer off",
    "tp2 ep2",
    "pp2 ep2",
)
# Layouts that take the micro-batches of a single process.
_SAME_MICRO_BATCHES = ("1 full", "tp2", "tp2 allgather full", "pp2", "pp2 interleaved")
# Layouts of systems whose layers are one group.
_ONE_GROUP = (
    *(name for name in _SPREAD if not name.startswith("pp2")),
    "tp2 selective",
    "pp2 whole group",
    "pp2 whole group full",
    "pp2 whole group interleaved",
)
_FIXED = "--recurrence-steps 3"
_MICRO_BATCH = "--recurrence-sampling-unit micro-batch"
_POISSON = "--recurrence-sampling poisson-lognormal --recurrence-max-steps 6"


@dataclass(frozen=True)
class System:
    """Flags, the layouts that are tried, whether the depth varies and whether there are experts."""

    flags: str
    layouts: tuple[str, ...]
    varies: bool = True
    experts: bool = True

    @property
    def name(self) -> str:
        """Its name in the registry; several of these are forms of one system."""
        return self.flags.split()[1]


def _uniform(lowest: int) -> str:
    highest = lowest + 2
    return f"--recurrence-sampling uniform --recurrence-min-steps {lowest} --recurrence-max-steps {highest}"


SYSTEMS = {
    "moe": System("--more-variant moe", _ALL, varies=False),
    "recurrent_moe fixed": System(
        "--more-variant recurrent_moe --recurrence-steps 3 --recurrence-backprop-steps 2",
        (*_SPREAD, "pp2"),
        varies=False,
    ),
    "recurrent_moe uniform": System(f"--more-variant recurrent_moe {_uniform(2)} --recurrence-backprop-steps 2", _ALL),
    "recurrent_moe micro-batch top-2": System(
        f"--more-variant recurrent_moe --moe-router-topk 2 --router-logit-ema 0.5 --recurrence-steps 2 {_POISSON} "
        f"{_MICRO_BATCH}",
        _SAME_MICRO_BATCHES,
    ),
    "recurrent_experts": System(
        f"--more-variant recurrent_experts {_uniform(1)} --recurrence-backprop-steps 2", _SPREAD
    ),
    "recurrent_experts micro-batch top-2": System(
        f"--more-variant recurrent_experts --moe-router-topk 2 --recurrence-steps 2 {_POISSON} {_MICRO_BATCH}",
        _SAME_MICRO_BATCHES,
    ),
    "shared_block top-2": System(
        f"--more-variant shared_block --moe-router-topk 2 --recurrence-steps 2 {_POISSON} "
        "--recurrence-backprop-steps 2 --projection-orthogonality-coeff 0.1",
        _SPREAD,
    ),
    "shared_block micro-batch": System(
        f"--more-variant shared_block {_uniform(1)} {_MICRO_BATCH}", _SAME_MICRO_BATCHES
    ),
    "shared_block_ffn top-2": System(
        f"--more-variant shared_block_ffn --moe-router-topk 2 {_uniform(1)} --recurrence-backprop-steps 2", _SPREAD
    ),
    "shared_block_ffn micro-batch": System(
        f"--more-variant shared_block_ffn --recurrence-steps 2 {_POISSON} {_MICRO_BATCH}", _SAME_MICRO_BATCHES
    ),
    "gru_experts top-2": System(
        f"--more-variant gru_experts --moe-router-topk 2 {_uniform(1)} --recurrence-backprop-steps 2", _SPREAD
    ),
    "parallel_experts": System("--more-variant parallel_experts", (*_SPREAD, "pp2"), varies=False),
    "parallel_experts top-2": System(
        "--more-variant parallel_experts --moe-router-topk 2", (*_SPREAD, "pp2"), varies=False
    ),
    "sequential_experts": System(
        f"--more-variant sequential_experts {_uniform(1)} --recurrence-backprop-steps 2", _SPREAD
    ),
    "sequential_experts micro-batch top-2": System(
        f"--more-variant sequential_experts --moe-router-topk 2 --recurrence-steps 2 {_POISSON} {_MICRO_BATCH}",
        _SAME_MICRO_BATCHES,
    ),
    "loop in place": System(
        f"--more-variant loop --moe-router-topk 2 --router-logit-ema 0.5 {_uniform(1)} "
        "--recurrence-backprop-steps 2 --recurrence-prelude-layers 1 --recurrence-group-layers 1",
        _SPREAD,
    ),
    "loop core": System(
        f"--more-variant loop {_uniform(1)} {_MICRO_BATCH} --recurrence-prelude-layers 1 --recurrence-coda-layers 1",
        ("1 full", "tp2", *_AROUND_THE_CORE),
        experts=False,
    ),
    "loop core linear": System(
        "--more-variant loop --recurrence-steps 3 --recurrence-backprop-steps 2 "
        "--recurrence-prelude-layers 1 --recurrence-coda-layers 1 --recurrence-injection linear",
        ("1 full", "tp2 allgather full", "ep2", "tp2 ep2", *_AROUND_THE_CORE),
        varies=False,
    ),
    "huginn": System(
        f"--more-variant huginn {_uniform(1)} {_MICRO_BATCH} --recurrence-backprop-steps 2",
        ("1 full", "tp2", *_CODA_WITH_THE_HEAD),
        experts=False,
    ),
    "huginn top-2": System(
        f"--more-variant huginn --moe-router-topk 2 --router-logit-ema 0.5 {_uniform(1)} --recurrence-backprop-steps 2",
        (
            *("1 full", "1 selective", "dp2", "tp2", "tp2 allgather full", "ep2 allgather", "ep2 optimizer off"),
            *("tp2 ep2", *_CODA_WITH_THE_HEAD),
        ),
    ),
    "universal": System(
        "--more-variant universal --recurrence-max-steps 3 --recurrence-backprop-steps 2 --ponder-coeff 0.05",
        ("1 full", "dp2", "tp2", "tp2 full", *_HEAD_ALONE),
        varies=False,
        experts=False,
    ),
    "universal top-2": System(
        "--more-variant universal --moe-router-topk 2 --recurrence-max-steps 3 --ponder-coeff 0.05 "
        "--halting-output basic --universal-post-norm --router-logit-ema 0.5",
        (*_SPREAD[:5], "ep2 allgather", "ep2 optimizer off", "tp2 ep2", "pp2 4|0"),
        varies=False,
    ),
    "universal without halting": System(
        f"--more-variant universal --halting none --universal-time-signal sinusoid {_uniform(1)} {_MICRO_BATCH}",
        ("1 full", "tp2", "pp2 4|0 full"),
        experts=False,
    ),
    **{
        f"moeut {experts} {sampling.split()[1]}": System(
            f"--more-variant moeut --switchhead-num-experts {experts} --moe-router-topk 2 --moeut-balance-coeff 0.1 "
            f"{sampling} --recurrence-backprop-steps 2",
            _ONE_GROUP,
            varies=sampling != _FIXED,
        )
        for experts, sampling in ((1, _FIXED), (4, _uniform(1)))
    },
}


def _spread_over_layouts() -> set[tuple[str, str]]:
    """Return what is tried without the whole matrix: each layout, each form of a system, each system twice.

    That each system trains under TP2, PP2 and EP2 is looked at in tests/training/test_layout_change.py.
    """
    chosen: set[tuple[str, str]] = set()
    tried: collections.Counter[str] = collections.Counter()
    able = {layout: [name for name, system in SYSTEMS.items() if layout in system.layouts] for layout in LAYOUTS}
    for layout in sorted(LAYOUTS, key=lambda layout: len(able[layout])):
        system = min(able[layout], key=lambda name: tried[name])
        tried.update((system, layout))
        chosen.add((system, layout))
    for name, system in SYSTEMS.items():
        others = [layout for layout in system.layouts if (name, layout) not in chosen]
        used = {LAYOUTS[layout].ranks for other, layout in chosen if other == name}
        others.sort(key=lambda layout: (LAYOUTS[layout].ranks not in used, tried[layout]))
        of_system = sum(SYSTEMS[other].name == system.name for other, _ in chosen)
        for layout in others[: max(1 - len(used), 2 - of_system, 0)]:
            tried.update((layout,))
            chosen.add((name, layout))
    return chosen


_ALWAYS = _spread_over_layouts()
_CASES = [
    pytest.param(name, layout, marks=[] if (name, layout) in _ALWAYS else pytest.mark.matrix)
    for name, system in SYSTEMS.items()
    for layout in system.layouts
]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the runs of this module's tests, started when first asked for."""
    own = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    calls = [item.callspec.params for item in own if hasattr(item, "callspec")]
    cases = [(call["system"], call["layout"]) for call in calls if "layout" in call]
    return Runs(tmp_path_factory.mktemp("parity"), cases)


class Runs:
    """Trains each system in one world for each number of ranks.

    Args:
        folder: Holds the checkpoints.
        cases: Systems and layouts that are tried.
    """

    def __init__(self, folder: Path, cases: list[tuple[str, str]]) -> None:
        self._folder, self._cases = folder, cases
        self._worlds: dict[tuple[str, int], dict[str, History] | AssertionError] = {}

    @functools.cache  # noqa: B019
    def reference(self, system: str) -> History:
        """Return the uninterrupted run of a single process; others save after its first step, for those that load."""
        optimizers = {LAYOUTS[layout].optimizer for name, layout in self._cases if name == system}
        lines = [
            f"{self._line(system)} {optimizer} --save {self._checkpoint(system, optimizer)} "
            "--save-interval 1 --exit-interval 1"
            for optimizer in sorted(optimizers)
        ]
        return run_ranks(1, train_all, [*lines, self._line(system)])[0][-1]

    def _line(self, system: str) -> str:
        run = _RUN if SYSTEMS[system].experts else dense(_RUN)
        return f"{run} {SYSTEMS[system].flags}"

    def of(self, system: str, layout: str) -> History:
        """Return the run of a layout that loads the reference's checkpoint, as the last rank reports it."""
        ranks = LAYOUTS[layout].ranks
        if (system, ranks) not in self._worlds:
            self._worlds[system, ranks] = self._outcome(system, ranks)
        outcome = self._worlds[system, ranks]
        if isinstance(outcome, AssertionError):
            raise outcome
        return outcome[layout]

    def _outcome(self, system: str, ranks: int) -> dict[str, History] | AssertionError:
        self.reference(system)
        names = [layout for name, layout in self._cases if name == system and LAYOUTS[layout].ranks == ranks]
        lines = [
            f"{self._line(system)} {layout.flags} {layout.optimizer} "
            f"--load {self._checkpoint(system, layout.optimizer)}"
            for layout in map(LAYOUTS.__getitem__, names)
        ]
        try:
            return dict(zip(names, run_ranks(ranks, train_all, lines)[-1], strict=True))
        except AssertionError as failure:  # said by each test of this world, and not tried again
            return failure

    def _checkpoint(self, system: str, optimizer: str) -> Path:
        return self._folder / system.replace(" ", "-") / ("plain" if optimizer == _OFF else "distributed")


@pytest.mark.parametrize(("system", "layout"), _CASES)
def test_losses_and_gradient_norms_equal_the_single_process(runs: Runs, system: str, layout: str) -> None:
    reference = runs.reference(system)
    history = runs.of(system, layout)
    assert len(history.losses) == 3
    assert history.losses == pytest.approx(reference.losses[1:], rel=_TOLERANCE)
    assert history.grad_norms == pytest.approx(reference.grad_norms[1:], rel=_TOLERANCE)
    assert history.steps == reference.steps[1:]
    for figures, expected in zip(history.figures, reference.figures[1:], strict=True):
        assert figures == pytest.approx(expected, rel=_TOLERANCE)


def test_a_world_that_is_used_again_trains_as_a_fresh_one() -> None:
    line = f"{TINY} {SYSTEMS['recurrent_moe uniform'].flags} {_EP2}"
    first = run_ranks(2, train_all, [line])[-1]
    again = run_ranks(2, train_all, [f"{TINY} {SYSTEMS['moe'].flags} {_TP2}", line])[-1]
    assert again[1:] == first


@pytest.mark.parametrize("system", [name for name, system in SYSTEMS.items() if system.varies])
def test_the_depth_varies_in_these_runs(runs: Runs, system: str) -> None:
    assert len(set(runs.reference(system).steps)) > 1


def test_uniform_depth_stays_in_its_range(runs: Runs) -> None:
    assert set(runs.reference("recurrent_moe uniform").steps) <= {2.0, 3.0, 4.0}
