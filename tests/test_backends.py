"""Building blocks in plain PyTorch against Megatron's own, and against loops."""

import itertools
import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from more_megatron.blocks import segment_attention as kernels
from more_megatron.blocks.backends import (
    LocalAttention,
    LocalNorm,
    backend_of,
    grouped_linear,
)
from more_megatron.blocks.rows import Segments
from more_megatron.blocks.segment_attention import are_short, segment_attention
from tests.helpers.models import small_config, start_ranks
from tests.helpers.ranks import run_ranks

_LENGTHS = [[3, 0, 4, 1], [0, 0, 5], [2], [0, 0], [7, 7]]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _compare(ours: torch.Tensor, expected: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Check values and the gradients of a random weighing."""
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(ours.shape, generator=_generator())
    gradients = [torch.autograd.grad((output * weights).sum(), leaves) for output in (ours, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", _LENGTHS, ids=str)
def test_grouped_linear_is_a_linear_map_for_each_group(lengths: list[int]) -> None:
    rows = torch.randn(sum(lengths), 8, generator=_generator()).requires_grad_()
    weight = torch.randn(len(lengths), 12, 8, generator=_generator()).requires_grad_()
    ends = torch.tensor(list(itertools.accumulate(lengths)), dtype=torch.int32)
    parts = [part @ group.T for part, group in zip(rows.split(lengths), weight, strict=True)]
    _compare(grouped_linear(rows, weight, ends), torch.cat(parts), [rows, weight])


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", [*_LENGTHS, [7, 100, 80, 64, 1, 0, 9], [2, 200]], ids=str)
def test_segment_attention_is_causal_attention_in_each_segment(lengths: list[int], groups: int) -> None:
    generator, heads, size, number = _generator(), 4, 8, sum(lengths)
    query, key, value = leaves = [
        torch.randn(number, count, size, generator=generator).requires_grad_() for count in (heads, groups, groups)
    ]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    parts = [value.new_zeros(0, heads, size)]
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(size)
        forbidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(forbidden, -torch.inf).softmax(-1), v))
    _compare(segment_attention(query, key, value, Segments(offsets, max([*lengths, 1]))), torch.cat(parts), leaves)


def test_short_and_long_segments_go_to_different_kernels() -> None:
    query = torch.zeros(202, 4, 8)
    assert are_short(query[:8], Segments(torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32), 16))
    assert are_short(query[:102], Segments(torch.tensor([0, *range(32, 100, 2), 102], dtype=torch.int32), 102))
    assert not are_short(query, Segments(torch.tensor([0, 2, 202], dtype=torch.int32), 200))
    assert not are_short(query[:8].double(), Segments(torch.tensor([0, 8], dtype=torch.int32), 16))


@pytest.mark.parametrize("has_groups", [True, False])
def test_the_kernel_for_segments_of_any_length_gets_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, has_groups: bool
) -> None:
    """PyTorch's kernel is a GPU's: here a loop takes its place. Older versions know no query groups."""

    def attend(
        query: Any, key: Any, value: Any, ends: Any, key_ends: Any, longest: int, *_: int, **options: Any
    ) -> Any:
        lengths = ends.diff().tolist()
        assert ends is key_ends
        assert options.pop("window_size") == (-1, 0)
        assert options == ({"enable_gqa": True} if has_groups else {})
        assert all(length <= longest for length in lengths)
        assert key.size(1) == (2 if has_groups else 4)
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        attention = torch.nn.functional.scaled_dot_product_attention
        outputs = [attention(*part, is_causal=True, enable_gqa=has_groups) for part in parts if part[0].numel() > 0]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    def with_groups(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Any:
        return attend(*arguments, **options, **({"enable_gqa": True} if enable_gqa else {}))

    generator, lengths = _generator(), [3, 0, 4, 1]
    leaves = [torch.randn(8, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    segments = Segments(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), 16)
    expected = segment_attention(*leaves, segments)
    monkeypatch.setattr(kernels, "_varlen_can", lambda query: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", with_groups if has_groups else attend)
    _compare(segment_attention(*leaves, segments), expected, leaves)


def _attention(kind: type[DotProductAttention], **fields: Any) -> DotProductAttention:
    config = small_config("moe", num_query_groups=2, **fields)
    return kind(config, layer_number=2, attn_mask_type=AttnMaskType.causal, attention_type="self")


def _local_attention_equals_megatrons() -> None:
    start_ranks()
    generator, length, batch = _generator(), 6, 2
    query, key, value = leaves = [
        torch.randn(length, batch, heads, 4, generator=generator).requires_grad_() for heads in (4, 2, 2)
    ]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1).expand(batch, 1, -1, -1)
    documents = causal.clone()
    documents[1, :, 3:, :3] = True
    theirs = _attention(DotProductAttention)
    ours = _attention(LocalAttention)
    for mask, explicit in ((None, causal), (causal, causal), (documents, documents)):
        _compare(ours(query, key, value, mask), theirs(query, key, value, explicit), leaves)
    # What the kernel cannot do is left to Megatron, which has its own parameters for it.
    for fields in ({"softmax_type": "learnable"}, {"softmax_type": "off-by-one"}, {"window_size": (2, 0)}):
        ours, theirs = (_attention(kind, **fields) for kind in (LocalAttention, DotProductAttention))
        theirs.load_state_dict(ours.state_dict())
        _compare(ours(query, key, value, causal), theirs(query, key, value, causal), leaves)


def test_local_attention_equals_megatrons_own() -> None:
    run_ranks(1, _local_attention_equals_megatrons)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_local_norm_is_pytorchs_and_marked_for_sequence_parallelism(kind: str, sequence_parallel: bool) -> None:
    config = small_config("moe", normalization=kind)
    config.sequence_parallel = sequence_parallel
    norm = LocalNorm(config, 16, eps=1e-3)
    assert type(norm) is getattr(torch.nn, kind)
    assert norm.eps == 1e-3
    assert {parameter.sequence_parallel for parameter in norm.parameters()} == {sequence_parallel}
    # Megatron finds norms in checkpoints by these names.
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"} - (
        {"bias"} if kind == "RMSNorm" else set()
    )


@pytest.mark.parametrize("moe", [True, False])
def test_the_layers_of_the_local_backend_are_local(moe: bool) -> None:
    config = small_config("moe", qk_layernorm=True)
    submodules = backend_of(config).layer_submodules(config, moe)
    attention = submodules.self_attention.submodules
    assert attention.core_attention is LocalAttention
    norms = (attention.q_layernorm, attention.k_layernorm, submodules.input_layernorm, backend_of(config).norm())
    assert set(norms) == {LocalNorm}
    # In checkpoints the norm before a dense MLP is part of the MLP; before experts it is a module by itself.
    assert ("pre_mlp_layernorm." in submodules.sharded_state_dict_keys_map) != moe
