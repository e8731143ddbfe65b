"""Systems at equal cost: what is built costs what was asked for, by PyTorch's own count."""

from dataclasses import dataclass

import pytest

from more_megatron.evaluation.gpu_check.plan import DRY, command_line
from more_megatron.systems import names
from tests.helpers.ranks import run_ranks

_SIZES = {"transformer-impl": "local", "seq-length": 32, "hidden-size": 64, "moe-router-topk": 1}
_STEPS, _TOLERANCE = 2, 0.03


@dataclass(frozen=True)
class Counted:
    """What a matched model costs: by formula, and as built."""

    target: float  # operations a token that were asked for
    by_formula: float  # those of the widths that were found
    counted: float  # those that PyTorch counts
    parameters: int  # by formula
    built: int  # as built
    # Operations and parameters over what was asked for, where both were; None without a second width
    ratios: tuple[float, float] | None
    parameter_ratio: float  # parameters over what was asked for, where they alone were


@pytest.fixture(scope="module")
def matched() -> dict[str, Counted]:
    """Each system, brought to twice its operations."""
    return run_ranks(1, _matched, list(names()))[0]


@pytest.mark.parametrize("name", names())
def test_a_model_is_built_with_the_parameters_that_its_formula_says(matched: dict[str, Counted], name: str) -> None:
    assert matched[name].built == matched[name].parameters


@pytest.mark.parametrize("name", names())
def test_matched_operations_are_those_that_pytorch_counts(matched: dict[str, Counted], name: str) -> None:
    found = matched[name]
    assert found.by_formula == pytest.approx(found.target, rel=_TOLERANCE)
    assert found.counted == pytest.approx(found.target, rel=_TOLERANCE)


@pytest.mark.parametrize("name", names())
def test_parameters_are_matched_alone_and_where_widths_allow_together_with_operations(
    matched: dict[str, Counted], name: str
) -> None:
    assert matched[name].parameter_ratio == pytest.approx(1.0, rel=_TOLERANCE)
    if matched[name].ratios is not None:
        assert matched[name].ratios == pytest.approx((1.0, 1.0), rel=_TOLERANCE)


def test_what_no_width_meets_and_wrong_flags_are_refused_in_one_line() -> None:
    (messages,) = run_ranks(1, _refusals, names()[0])
    for message, words in zip(messages, ("at the least", "--train-iters -4 must be at least 1"), strict=True):
        assert words in message
        assert "\n" not in message


def test_memory_that_was_freed_and_is_taken_again_is_seen() -> None:
    (risen,) = run_ranks(1, _risen)
    assert 0.8 * _TAKEN < risen < 1.5 * _TAKEN


# In pieces that the allocator keeps when they are freed.
_TAKEN, _PIECE = 64 * 2**20, 2**16


def _risen() -> int:
    from more_megatron.evaluation.step_benchmark import peak_bytes, reset_peak

    risen = []
    for _ in range(2):
        reset_peak()
        before = peak_bytes()
        pieces = [b"x" * _PIECE for _ in range(_TAKEN // _PIECE)]
        risen.append(peak_bytes() - before)
        del pieces
    return risen[-1]


def _refusals(name: str) -> tuple[str, str]:
    from more_megatron.errors import MoREError
    from more_megatron.evaluation.matching import Described

    with pytest.raises(MoREError) as of_width:
        Described.by(command_line(name, DRY.speed, _SIZES)).match(flops=1.0)
    with pytest.raises(MoREError) as of_flag:
        Described.by(f"{command_line(name, DRY.speed, _SIZES)} --train-iters -4")
    return str(of_width.value), str(of_flag.value)


def _matched(systems: list[str]) -> dict[str, Counted]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from more_megatron.evaluation.matching import Described
    from more_megatron.evaluation.runs import fresh_model
    from more_megatron.evaluation.step_benchmark import forward
    from more_megatron.model.depth import Depth

    aten = torch.ops.aten
    formulas = {
        aten._grouped_mm: _grouped,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    found, depth = {}, Depth(0, _STEPS)
    for name in systems:
        before = Described.by(command_line(name, DRY.speed, _SIZES), depth)
        target, size = 2 * before.flops, 1.7 * before.parameters
        by_size, by_both = before.match(parameters=size), before.match(flops=target, parameters=size)
        model = before.match(flops=target)
        built = fresh_model(model.config)
        tokens = torch.arange(4 * before.args.seq_length).view(4, -1) % model.config.vocab_size
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            forward(built, tokens, tokens, depth, tuple(range(4))).mean().backward()
        found[name] = Counted(
            target=target,
            by_formula=model.flops,
            counted=counter.get_total_flops() / tokens.numel(),
            parameters=model.parameters,
            built=sum(parameter.numel() for parameter in built.parameters()),
            ratios=(by_both.flops / target, by_both.parameters / size) if len(before.widths) > 1 else None,
            parameter_ratio=by_size.parameters / size,
        )
    return found


# Shapes in the order of PyTorch's arguments. It counts none of these by itself.


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_: object, **__: object) -> int:
    """Each row [rows, k] meets one of the matrices [groups, k, n]; of gradients [m, rows] and [rows, n]."""
    return 2 * a[0] * a[1] * b[-1]


def _attention(query: tuple[int, ...], key: tuple[int, ...], *_: object, **__: object) -> int:
    """Two products of [b, heads, s, d], of which causality leaves half."""
    batch, heads, length, channels = query
    return 2 * batch * heads * length * key[2] * channels


def _attention_backward(_: object, query: tuple[int, ...], key: tuple[int, ...], *__: object, **___: object) -> int:
    """Two products for each of the forward pass."""
    return 2 * _attention(query, key)
