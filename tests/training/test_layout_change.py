"""What was saved under one layout continues under another, with its optimizer state."""

from pathlib import Path

import pytest

from more_megatron.systems import names
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of, is_one_group
from tests.helpers.training import TINY, History

_ITERATIONS = 6
_RUN = f"{TINY} --train-iters {_ITERATIONS} --split 1,0,0 --save-interval 2"
_DEPTH = "--recurrence-steps 3 --recurrence-backprop-steps 2"
# Two layers, of which each stage must hold a looped group whole.
_DIVISION = "--recurrence-prelude-layers 1 --recurrence-coda-layers 0 --recurrence-group-layers 1"
_INJECTION = "--recurrence-injection linear"
_SYSTEMS = names()
# Those whose layers are one group: it lies on the first stage, the head on the second.
_ONE_GROUP = tuple(name for name in _SYSTEMS if is_one_group(name))
# Systems that are always tried under a product of layouts; the others are in the whole matrix.
_UNDER_PRODUCTS = _SYSTEMS[2::4]
_LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2",
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
}


def _save_folder(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-")


_PRODUCT = f"{_LAYOUTS['pp2']} {_LAYOUTS['ep2']}"
# Ranks, flags, the run whose checkpoint is loaded, of which iteration, and the steps that follow.
_RUNS: dict[str, tuple[int, str, str | None, int, range]] = {
    "1": (1, "", None, 0, range(6)),
    "ep2 from 1": (2, _LAYOUTS["ep2"], "1", 2, range(2, 6)),
    "tp2 from ep2": (2, _LAYOUTS["tp2"], "ep2 from 1", 4, range(4, 6)),
    "pp2 from ep2": (2, _LAYOUTS["pp2"], "ep2 from 1", 4, range(4, 6)),
    "pp2 ep2 from 1": (4, f"{_PRODUCT} --exit-interval 4", "1", 2, range(2, 4)),
    "1 from pp2 ep2": (1, "", "pp2 ep2 from 1", 4, range(4, 6)),
}


def _is_always(name: str, system: str) -> bool:
    return "pp2 ep2" not in name or system in _UNDER_PRODUCTS


@pytest.fixture(scope="module")
def systems(whole_matrix: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, History]]:
    """Return what runs of each system reported, each run but the first continuing from another layout's checkpoint."""
    folder = tmp_path_factory.mktemp("systems")
    run = f"{_RUN} --num-layers 2 --moe-router-topk 2"
    sources = {source for _, _, source, _, _ in _RUNS.values()}
    histories: dict[str, dict[str, History]] = {system: {} for system in _SYSTEMS}
    for name, (ranks, layout, source, iteration, _) in _RUNS.items():
        tried = [system for system in _SYSTEMS if whole_matrix or _is_always(name, system)]
        lines = []
        for system in tried:
            saves = folder / system
            load = "" if source is None else f"--load {_save_folder(saves, source)} --ckpt-step {iteration}"
            save = f"--save {_save_folder(saves, name)}" if name in sources else ""
            flags = flags_of(system, f"{_DEPTH} {_DIVISION} {_INJECTION}")
            if system in _ONE_GROUP and _LAYOUTS["pp2"] in layout:
                flags += " --pipeline-model-parallel-layout Ett|L"
            lines.append(f"{run} {flags} {layout} {load} {save}")
        for system, history in zip(tried, run_ranks(ranks, train_all, lines)[-1], strict=True):
            histories[system][name] = history
    return histories


@pytest.mark.parametrize(
    ("name", "system"),
    [
        pytest.param(name, system, marks=[] if _is_always(name, system) else pytest.mark.matrix)
        for name in _RUNS
        for system in _SYSTEMS
        if name != "1"
    ],
)
def test_every_system_continues_under_another_layout(
    systems: dict[str, dict[str, History]], system: str, name: str
) -> None:
    reference, history, steps = systems[system]["1"], systems[system][name], _RUNS[name][-1]
    assert history.losses == pytest.approx([reference.losses[step] for step in steps], rel=1e-5)
    assert history.grad_norms == pytest.approx([reference.grad_norms[step] for step in steps], rel=1e-5)
