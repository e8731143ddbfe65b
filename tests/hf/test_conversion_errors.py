"""What cannot be converted is refused in one line, and nothing is left under the final name."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from more_megatron import pickles
from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.flags import MoREFlags
from more_megatron.hf.conversion.architecture import args_from_config, config_from_args
from more_megatron.hf.conversion.export import to_hf
from more_megatron.hf.conversion.importer import from_hf
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.conversion.megatron_writer import write_release
from more_megatron.hf.conversion.safetensors_files import tensor_bytes, write_files
from more_megatron.hf.mapping import entries
from more_megatron.systems import base
from more_megatron.systems.export import Row
from more_megatron.unfinished import unfinished_folder
from tests.helpers.shell import PROJECT
from tests.hf.conversion_sources import make_args, write_source


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint and the Hugging Face model it makes."""
    folder = tmp_path_factory.mktemp("sources")
    write_source(folder / "ckpt", config_from_args(make_args()), make_args())
    to_hf(folder / "ckpt", folder / "hf", tokenizer=False, progress=False)
    return folder


@pytest.fixture
def folder(sources: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder."""
    return shutil.copytree(sources, tmp_path / "copy")


def _refused(convert: Callable[[], Any], place: Path, *parts: str) -> None:
    """Check that a conversion ends with one line and leaves nothing."""
    with pytest.raises(MoREError) as caught:
        convert()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not place.exists()
    assert not list(place.parent.glob(".*.partial"))


def _export(folder: Path, **fields: Any) -> Callable[[], Any]:
    return lambda: to_hf(folder / "ckpt", folder / "out", **{"tokenizer": False, "progress": False, **fields})


def _import(folder: Path) -> Callable[[], Any]:
    return lambda: from_hf(folder / "hf", folder / "out", progress=False)


def _data_file(folder: Path) -> Path:
    return next((folder / "ckpt" / "release").glob("*.distcp"))


def _truncate(folder: Path) -> None:
    _data_file(folder).write_bytes(_data_file(folder).read_bytes()[:-100])


def _garble(folder: Path) -> None:
    content = bytearray(_data_file(folder).read_bytes())
    content[len(content) // 2 :] = b"\xa5" * (len(content) - len(content) // 2)
    _data_file(folder).write_bytes(content)


def _garble_numbers(folder: Path) -> None:
    checkpoint = MegatronCheckpoint(folder / "ckpt")
    (router,) = (e for e in entries(config_from_args(checkpoint.args)) if e.layer == 1 and "router" in e.key)
    numbers = bytes(tensor_bytes(checkpoint.read(router)))
    content = _data_file(folder).read_bytes()
    assert content.count(numbers) == 1
    _data_file(folder).write_bytes(content.replace(numbers, numbers[::-1]))


def _garble_all(folder: Path) -> None:
    _data_file(folder).write_bytes(b"\xa5" * _data_file(folder).stat().st_size)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate, ("is truncated", "there is no complete one beside it")),
        (_garble, ("is damaged: decoder.", "cannot be read")),
        (_garble_numbers, ("is damaged: decoder.layers.mlp.router.weight cannot be read",)),
        (_garble_all, ("is damaged: common_state", "cannot be read")),
        (lambda folder: _data_file(folder).unlink(), ("__0_0.distcp is missing",)),
        (lambda folder: (folder / "ckpt/release/metadata.json").unlink(), ("metadata.json is missing",)),
        (
            lambda folder: (folder / "ckpt/release/metadata.json").write_text("[]"),
            ("metadata.json is missing or damaged",),
        ),
        (
            lambda folder: (folder / "ckpt/release/metadata.json").write_text('{"sharded_backend": "zarr"}'),
            ("it is of the format zarr, not torch_dist",),
        ),
        (lambda folder: (folder / "ckpt/latest_checkpointed_iteration.txt").write_text("x"), ("which checkpoint",)),
        (lambda folder: (folder / "ckpt/latest_checkpointed_iteration.txt").unlink(), ("name another folder",)),
        (lambda folder: shutil.rmtree(folder / "ckpt"), ("is not a folder",)),
    ],
)
def test_damaged_checkpoint(damage: Callable[[Path], Any], parts: tuple[str, ...], folder: Path) -> None:
    damage(folder)
    _refused(_export(folder), folder / "out", str(folder / "ckpt"), *parts)


def test_missing_tokenizer(folder: Path) -> None:
    remedy = "name its place with --tokenizer-model, or --no-tokenizer"
    _refused(_export(folder, tokenizer=True), folder / "out", "absent.model, is not there", remedy)


def test_parameters_that_the_table_does_not_know(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, name = base.MOE, "mlp.router.weight"
    monkeypatch.setattr(base, "MOE", tuple(row for row in known if row.megatron != name))
    key = "decoder.layers.mlp.router.weight"
    _refused(_export(folder), folder / "out", f"holds parameters that the mapping has no row for: {key}")
    monkeypatch.setattr(base, "MOE", (*known, Row("mlp.more", "mlp.more", "h")))
    _refused(_export(folder), folder / "out", "lacks the parameter decoder.layers.0.mlp.more")
    monkeypatch.setattr(base, "MOE", (Row(name, "mlp.gate.weight", "h N"), *known))
    _refused(_export(folder), folder / "out", f"holds {key} in shape [2, 4, 16] instead of [2, 16, 4]")


def test_parameters_that_the_model_does_not_have(folder: Path) -> None:
    path = folder / "hf" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.more": torch.zeros(1)}, path)
    _refused(_import(folder), folder / "out", "holds parameters that the mapping has no row for: model.more")
    name = "model.norm.weight"
    save_file({key: tensor for key, tensor in weights.items() if key != name}, path)
    _refused(_import(folder), folder / "out", f"lacks the parameter {name}")
    save_file({**weights, name: torch.zeros(17)}, path)
    _refused(_import(folder), folder / "out", f"holds {name} in shape [17] instead of [16]")
    save_file({**weights, "model.embed_tokens.weight": torch.zeros(24, 16, dtype=torch.int8)}, path)
    _refused(_import(folder), folder / "out", "as I8: save it in floating point")
    path.write_bytes(path.read_bytes()[:100])
    _refused(_import(folder), folder / "out", "is damaged")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"variant": "no_such_system"}, "variant 'no_such_system' does not exist: choose one of "),
        ({"model_type": "llama"}, "is a model of type llama, not more"),
        ({"hidden_act": "tanh"}, "hidden_act tanh with gated_mlp True has no counterpart in Megatron"),
        ({"rope_scaling_factor": 4.0}, "rope_scaling_factor 4.0 has no counterpart in Megatron"),
    ],
)
def test_model_that_megatron_cannot_express(fields: dict[str, Any], part: str, folder: Path) -> None:
    path = folder / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    _refused(_import(folder), folder / "out", part)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1 must be at least 1"),
        ({"num_hidden_layers": 3}, "moe_layers names 2 layers of 3"),
        ({"num_hidden_layers": 3, "moe_layers": [True] * 3}, "lacks the parameter model.layers.2."),
        ({"num_hidden_layers": 1, "moe_layers": [True]}, "no row for: model.layers.1."),
        ({"moe_layers": "all"}, "moe_layers 'all' must be a list of true and false"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 must be at most 4, the number of experts"),
        ({"num_experts_per_tok": True}, "num_experts_per_tok True must be an integer"),
        ({"num_experts": None}, "num_experts None must be an integer"),
        ({"num_experts": 3}, "instead of [3, "),
        ({"mean_recurrence": -3}, "mean_recurrence -3 must be at least 1"),
        ({"mean_recurrence": "many"}, "mean_recurrence 'many' must be an integer"),
        ({"mean_recurrence": 2.5}, "mean_recurrence 2.5 must be an integer"),
        ({"hidden_size": "16"}, "hidden_size '16' must be an integer"),
        ({"hidden_size": None}, "hidden_size None must be an integer"),
        ({"recurrent_intermediate_size": [64]}, "recurrent_intermediate_size [64] must be an integer"),
        ({"norm_eps": float("nan")}, "norm_eps nan must be a finite number"),
        ({"norm_eps": 10**400}, "must be a finite number"),
        ({"rotary_percent": 2}, "rotary_percent 2 must be at most 1.0"),
        ({"norm_type": "batchnorm"}, "norm_type 'batchnorm' does not exist: choose one of rmsnorm, layernorm"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is no multiple of num_key_value_heads 3"),
        ({"router_group_topk": 1}, "router_num_groups and router_group_topk must be given together"),
        ({"variant": ["moe"]}, "does not exist: choose one of "),
    ],
)
def test_configuration_that_is_wrong(fields: dict[str, Any], part: str, folder: Path) -> None:
    path = folder / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    _refused(_import(folder), folder / "out", part)


@pytest.mark.parametrize("content", ["[]", "{", '{"lr": 0.1}', '{"params_dtype": {"dtype": "load"}}', '"lr"'])
def test_arguments_that_are_not_those_of_a_run(content: str, folder: Path) -> None:
    path = folder / "hf" / "megatron_args.json"
    path.write_text(content)
    _refused(_import(folder), folder / "out", str(path), "remove it")
    path.unlink()
    assert len(_import(folder)()) == 1


def test_arguments_do_not_allow_code_or_name_places(folder: Path) -> None:
    path = folder / "hf" / "megatron_args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trust_remote_code": True, "load": "/elsewhere"}))
    _import(folder)()
    args = vars(MegatronCheckpoint(folder / "out").args)
    assert not {"trust_remote_code", "load"} & args.keys()


def test_arguments_of_a_vocabulary_that_has_grown_since(folder: Path) -> None:
    config, weights = folder / "hf" / "config.json", folder / "hf" / "model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 32}))
    grown = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors = {name: torch.cat([x, x[:8]]) if name in grown else x for name, x in load_file(weights).items()}
    save_file(tensors, weights)
    _import(folder)()
    assert MegatronCheckpoint(folder / "out").args.padded_vocab_size == 32


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(number: float, folder: Path) -> None:
    name, path = "model.layers.1.mlp.gate.weight", folder / "hf" / "model.safetensors"
    weights = load_file(path)
    weights[name][1, 2] = number
    save_file(weights, path)
    _refused(_import(folder), folder / "out", name, "holds NaN or infinity in 1 of 64 places")
    args = make_args()
    config = config_from_args(args)
    parameters = [(entry, torch.float32) for entry in entries(config)]
    broken = folder / "broken"
    broken.mkdir()
    write_release(broken, config, args, parameters, lambda entry: torch.full(entry.shape, number))
    export = functools.partial(to_hf, broken, folder / "out", tokenizer=False, progress=False)
    _refused(export, folder / "out", "embedding.word_embeddings.weight", "holds NaN or infinity")


def test_numbers_that_a_dtype_cannot_hold(folder: Path) -> None:
    path = folder / "hf" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, path)
    narrow = functools.partial(from_hf, folder / "hf", folder / "out", dtype="float16", progress=False)
    _refused(narrow, folder / "out", "model.norm.weight", "reaches 1e+06", "use --dtype bfloat16")


def test_a_bit_that_has_flipped(folder: Path) -> None:
    path = folder / "hf" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    _refused(_import(folder), folder / "out", "model.safetensors is damaged: ", "is not what was written")
    # Whoever saves the model anew writes no hashes of before.
    save_file(load_file(path), path)
    assert len(_import(folder)()) == 1


@pytest.mark.parametrize(
    "name", ["../hf/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 7, None, ["model.safetensors"]]
)
def test_an_index_that_names_files_elsewhere(name: Any, folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(_import(folder), folder / "out", "model.safetensors.index.json")


def test_an_index_that_is_a_list(folder: Path) -> None:
    (folder / "hf" / "model.safetensors.index.json").write_text("[]")
    _refused(_import(folder), folder / "out", "model.safetensors.index.json is damaged")


def test_weights_that_are_there_twice(folder: Path) -> None:
    to_hf(folder / "ckpt", folder / "shards", tokenizer=False, progress=False, max_shard_size=20_000)
    files = sorted((folder / "shards").glob("*.safetensors"))
    first, second = (load_file(file) for file in files[:2])
    name = next(iter(first))
    save_file({**second, name: first[name] + 1.0}, files[1])
    back = functools.partial(from_hf, folder / "shards", folder / "out", progress=False)
    _refused(back, folder / "out", f"holds {name} in both {files[0].name} and {files[1].name}")
    # Whoever saves a smaller model over it leaves the index, and the other way round the single file.
    shutil.copy(folder / "hf" / "model.safetensors", folder / "shards")
    _refused(back, folder / "out", "holds both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "megatron_args.json"])
def test_a_link_that_leads_elsewhere(name: str, folder: Path) -> None:
    outside = shutil.move(folder / "hf" / name, folder / name)
    (folder / "hf" / name).symlink_to(outside)
    _refused(_import(folder), folder / "out", f"hf/{name} is a link to {outside}, outside of its folder")


def test_the_cache_of_the_hub_is_read(folder: Path) -> None:
    snapshot, blobs = folder / "hub/snapshots/abc", folder / "hub/blobs"
    for place in (snapshot, blobs):
        place.mkdir(parents=True)
    for file in (folder / "hf").iterdir():
        (snapshot / file.name).symlink_to(shutil.move(file, blobs / f"hash-of-{file.name}"))
    assert len(from_hf(snapshot, folder / "out", progress=False)) == 1


def test_two_conversions_into_one_folder(folder: Path) -> None:
    with unfinished_folder(folder / "out") as first:
        (first / "file").write_text("of the first")
        with pytest.raises(MoREError, match=r"another process writes .*out: wait for it"):
            _export(folder)()
        assert (first / "file").exists()
    assert (folder / "out" / "file").exists()


def test_configuration_that_is_not_there_or_incomplete(folder: Path) -> None:
    path = folder / "hf" / "config.json"
    path.write_text(json.dumps({"model_type": "more", "variant": "moe"}))
    _refused(_import(folder), folder / "out", "config.json: it does not say vocab_size; correct it, or export")
    path.write_text("[]")
    _refused(_import(folder), folder / "out", "is a model of type None, not more")
    path.write_text("{")
    _refused(_import(folder), folder / "out", "config.json is damaged")
    path.unlink()
    _refused(_import(folder), folder / "out", "holds no config.json")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"multi_latent_attention": True}, "--multi-latent-attention True has no counterpart"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1 has no counterpart"),
        ({"window_size": [4, 0]}, "--window-size [4, 0] has no counterpart"),
        ({"layernorm_zero_centered_gamma": True}, "--layernorm-zero-centered-gamma True has no counterpart"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type yarn has no counterpart"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn has no"),
        ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]}, "'sinkhorn'] has no counterpart"),
        ({"moe_router_load_balancing_type": None}, "--moe-router-load-balancing-type None has no counterpart"),
    ],
)
def test_run_that_the_model_cannot_express(values: dict[str, Any], part: str) -> None:
    with pytest.raises(MoREError) as caught:
        config_from_args(make_args(**values))
    assert part in str(caught.value)


def test_run_of_another_system() -> None:
    args = make_args()
    args.more_variant = "no_such_system"
    with pytest.raises(MoREError, match="--more-variant no_such_system: systems that can be converted are "):
        config_from_args(args)
    del args.more_variant
    with pytest.raises(MoREError, match="the checkpoint is of a run without --more-variant"):
        config_from_args(args)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": None},
        {"num_layers": "2"},
        {"moe_layer_freq": 0},
        {"recurrence_steps": "x"},
    ],
)
def test_arguments_of_wrong_types(values: dict[str, Any]) -> None:
    with pytest.raises(MoREError, match=r"Error: |must be an integer"):
        config_from_args(make_args(**values))


def test_checkpoint_of_another_version(tmp_path: Path) -> None:
    args = make_args()
    del args.qk_layernorm
    write_source(tmp_path / "ckpt", config_from_args(make_args()), args)
    _refused(_export(tmp_path), tmp_path / "out", "do not say qk_layernorm")


@pytest.mark.parametrize("convert", [_export, _import])
def test_full_disk(convert: Callable[..., Callable[[], Any]], folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        _refused(convert(folder), folder / "out", "out cannot be written: ", "free some, or write elsewhere")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_folder_that_is_not_empty_is_left_alone(folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    (out / "file").write_text("mine")
    for convert in (_export(folder), _import(folder)):
        with pytest.raises(MoREError, match="exists and is not an empty folder"):
            convert()
    assert (out / "file").read_text() == "mine"
    (out / "file").unlink()
    assert len(_export(folder)()) == 1
    assert (out / "model.safetensors").is_file()


def test_the_tool_ends_with_one_line(folder: Path) -> None:
    command = [sys.executable, PROJECT / "tools" / "convert_checkpoint.py", "from-hf", "--load", folder / "ckpt"]
    ended = subprocess.run([*command, "--save", folder / "out"], capture_output=True, text=True)
    assert ended.returncode == 1
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"convert_checkpoint.py: error: --load {folder / 'ckpt'} holds no config.json")
    assert len(ended.stderr.splitlines()) == 1
    assert not (folder / "out").exists()


def test_dtype_is_asked_for(folder: Path) -> None:
    to_hf(folder / "ckpt", folder / "out", dtype="bfloat16", tokenizer=False, progress=False)
    exact, rounded = (load_file(folder / name / "model.safetensors") for name in ("hf", "out"))
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    assert json.loads((folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    tensors = {str(number): torch.rand(size) for number, size in enumerate((10, 10, 5, 5))}
    # What is read behind a tensor of smaller numbers would not be aligned to its own.
    tensors["2"] = tensors["2"].half()
    write_files(tmp_path, {name: tensor.to("meta") for name, tensor in tensors.items()}, tensors.__getitem__, 80)
    files = [load_file(path) for path in sorted(tmp_path.glob("model-*-of-00002.safetensors"))]
    assert [list(file) for file in files] == [["0", "1"], ["3", "2"]]
    assert all(torch.equal(tensor, tensors[name]) for file in files for name, tensor in file.items())


def test_arguments_and_configuration_say_the_same() -> None:
    for values in ({}, {"recurrence_ffn_hidden_size": 24}, {"more_variant": "moe", "moe_layer_freq": [0, 1]}):
        config = config_from_args(make_args(**values))
        derived = make_args(**args_from_config(config))
        assert config_from_args(derived) == config
        # A width that is the default is not asked for: a run that does not ask for it fits.
        assert derived.recurrence_ffn_hidden_size == values.get("recurrence_ffn_hidden_size")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"recurrence_steps": 7},
        {"recurrence_eval_steps": 9, "recurrence_steps": 7},
        {"recurrence_sampling": "uniform", "recurrence_max_steps": 9},
        {"recurrence_sampling": "uniform", "recurrence_min_steps": 2, "recurrence_max_steps": 5},
        {"recurrence_sampling": "poisson-lognormal", "recurrence_min_steps": 6},
        {"recurrence_curriculum": "0:1,10:3"},
    ],
)
def test_evaluation_steps_are_those_of_the_trainer(fields: dict[str, Any]) -> None:
    config = MoREConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **fields)
    assert MoREFlags.of(make_args(**fields)).evaluation_steps == config.evaluation_steps


def test_pickles_build_nothing_but_plain_types(tmp_path: Path) -> None:
    path = tmp_path / "object"
    torch.save(
        {"args": make_args(), "dtype": torch.bfloat16, "tensor": torch.ones(2), "call": _Call(tmp_path / "made")}, path
    )
    found = pickles.load(io.BytesIO(path.read_bytes()))
    assert found["args"] == make_args()
    assert found["dtype"] is torch.bfloat16
    assert torch.equal(found["tensor"], torch.ones(2))
    assert isinstance(found["call"], pickles.Opaque)
    assert not (tmp_path / "made").exists()


def _plant_in_index(checkpoint: Path, call: _Call) -> None:
    metadata = pickles.read_metadata(checkpoint)
    metadata.planner_data = call
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _plant_in_object(key: str) -> Callable[[Path, _Call], None]:
    """Return what replaces an object or tensor of a checkpoint by one that holds a call."""

    def plant(checkpoint: Path, call: _Call) -> None:
        metadata = pickles.read_metadata(checkpoint)
        info = next(info for index, info in metadata.storage_data.items() if index.fqn.startswith(key))
        content = io.BytesIO()
        torch.save([{"args": make_args(spec=call), "call": call}], content)
        with open(checkpoint / info.relative_path, "ab") as file:
            info.offset, info.length = file.tell(), len(content.getvalue())
            file.write(content.getvalue())
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))

    return plant


def _plant_in_legacy_common(form: Callable[[dict[str, Any], Path], None]) -> Callable[[Path, _Call], None]:
    return lambda checkpoint, call: form({"args": make_args(), "call": call}, checkpoint / "common.pt")


def _save_as_before(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _save_pickle(content: dict[str, Any], path: Path) -> None:
    # Where a file of PyTorch before 1.6 has a number.
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "plant",
    [
        _plant_in_index,
        *(_plant_in_legacy_common(form) for form in (torch.save, _save_as_before, _save_pickle)),
        _plant_in_object("common_state"),
        _plant_in_object("decoder.layers.mlp.router.weight"),
        _plant_in_object("decoder.final_layernorm._extra_state"),
    ],
)
def test_code_in_a_checkpoint_is_not_run(plant: Callable[[Path, _Call], None], folder: Path) -> None:
    """Neither by our reader nor by Megatron's own, which computes what the export is compared with."""
    made = folder / "made"
    plant(folder / "ckpt" / "release", _Call(made))
    with contextlib.suppress(MoREError):
        _export(folder, verify=True)()
    assert not made.exists()


class _Call:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self._path, "w")
