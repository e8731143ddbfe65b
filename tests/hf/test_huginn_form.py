"""Huginn's published form in and out: a folder as its authors' code writes it, made here from its mathematics."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from more_megatron.errors import MoREError
from more_megatron.hf.conversion.architecture import config_from_args
from more_megatron.hf.conversion.export import to_hf
from more_megatron.hf.conversion.importer import from_hf
from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY, dense
from tests.hf.conversion_sources import make_args, write_source

Tensors = dict[str, torch.Tensor]

_HIDDEN, _HEADS, _WIDTH, _VOCABULARY, _LENGTH = 32, 4, 48, 128, 16
_PRELUDE, _CORE, _CODA = 1, 2, 2
_CONFIG: dict[str, Any] = {
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "block_class_name": "SandwichBlock",
    "block_size": _LENGTH,
    "head_dim": _HIDDEN // _HEADS,
    "injection_type": "linear",
    "intermediate_size": _WIDTH,
    "mean_backprop_depth": 2,
    "mean_recurrence": 4,
    "n_embd": _HIDDEN,
    "n_heads": _HEADS,
    "n_layers": _PRELUDE + _CORE + _CODA,
    "n_layers_in_coda": _CODA,
    "n_layers_in_prelude": _PRELUDE,
    "n_layers_in_recurrent_block": _CORE,
    "norm_eps": 1e-06,
    "qk_bias": True,
    "rope_base": 50000,
    "tie_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": _VOCABULARY,
}
_PARTS = {"prelude": _PRELUDE, "core_block": _CORE, "coda": _CODA}


def _tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.1 * torch.randn(shape, generator=generator)

    found = {"transformer.wte.weight": draw(_VOCABULARY, _HIDDEN), "transformer.adapter.weight": draw(32, 64)}
    found["transformer.ln_f.weight"] = draw(_HIDDEN, mean=1.0)
    for part, count in _PARTS.items():
        for prefix in (f"transformer.{part}.{number}" for number in range(count)):
            found |= {f"{prefix}.norm_{number}.weight": draw(_HIDDEN, mean=1.0) for number in range(1, 5)}
            found[f"{prefix}.attn.Wqkv.weight"] = draw(3 * _HIDDEN, _HIDDEN)
            found[f"{prefix}.attn.qk_bias"] = draw(2, 1, _HEADS, _HIDDEN // _HEADS)
            found[f"{prefix}.attn.proj.weight"] = draw(_HIDDEN, _HIDDEN)
            found[f"{prefix}.mlp.fc.weight"] = draw(2 * _WIDTH, _HIDDEN)
            found[f"{prefix}.mlp.proj.weight"] = draw(_HIDDEN, _WIDTH)
    found["lm_head.weight"] = found["transformer.wte.weight"].clone()
    found["freqs_cis"] = _angles()
    return found


def _angles() -> torch.Tensor:
    """Return cosine and sine, [1, s, 1, planes, 2]."""
    size = _HIDDEN // _HEADS
    angles = torch.outer(torch.arange(_LENGTH).float(), 50000.0 ** (-torch.arange(0, size, 2) / size))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[None, :, None]


def _logits(tensors: Tensors, ids: torch.Tensor, state: torch.Tensor, steps: int) -> torch.Tensor:
    """Return what the authors' code computes from ids, [b, s], and an initial state, [b, s, h]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * tensors[f"{name}.weight"]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turn = torch.view_as_complex(tensors["freqs_cis"][:, : x.size(1)].contiguous())
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def layer(x: torch.Tensor, name: str) -> torch.Tensor:
        qkv = norm(x, f"{name}.norm_1") @ tensors[f"{name}.attn.Wqkv.weight"].T
        query, key, value = (part.unflatten(-1, (_HEADS, -1)) for part in qkv.chunk(3, dim=-1))
        query, key = (
            rotated(query + tensors[f"{name}.attn.qk_bias"][0]),
            rotated(key + tensors[f"{name}.attn.qk_bias"][1]),
        )
        attended = functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query, key, value)), is_causal=True
        )
        x = norm(attended.transpose(1, 2).flatten(2) @ tensors[f"{name}.attn.proj.weight"].T + x, f"{name}.norm_2")
        gate, up = (norm(x, f"{name}.norm_3") @ tensors[f"{name}.mlp.fc.weight"].T).chunk(2, dim=-1)
        return norm((functional.silu(gate) * up) @ tensors[f"{name}.mlp.proj.weight"].T + x, f"{name}.norm_4")

    def run(x: torch.Tensor, part: str) -> torch.Tensor:
        for number in range(_PARTS[part]):
            x = layer(x, f"transformer.{part}.{number}")
        return x

    inputs = run(tensors["transformer.wte.weight"][ids] * math.sqrt(_HIDDEN), "prelude")
    for _ in range(steps):
        state = run(torch.cat((state, inputs), dim=-1) @ tensors["transformer.adapter.weight"].T, "core_block")
    output = norm(run(norm(state, "transformer.ln_f"), "coda"), "transformer.ln_f")
    return output @ tensors["lm_head.weight"].T


def _write(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    """Write a folder of two files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**_CONFIG, **fields}))
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _import(source: Path, target: Path) -> Path:
    from_hf(source, target, verify=True, progress=False)
    return target


def _export(source: Path, target: Path, form: str) -> Path:
    to_hf(source, target, verify=True, progress=False, tokenizer=False, form=form)
    return target


@torch.no_grad()
def test_a_published_folder_computes_the_same_here(tmp_path: Path) -> None:
    tensors = _tensors()
    checkpoint = _import(_write(tmp_path / "published", tensors), tmp_path / "checkpoint")
    model = MoREForCausalLM.from_pretrained(_export(checkpoint, tmp_path / "more", form="more")).eval()
    assert model.config.mean_recurrence == 4
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(_VOCABULARY, (2, _LENGTH), generator=generator)
    state = 0.632 * torch.randn(2, _LENGTH, _HIDDEN, generator=generator)
    for steps in (1, 4, 8):
        found = model(ids, input_states=state[None], num_steps=steps).logits
        torch.testing.assert_close(found, _logits(tensors, ids, state, steps), rtol=0, atol=1e-4)


def test_it_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = _tensors()
    checkpoint = _import(_write(tmp_path / "published", tensors), tmp_path / "checkpoint")
    folder = _export(checkpoint, tmp_path / "again", form="huginn")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, tensors[name]) or (name == "freqs_cis" and torch.allclose(tensor, tensors[name]))
    config = json.loads((folder / "config.json").read_text())
    # Imports do not know how many steps carried gradient.
    assert {name: config[name] for name in _CONFIG} == {**_CONFIG, "mean_backprop_depth": 4}
    assert "raven_modeling_minimal.py" in (folder / "README.md").read_text()
    assert not (folder / "modeling_more.py").exists()


def test_one_copy_of_the_embedding_is_enough(tmp_path: Path) -> None:
    for missing in ("lm_head.weight", "transformer.wte.weight", "freqs_cis"):
        tensors = {name: tensor for name, tensor in _tensors().items() if name != missing}
        _import(_write(tmp_path / f"without {missing}", tensors), tmp_path / f"from {missing}")


def _change(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors[name] + 1}


def _leave_out(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (_change("lm_head.weight"), {}, "transformer.wte.weight and lm_head.weight are one parameter, and they differ"),
        (_leave_out("lm_head.weight", "transformer.wte.weight"), {}, "lacks the parameter transformer.wte.weight"),
        (_leave_out("transformer.coda.1.norm_4.weight"), {}, r"lacks the parameter transformer\.coda\.1\.norm_4"),
        (dict, {"injection_type": "add"}, "injection_type add is not what Huginn-0125 has, linear"),
        (dict, {"norm_class_name": "LayerNorm"}, "norm_class_name LayerNorm"),
        (dict, {"n_embd": "wide"}, "n_embd 'wide' must be a number"),
        (dict, {"model_type": "huginn"}, "is a model of type huginn, not more, huginn_raven"),
    ],
)
def test_a_folder_that_is_not_of_the_form_is_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], fields: dict[str, Any], message: str
) -> None:
    folder = _write(tmp_path / "published", change(_tensors()), **fields)
    with pytest.raises(MoREError, match=message) as refusal:
        _import(folder, tmp_path / "checkpoint")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "checkpoint").exists()


_HUGINN: dict[str, Any] = {
    "more_variant": "huginn",
    "num_layers": 3,
    "num_experts": None,
    "add_qkv_bias": True,
    "rotary_interleaved": True,
    "rotary_base": 50000,
    "recurrence_state_std": 0.632,
    "untie_embeddings_and_output_weights": False,
    "recurrence_prelude_layers": None,
    "recurrence_coda_layers": None,
    "recurrence_injection": None,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"more_variant": "shared_block", "num_experts": 4}, "is one of huginn, and the checkpoint is of shared_block"),
        ({"num_experts": 4}, "it has no place for experts"),
        ({"normalization": "LayerNorm"}, "it has no place for norms of the kind layernorm"),
        ({"recurrence_injection": "add"}, "it has no place for the injection add"),
        ({"rotary_interleaved": False}, "it has no place for rotary positions of the two halves"),
        ({"recurrence_state_std": 1.0}, "it has no place for initial states of deviation 1.0"),
        # Random weights: the biases of values are not zero.
        ({}, "has biases of values that are not zero"),
    ],
)
def test_what_the_form_has_no_place_for_is_said_in_one_line(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    args = make_args(**{**_HUGINN, **values})
    write_source(tmp_path / "run", config_from_args(args), args)
    with pytest.raises(MoREError, match=message) as refusal:
        _export(tmp_path / "run", tmp_path / "out", form="huginn")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_form_is_refused_by_name(tmp_path: Path) -> None:
    args = make_args(**_HUGINN)
    write_source(tmp_path / "run", config_from_args(args), args)
    with pytest.raises(MoREError, match="--format raven does not exist: choose one of more, huginn"):
        _export(tmp_path / "run", tmp_path / "out", form="raven")


def test_training_goes_on_from_a_published_folder_under_any_layout(tmp_path: Path) -> None:
    checkpoint = _import(_write(tmp_path / "published", _tensors()), tmp_path / "checkpoint")
    run = (
        f"{dense(TINY)} --more-variant huginn --num-layers 5 --recurrence-prelude-layers {_PRELUDE} "
        f"--recurrence-coda-layers {_CODA} --recurrence-steps 2 --ffn-hidden-size {_WIDTH} --load {checkpoint} "
        "--train-iters 2"
    )
    (single,) = run_ranks(1, train_all, [run])[-1]
    (fresh,) = run_ranks(1, train_all, [run.replace(f"--load {checkpoint}", "")])[-1]
    assert abs(single.losses[0] - fresh.losses[0]) > 1e-3
    layouts = (
        "--tensor-model-parallel-size 2",
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3",
    )
    for history in run_ranks(2, train_all, [f"{run} {layout}" for layout in layouts])[-1]:
        assert history.losses == pytest.approx(single.losses, rel=1e-5)
        assert history.grad_norms == pytest.approx(single.grad_norms, rel=1e-5)
