"""Each stand-in is still needed by the installed wheel, and can be put in place and taken back."""

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from more_megatron.platform import stand_in
from more_megatron.platform.cuda.megatron import MEGATRON_ON_CPU
from more_megatron.platform.cuda.pytorch import PYTORCH
from more_megatron.platform.cuda.torch_cuda import NO_COMPILER, TORCH_CUDA
from more_megatron.platform.repairs.reports import TEST_SPLIT
from more_megatron.platform.repairs.table import WHEEL_REPAIRS
from more_megatron.platform.stand_in import StandIn, install
from more_megatron.platform.training_loop import SURROUNDED

_ON_CPU = NO_COMPILER + TORCH_CUDA + PYTORCH + MEGATRON_ON_CPU
_ALL = _ON_CPU + WHEEL_REPAIRS + TEST_SPLIT


_README = Path(__file__).parents[2] / "README.md"


def _wheel() -> Path:
    spec = find_spec("megatron.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


@pytest.mark.parametrize("entry", _ALL, ids=[entry.name for entry in _ALL])
def test_the_wheel_still_needs_it_and_its_reason_is_one_line(entry: StandIn) -> None:
    text = (_wheel() / entry.source).read_text()
    assert entry.text in text, f"the wheel no longer needs the stand-in for {entry.name}: remove it"
    assert hasattr(*entry.place())
    assert entry.why.strip()
    assert "\n" not in entry.why


def test_the_training_loop_calls_what_others_surround() -> None:
    text = (_wheel() / "training" / "training.py").read_text()
    for name in SURROUNDED:
        assert re.search(rf"\b{name}\(", text.replace(f"def {name}(", "")), name


def test_the_readme_counts_them() -> None:
    [row] = [line for line in _README.read_text().splitlines() if "`more_megatron/platform/`" in line]
    assert [int(number) for number in re.findall(r"\b\d+\b", row)] == [len(_ON_CPU), len(WHEEL_REPAIRS)]


def test_install_and_restore(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = SimpleNamespace(first=1, second=2)
    monkeypatch.setattr(StandIn, "place", lambda self: (holder, self.name))
    table = tuple(StandIn(name, value, "", "") for name, value in (("first", 10), ("second", 20), ("first", 30)))
    restore = stand_in.install(table)
    assert (holder.first, holder.second) == (30, 20)
    restore()
    assert (holder.first, holder.second) == (1, 2)


def test_compiled_index_builder_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("it ran make")

    monkeypatch.setattr("subprocess.run", fail)
    entry = next(entry for entry in WHEEL_REPAIRS if entry.name.endswith(":compile_helpers"))
    entry.replacement()


def test_data_iterators_leave_the_random_state_alone() -> None:
    restore = install(tuple(entry for entry in MEGATRON_ON_CPU if "_BaseDataLoaderIter" in entry.name))
    try:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        assert list(torch.utils.data.DataLoader([1, 2])) != []
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        restore()


def test_events_and_memory_report_what_the_host_does() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.elapsed_time(end) >= 0
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 0
    assert torch.cuda.memory_allocated() > 0


def test_random_state_is_the_cpus() -> None:
    torch.cuda.manual_seed(7)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
