"""The stand-in has the parameters of the real Transformer Engine, where that can be imported."""

import inspect

import pytest

from tests.blocks.backends import stand_in

te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")


def _parameters(function: object) -> list[str]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear", "GroupedLinear", "DotProductAttention", "RMSNorm"])
def test_constructors_and_calls_have_the_parameters_of_the_real_ones(kind: str) -> None:
    ours, real = getattr(stand_in, kind), getattr(te, kind)
    for method in ("__init__", "forward"):
        if kind == "RMSNorm" and method == "forward":
            continue  # The operation behind it takes one tensor under another name.
        expected, found = _parameters(getattr(real, method)), _parameters(getattr(ours, method))
        assert set(found) <= set(expected), f"{kind}.{method}"
        # Those that are given by position, and `self`.
        given = 4 if kind in ("GroupedLinear", "DotProductAttention") else 3
        assert found[:given] == expected[:given], f"{kind}.{method}"


def test_the_state_of_fp8_is_asked_in_the_real_way() -> None:
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast

    assert FP8GlobalStateManager.is_fp8_enabled() is False
    assert set(_parameters(fp8_autocast)) >= {"enabled", "fp8_recipe", "fp8_group"}


def test_the_modules_of_the_backend_derive_from_the_real_ones() -> None:
    from more_megatron.blocks.backends import te as backend

    assert issubclass(backend._GroupedLinear, te.GroupedLinear)
    assert issubclass(backend._Linear, te.Linear)
