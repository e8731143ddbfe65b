"""The mapping table names every parameter of the Hugging Face model, and its layouts lose nothing."""

from typing import Any

import pytest
import torch

from more_megatron.errors import MoREError
from more_megatron.hf.exported.configuration_more import MoREConfig
from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.system import find_system, system_names
from more_megatron.hf.mapping import Entry, entries, extra_states
from more_megatron.systems import names
from more_megatron.systems.export import Layout
from tests.hf.reference_models import free

_SIZES: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "intermediate_size": 7,
    "moe_layers": [False, True, True],
    "num_experts": 3,
    "moe_intermediate_size": 11,
    "shared_expert_intermediate_size": 6,
    "recurrent_intermediate_size": 9,
    "max_position_embeddings": 8,
}
# Features that bring parameters, two sets that together have each of them on and off.
_FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"gated_mlp": False, "hidden_act": "gelu", "shared_expert_intermediate_size": None},
    "everything": {
        "norm_type": "layernorm",
        "qk_norm": True,
        "attention_bias": True,
        "position_embedding": "learned",
        "router_expert_bias": True,
        "router_score_function": "sigmoid",
        "shared_expert_gate": True,
        "tie_word_embeddings": True,
    },
    "biases": {"linear_bias": True, "attention_bias": True, "shared_expert_intermediate_size": None},
    "biases, no gate": {
        "linear_bias": True,
        "attention_bias": True,
        "shared_expert_intermediate_size": None,
        "gated_mlp": False,
        "hidden_act": "gelu",
    },
}
_WITH_BIASES = ("moe", "recurrent_moe", "loop", "huginn")
_DIVIDED = {"prelude_layers": 1, "coda_layers": 1, "injection": "linear"}


def _config(variant: str, **fields: Any) -> MoREConfig:
    divided = _DIVIDED if "prelude_layers" in find_system(variant).fields else {}
    return MoREConfig(variant=variant, **free(variant, {**_SIZES, **divided, **fields}))


def _cases() -> list[tuple[str, str]]:
    return [
        (variant, name)
        for variant in names()
        for name in _FEATURES
        if variant in _WITH_BIASES or not name.startswith("biases")
    ]


def test_every_system_can_be_exported() -> None:
    assert system_names() == names()


@pytest.mark.parametrize(("variant", "features"), _cases())
def test_names_and_shapes_are_those_of_the_model(variant: str, features: str) -> None:
    config = _config(variant, **_FEATURES[features])
    with torch.device("meta"):
        model = MoREForCausalLM(config)
    # Tied weights are listed once.
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = [pair for e in entries(config.to_dict()) for pair in zip(e.names, e.shapes, strict=True)]
    assert len(found) == len(dict(found))
    assert dict(found) == expected


@pytest.mark.parametrize("variant", names())
def test_layouts_lose_nothing(variant: str) -> None:
    layouts = set()
    for entry in entries(_config(variant).to_dict()):
        layouts.add(entry.layout)
        ours = torch.randn(entry.shape)
        theirs = entry.split(ours)
        assert [tuple(tensor.shape) for tensor in theirs] == list(entry.shapes)
        assert torch.equal(torch.cat([t.flatten() for t in theirs]).sort()[0], ours.flatten().sort()[0])
        assert torch.equal(entry.merge(theirs), ours)
    assert Layout.WHOLE in layouts


def test_rows_of_a_query_group_are_its_queries_its_key_and_its_value() -> None:
    (entry,) = (
        e for e in entries(_config("moe", num_hidden_layers=1, moe_layers=[True]).to_dict()) if len(e.names) == 3
    )
    # Two groups of two queries, heads of 5: the rows are numbered.
    numbers = torch.arange(40.0).unsqueeze(1).expand(entry.shape)
    query, key, value = (tensor[:, 0].tolist() for tensor in entry.split(numbers))
    assert query == [*range(10), *range(20, 30)]
    assert key == [*range(10, 15), *range(30, 35)]
    assert value == [*range(15, 20), *range(35, 40)]


def test_states_beside_parameters_belong_to_modules_of_the_table() -> None:
    for variant in names():
        config = _config(variant).to_dict()
        keys = {entry.key.rsplit(".", 1)[0] for entry in entries({**config, "qk_norm": True})}
        for module, layer, _ in extra_states(config):
            assert (layer is None) == (not module.startswith("decoder.layers."))
            assert module in keys or module.endswith("core_attention")


def test_unknown_system_is_refused() -> None:
    config = {**_config("moe").to_dict(), "variant": "no_such_system"}
    with pytest.raises(MoREError, match="--more-variant no_such_system does not exist"):
        entries(config)


def _entry(layout: Layout, shapes: tuple[tuple[int, ...], ...], shape: tuple[int, ...]) -> Entry:
    names = tuple(f"name_{number}" for number in range(len(shapes)))
    return Entry("key", 0, shape, names, shapes, layout, groups=2, qkv=(20, 10, 10), fp32=False)


def test_layouts_of_other_forms() -> None:
    # Two groups of two queries, heads of 5: rows are numbered as Megatron has them.
    numbers = torch.arange(40.0).unsqueeze(1).expand(40, 3)
    entry = _entry(Layout.QKV_IN_ONE, ((40, 3),), (40, 3))
    (joined,) = entry.split(numbers)
    assert joined[:, 0].tolist() == [
        *range(10),
        *range(20, 30),
        *range(10, 15),
        *range(30, 35),
        *range(15, 20),
        *range(35, 40),
    ]
    assert torch.equal(entry.merge([joined]), numbers)
    twice = _entry(Layout.TWICE, ((4, 3), (4, 3)), (4, 3))
    tensor = torch.randn(4, 3)
    assert all(torch.equal(part, tensor) for part in twice.split(tensor))
    assert torch.equal(twice.merge([tensor]), tensor)
    with pytest.raises(MoREError, match="name_0 and name_1 are one parameter, and they differ"):
        twice.merge([tensor, tensor + 1])


def test_biases_of_queries_and_keys() -> None:
    entry = Entry("key", 0, (24,), ("bias",), ((2, 1, 2, 4),), Layout.QK_BIAS, groups=2, qkv=(8, 8, 8), fp32=False)
    bias = torch.arange(1.0, 25.0).view(2, 3, 4)
    with pytest.raises(MoREError, match="key has biases of values that are not zero"):
        entry.split(bias.flatten())
    bias[:, 2] = 0
    (found,) = entry.split(bias.flatten())
    assert torch.equal(found[0, 0], bias[:, 0])
    assert torch.equal(found[1, 0], bias[:, 1])
    assert torch.equal(entry.merge([found]), bias.flatten())
