"""The backend of Transformer Engine against the local one, with a stand-in for the package that computes on a CPU."""

import collections
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.flags import flag
from more_megatron.systems import get_system, systems
from more_megatron.systems.export import FEED_FORWARD
from more_megatron.training.model import check_system
from tests.blocks.backends.stand_in import FP8_ROWS, Call
from tests.helpers.models import EXPERTS, HIDDEN, RECOMPUTATION, small_config
from tests.helpers.shell import PROJECT

_ROOT = PROJECT
_LAYERS = 2
_OWN_EXPERTS = [name for name, system in systems().items() if system.expert_rows is not FEED_FORWARD]
_SCRIPT = """
import sys
from tests.blocks.backends import stand_in
stand_in.install()
from more_megatron.platform import initialize_platform
initialize_platform()
from tests.blocks.backends.under_stand_in import main
main(sys.argv[1])
"""

# Of one layer: groups, input and output size of each linear layer that its experts ask for. Four heads of 4 in two
# query groups make 32 channels of queries, keys and values.
_QKV, _WIDTH = 32, 2 * HIDDEN
_BLOCK = [(HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, _QKV), (HIDDEN, HIDDEN)]
_FEED_FORWARD, _GATES = [(EXPERTS, HIDDEN, HIDDEN)] * 2, (EXPERTS, HIDDEN, 4 * HIDDEN)
_LINEARS: dict[str, list[tuple[int, int, int]]] = {
    "recurrent_experts": [(EXPERTS, *size) for size in (*_BLOCK, (HIDDEN, 2 * _WIDTH), (_WIDTH, HIDDEN))],
    "shared_block": [(EXPERTS, HIDDEN, HIDDEN)] * 2
    + [(1, *size) for size in (*_BLOCK, (HIDDEN, 4 * _WIDTH), (2 * _WIDTH, HIDDEN))],
    "shared_block_ffn": [(EXPERTS, HIDDEN, 2 * HIDDEN), (EXPERTS, 2 * HIDDEN, HIDDEN)],
    # Experts are as wide as the hidden size here. A cell has four gates.
    "gru_experts": [*_FEED_FORWARD, _GATES],
    "sequential_experts": [*_FEED_FORWARD, _GATES],
    "parallel_experts": [*_FEED_FORWARD, _GATES, (EXPERTS, HIDDEN, 64)],
}
# Systems whose experts attend to each other's rows.


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the systems do in a process where the stand-in takes the place of Transformer Engine."""
    file = tmp_path_factory.mktemp("te") / "found.pt"
    environment = {**os.environ, "MORE_PLATFORM": "cpu", "PYTHONPATH": str(_ROOT)}
    log = file.with_suffix(".log")
    # No pipe, which a process that saves checkpoints could hold open.
    with log.open("w") as output:
        command = [sys.executable, "-c", _SCRIPT, str(file)]
        run = subprocess.run(command, env=environment, cwd=_ROOT, stdout=output, stderr=output, timeout=600)
    assert run.returncode == 0, log.read_text()[-4000:]
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("variant", systems())
def test_a_checkpoint_of_one_backend_gives_the_other_its_outputs_and_gradients(
    found: dict[str, Any], variant: str
) -> None:
    interchange = found["interchange"][variant]
    assert interchange["difference"] < 1e-5
    assert interchange["and back"] < 1e-6


@pytest.mark.parametrize("variant", systems())
def test_both_backends_write_the_same_keys_and_shapes(found: dict[str, Any], variant: str) -> None:
    (tensors, objects), (te_tensors, te_objects) = (
        found["interchange"][variant]["contents"][name] for name in ("local", "te")
    )
    assert tensors == te_tensors
    assert objects == te_objects
    own = {key: shape for key, shape in tensors.items() if ".mlp.experts." in key or ".recurrent_block." in key}
    if variant == "recurrent_experts":
        assert own["decoder.layers.mlp.experts.block.adapter"] == (_LAYERS, EXPERTS, HIDDEN, 2 * HIDDEN)
        assert own["decoder.layers.mlp.experts.block.fc1"] == (_LAYERS, EXPERTS, 2, 2 * HIDDEN, HIDDEN)
        assert own["decoder.layers.mlp.experts.block.norm_3"] == (_LAYERS, EXPERTS * HIDDEN)
    if variant == "shared_block":
        assert own["decoder.layers.mlp.experts.proj_in"] == (_LAYERS, EXPERTS, HIDDEN, HIDDEN)
        assert own["decoder.layers.mlp.recurrent_block.norm_1"] == (_LAYERS, HIDDEN)


@pytest.mark.parametrize("variant", _OWN_EXPERTS)
def test_experts_ask_for_grouped_linear_layers_and_norms(found: dict[str, Any], variant: str) -> None:
    requests = found["interchange"][variant]["requests"]
    # Megatron's own linear layers name the way in which they are parallel.
    ours = [
        request.arguments
        for request in requests
        if request.kind in ("Linear", "GroupedLinear") and request.arguments["rng_tracker_name"] is None
        if request.arguments["get_rng_state_tracker"] is None
    ]
    sizes = [(a.get("num_gemms", 1), a["in_features"], a["out_features"]) for a in ours]
    assert collections.Counter(sizes) == collections.Counter(_LINEARS[variant] * _LAYERS)
    for arguments in ours:
        assert not arguments["bias"]
        assert (arguments["tp_group"], arguments["tp_size"], arguments["parallel_mode"]) == (None, 1, None)
        assert (arguments["params_dtype"], arguments["device"]) == (torch.float32, "cpu")
    norms = [request.arguments for request in requests if request.kind == "RMSNorm"]
    # One before the experts of each layer, one at the end; a block that experts share has four.
    assert len(norms) == _LAYERS + 1 + (4 * _LAYERS if variant.startswith("shared_block") else 0)


def test_a_run_goes_on_under_the_other_backend_with_its_optimizer_state(found: dict[str, Any]) -> None:
    whole = found["resumed"]["whole"]
    for name in ("on te", "on local"):
        assert found["resumed"][name] == pytest.approx(whole, rel=1e-5), name


@pytest.mark.parametrize("variant", ["recurrent_experts", "shared_block"])
def test_half_precision_comes_to_the_same_on_both_backends(found: dict[str, Any], variant: str) -> None:
    assert found["bf16"][variant] < 0.03


def test_problems_of_a_row_are_kept_apart_on_both_backends(found: dict[str, Any]) -> None:
    assert len(found["problems"]) > 2
    assert all(difference < 1e-5 for difference in found["problems"].values()), found["problems"]


@pytest.mark.parametrize("variant", systems())
def test_padding_for_fp8_changes_nothing(found: dict[str, Any], variant: str) -> None:
    assert found["fp8"][variant]["difference"] < 1e-5


@pytest.mark.parametrize("variant", _OWN_EXPERTS)
def test_rows_are_padded_once_however_many_steps_follow(found: dict[str, Any], variant: str) -> None:
    outcome = found["fp8"][variant]
    few, many = outcome["pads"]
    assert few == many > 0
    for calls in outcome["calls"]:
        grouped = [call for call in calls if call.kind == "GroupedLinear"]
        assert all(call.fp8 for call in grouped)
        assert all(rows % FP8_ROWS == 0 for call in grouped for rows in call.rows)
        # Two sequences of 8 tokens go to two of four experts each: not all loads are multiples by themselves.
        assert any(sum(call.rows) > 2 * 8 * 2 for call in grouped)


def test_a_layer_that_stays_in_bf16_is_not_padded(found: dict[str, Any]) -> None:
    calls: list[Call] = [call for call in found["partly fp8"]["recurrent_experts"] if call.kind == "GroupedLinear"]
    # The first half of the calls are those of the first layer.
    half = len(calls) // 2
    assert {call.fp8 for call in calls[:half]} == {False}
    assert {sum(call.rows) for call in calls[:half]} == {2 * 8 * 2}
    assert {call.fp8 for call in calls[half:]} == {True}


def test_full_recomputation_stays_in_fp8(found: dict[str, Any]) -> None:
    outcome = found["recomputed"]["recurrent_experts"]
    assert outcome["difference"] < 1e-6
    assert {call.fp8 for call in outcome["calls"]} == {True, False}  # the last norm is outside
    assert {call.fp8 for call in outcome["calls"] if call.kind == "GroupedLinear"} == {True}


@pytest.mark.parametrize(
    ("variant", "no_grad_steps"),
    [*((name, 0) for name in (*_OWN_EXPERTS, "recurrent_moe")), ("recurrent_experts", 1)],
)
def test_fused_accumulation_of_gradients_loses_no_step(found: dict[str, Any], variant: str, no_grad_steps: int) -> None:
    assert found["fused"][variant, no_grad_steps]["difference"] < 1e-5


def test_weights_are_quantized_once_where_the_first_step_has_no_gradient(found: dict[str, Any]) -> None:
    firsts = found["fused"]["recurrent_experts", 1]["firsts"]
    # The step's first pass through each layer's linear maps of the loop is the first for them all; later ones are not.
    assert firsts.count(True) == 5 * _LAYERS
    assert False in firsts


@pytest.mark.parametrize("variant", _OWN_EXPERTS)
def test_experts_without_rows_take_part(found: dict[str, Any], variant: str) -> None:
    assert found["starved"][variant]["one expert"] < 1e-5
    assert found["starved"][variant]["none"] == 0.0


def test_split_weights_are_drawn_written_and_marked_alike(found: dict[str, Any]) -> None:
    splits = found["splits"]
    local, te = splits["local"], splits["transformer_engine"]
    assert set(local) == set(te) == {"wide", "long", "gated", "adapter"}
    for name, whole in local.items():
        assert torch.equal(torch.nan_to_num(whole), torch.nan_to_num(te[name])), name
    assert te["gated"].shape == (3, 4, 2, 6, 4)
    # It is layer 1, and holds experts 2 and 3. Marks of one expert's weight know no dimension for the expert.
    assert te["wide"][1, 3, 5, 3] == 23 + 300
    marks = splits["marks"]
    assert marks["local"]["wide"] == (True, 1, (2, 3, 4))
    assert marks["transformer_engine"]["wide.weight1"] == (True, 0, (3, 4))
    assert marks["transformer_engine"]["long.weight0"] == (True, 1, (3, 4))
    assert marks["transformer_engine"]["gated.weight0"] == (True, 1, (6, 4))
    assert marks["transformer_engine"]["adapter.1.weight0"][0] is False


@pytest.mark.parametrize("variant", _OWN_EXPERTS)
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fp8": "hybrid"}, "--transformer-impl transformer_engine"),
        ({"fp8": "hybrid", "fp8_recipe": "custom"}, "--fp8-recipe delayed, tensorwise"),
        ({"fp8_param": True}, "--fp8-param-gather"),
        ({"fp4": "e2m1"}, "--fp4-format"),
        ({"quant_recipe": "recipe"}, "--te-precision-config-file"),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm"),
        ({"fp8": "hybrid", "hidden_size": 24}, "--hidden-size, 24, to be a multiple of 16"),
    ],
    ids=str,
)
def test_precision_that_experts_cannot_honour_is_refused(variant: str, fields: dict[str, Any], named: str) -> None:
    config = small_config(variant)
    # Set afterwards: Megatron's own checks of some of them need the package.
    if "fp8" in fields and "--transformer-impl" not in named:
        fields = fields | {"transformer_impl": "transformer_engine"}
    for name, value in ({"fp8_recipe": "tensorwise"} | fields).items():
        setattr(config, name, value)
    with pytest.raises(MoREError) as refusal:
        check_system(config)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("variant", _OWN_EXPERTS)
def test_a_width_that_fp8_cannot_have_is_refused(variant: str) -> None:
    own = "recurrence_ffn_hidden_size" if get_system(variant).block_width else "moe_ffn_hidden_size"
    config = small_config(variant, **{own: 40})
    config.transformer_impl, config.fp8, config.fp8_recipe = "transformer_engine", "hybrid", "tensorwise"
    with pytest.raises(MoREError, match=f"{flag(own)}.*, 40, to be a multiple of 16"):
        check_system(config)


@pytest.mark.parametrize("variant", [name for name, variant in systems().items() if variant.recurrent])
def test_recomputation_that_would_leave_fp8_is_refused(variant: str) -> None:
    config = small_config(variant, **RECOMPUTATION["selective"])
    config.transformer_impl, config.fp8, config.fp8_recipe = "transformer_engine", "hybrid", "tensorwise"
    with pytest.raises(MoREError, match="--recompute-granularity full"):
        check_system(config)


def test_fp8_that_experts_can_honour_is_accepted() -> None:
    for variant in systems():
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
            config = small_config(variant, hidden_size=128, num_attention_heads=4, moe_ffn_hidden_size=128)
            config.transformer_impl, config.fp8, config.fp8_recipe = "transformer_engine", "hybrid", recipe
            check_system(config)
