"""Figures of health equal what plain PyTorch makes of the same states, decisions and gradients, under every layout."""

import math
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.systems import flags_of
from tests.helpers.training import TINY
from tests.monitoring.recorded import Recorded, expected_figures, read_records, record_run

_DEPTH = "--recurrence-steps 3 --recurrence-backprop-steps 2"
_WATCHED = f"{TINY} --num-layers 3 --moe-router-topk 2 --train-iters 2 --health-interval 2 --save-interval 9"


def _run(system: str, flags: str = "") -> str:
    return f"{_WATCHED} {flags_of(system, _DEPTH)} {flags}"


def _recorded(runs: dict[str, str]) -> dict[str, Recorded]:
    torch.set_num_threads(1)
    return {name: record_run(run) for name, run in runs.items()}


_LAYERS = ["layer 1", "layer 2", "layer 3"]
# Recurrences of a micro-batch, in the order of computation.
_PLACES = {"huginn": ["layer 2"], "recurrent_experts": _LAYERS, "gru_experts": _LAYERS, "shared_block": _LAYERS}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Recorded, dict]]:
    """Return what one run of some systems computed, and what its health report says."""
    folder = tmp_path_factory.mktemp("watched")
    runs = {name: _run(name, f"--save {folder / name}") for name in _PLACES}
    (recorded,) = run_ranks(1, _recorded, runs)
    return {name: (recorded[name], read_records(folder / name)[-1]) for name in runs}


@pytest.mark.parametrize("system", _PLACES)
def test_states_and_decisions(watched: dict[str, tuple[Recorded, dict]], system: str) -> None:
    recorded, report = watched[system]
    expected = expected_figures(recorded, _PLACES[system], micro_batches=2)
    assert {tag.split("/")[-1] for tag in expected} >= {"token correlation", "change trend", "dead experts"}
    for tag, value in expected.items():
        assert report["figures"][tag] == pytest.approx(value, rel=1e-4, abs=1e-6), tag
    loads = report["experts"]["routing/layer 1/load"]
    chosen = torch.cat([routing_map for _, routing_map in recorded.decisions[1]]).sum(0).double()
    assert loads["load"] == pytest.approx((chosen / chosen.sum()).tolist())


@pytest.mark.parametrize("system", _PLACES)
def test_gradients_by_kind_and_expert(watched: dict[str, tuple[Recorded, dict]], system: str) -> None:
    recorded, report = watched[system]
    figures = report["figures"]
    kinds = {tag: value for tag, value in figures.items() if tag.startswith("gradient/") and tag.endswith(" norm")}
    kinds.pop("gradient/mean norm")
    # All kinds together are the norm that Megatron's optimizer clips by.
    assert math.hypot(*kinds.values()) == pytest.approx(figures["gradient/norm"], rel=1e-5)
    routers = [gradient.flatten() for name, gradient in recorded.gradients.items() if ".router." in name]
    assert kinds["gradient/router norm"] == pytest.approx(float(torch.cat(routers).norm()), rel=1e-5)
    experts = {name: grad for name, grad in recorded.gradients.items() if "layers.0.mlp.experts." in name}
    for expert, norm in enumerate(report["expert gradients"]["layer 1"]):
        own = [
            gradient.flatten() if "local_experts" in name else gradient.reshape(4, -1)[expert]
            for name, gradient in experts.items()
            if f"local_experts.{expert}." in name or "local_experts" not in name
        ]
        assert norm == pytest.approx(float(torch.cat(own).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("system", "name"),
    [("huginn", "decoder.loops.1.adapter"), ("shared_block", "layers.0.mlp.recurrent_block.adapter")],
)
def test_spectral_norms_of_adapters(watched: dict[str, tuple[Recorded, dict]], system: str, name: str) -> None:
    recorded, report = watched[system]
    [adapter] = [weight for known, weight in recorded.parameters.items() if known.endswith(name)]
    place = _PLACES[system][0]
    for half, weight in zip(("state", "input"), adapter.reshape(32, 64).double().chunk(2, dim=1), strict=True):
        expected = float(torch.linalg.svdvals(weight)[0])
        assert report["figures"][f"recurrence/{place}/adapter {half} norm"] == pytest.approx(expected, rel=1e-4)


def test_projections_of_a_shared_block(watched: dict[str, tuple[Recorded, dict]]) -> None:
    recorded, report = watched["shared_block"]
    weights = [recorded.parameters[f"decoder.layers.1.mlp.experts.{name}"].double() for name in ("proj_in", "proj_out")]
    flat = [torch.nn.functional.normalize(weight.flatten(1), dim=1) for weight in weights]
    for name, unit in zip(("proj_in", "proj_out"), flat, strict=True):
        pairs = [float(unit[i] @ unit[j]) for i in range(4) for j in range(i)]
        expected = 1.0 - sum(pairs) / len(pairs)
        assert report["figures"][f"system/layer 2/{name} divergence"] == pytest.approx(expected, rel=1e-5)
    deviation = [(w @ w.T - torch.eye(32)).square().sum() / 32 for weight in weights for w in weight]
    expected = float(sum(deviation)) / len(deviation)
    assert report["figures"]["system/layer 2/projection orthogonality"] == pytest.approx(expected, rel=1e-3, abs=1e-9)


_DP2, _TP2, _PP2, _EP2 = ("", *(f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline", "expert")))
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_SELECTIVE = "--recompute-granularity selective --recompute-modules moe"
_OFF = "--no-use-distributed-optimizer --no-load-optim"
# System, and the layouts of two ranks that it is watched under.
_LAYOUTS = {
    "huginn": (f"{_DP2} {_OFF}", f"{_TP2} {_FULL}", f"{_PP2} --pipeline-model-parallel-layout E|tttL"),
    "recurrent_moe": (f"{_PP2} --num-layers 4 {_SELECTIVE}", f"{_EP2} {_FULL}"),
    "recurrent_experts": (_TP2, _EP2),
    "gru_experts": (_TP2,),
    "shared_block": (_EP2,),
    "universal": (_TP2,),
    "sequential_experts": (f"{_TP2} {_SELECTIVE}",),
}


def _layers(system: str) -> str:
    return "--num-layers 4" if system == "recurrent_moe" else ""


def test_figures_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    def line(system: str, folder: str, layout: str) -> str:
        run = _run(system, f"{_layers(system)} --moe-layer-freq 1 --load {tmp_path / system} {layout}")
        return f"{run} --save {tmp_path / folder} --health-interval 1"

    saving = [
        f"{_run(system, _layers(system))} --save {tmp_path / system} --save-interval 1 --exit-interval 1"
        for system in _LAYOUTS
    ]
    run_ranks(1, train_all, [*saving, *(line(system, f"{system}-alone", "") for system in _LAYOUTS)])
    split = {
        f"{system}-{number}": (system, layout)
        for system, layouts in _LAYOUTS.items()
        for number, layout in enumerate(layouts)
    }
    run_ranks(2, train_all, [line(system, folder, layout) for folder, (system, layout) in split.items()])
    for folder, (system, layout) in split.items():
        [expected], [found] = read_records(tmp_path / f"{system}-alone"), read_records(tmp_path / folder)
        assert found["figures"].keys() == expected["figures"].keys(), (system, layout)
        for part in ("figures", "expert gradients"):
            for tag, value in expected[part].items():
                assert found[part][tag] == pytest.approx(value, rel=1e-4, abs=1e-6), (system, layout, tag)
        for tag, loads in expected["experts"].items():
            assert found["experts"][tag]["load"] == pytest.approx(loads["load"]), (system, layout, tag)
