"""Both backends on a GPU against the local one on a CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from more_megatron.systems import systems
from tests.gpu.processes import BACKENDS, run_on

pytestmark = pytest.mark.gpu

# Largest distance of logits and of any gradient, as a part of its norm.
_BARS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.05, 0.2)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Checkpoints of every system, and their logits and gradients on the CPU."""
    folder = tmp_path_factory.mktemp("reference")
    return folder, run_on("cpu", "reference", folder, list(systems()))


@pytest.mark.parametrize("dtype", _BARS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gpu_computes_what_a_cpu_does(
    reference: tuple[Path, dict[str, dict[str, torch.Tensor]]], backend: str, dtype: torch.dtype
) -> None:
    folder, expected = reference
    found = run_on("cuda", "on_gpu", folder, list(systems()), backend, dtype)
    of_logits, of_gradients = _BARS[dtype]
    for variant, tensors in expected.items():
        assert set(found[variant]) == set(tensors)
        largest = max(float(tensor.norm()) for name, tensor in tensors.items() if name != "logits")
        for name, tensor in tensors.items():
            # A gradient that is small beside the others is compared on their scale.
            scale = float(tensor.norm()) if name == "logits" else max(float(tensor.norm()), 1e-3 * largest)
            distance = float((found[variant][name] - tensor).norm()) / scale
            bar = of_logits if name == "logits" else of_gradients
            assert distance <= bar, f"{variant} {name}: {distance:.2e}"
