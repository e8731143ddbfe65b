"""What was saved under one layout continues under another, with its optimizer state."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.corpus import write_corpus
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY_ON_FILES, History

_ITERATIONS = 6
_RUN = (
    f"{TINY_ON_FILES} --train-iters {_ITERATIONS} --split 1,0,0 --global-batch-size 4 --save-interval 2 "
    "--more-variant recurrent_moe --recurrence-steps 3 --recurrence-backprop-steps 2"
)
_LAYOUTS = {
    "ep2": "--expert-model-parallel-size 2",
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2",
}
# Run: its layout, whose checkpoint it loads, and of which iteration.
_RUNS: dict[str, tuple[str, str | None, int]] = {
    "ep2": ("ep2", None, 0),
    "tp2 from ep2": ("tp2", "ep2", 2),
    "pp2 from ep2": ("pp2", "ep2", 2),
    "ep2 from tp2": ("ep2", "tp2 from ep2", 4),
    "ep2 from pp2": ("ep2", "pp2 from ep2", 4),
    "tp2 from pp2": ("tp2", "pp2 from ep2", 4),
}


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, History]:
    """Return what each run reported."""
    folder = tmp_path_factory.mktemp("layouts")
    corpus = write_corpus(folder / "corpus")
    lines = []
    for name, (layout, source, iteration) in _RUNS.items():
        load = "" if source is None else f"--load {_save_folder(folder, source)} --ckpt-step {iteration}"
        save = f"--save {_save_folder(folder, name)}"
        lines.append(f"{_RUN} --data-path {corpus} {_LAYOUTS[layout]} {load} {save}")
    return dict(zip(_RUNS, run_ranks(2, train_all, lines)[-1], strict=True))


def _save_folder(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-")


@pytest.mark.parametrize("name", [name for name in _RUNS if _RUNS[name][1] is not None])
def test_continues_with_the_losses_of_the_uninterrupted_run(histories: dict[str, History], name: str) -> None:
    reference, history, first = histories["ep2"], histories[name], _RUNS[name][2]
    assert len(history.losses) == _ITERATIONS - first
    assert history.losses == pytest.approx(reference.losses[first:], rel=1e-5)
    assert history.grad_norms == pytest.approx(reference.grad_norms[first:], rel=1e-5)
