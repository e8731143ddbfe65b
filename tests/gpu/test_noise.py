"""The random initial state on a GPU is the CPU's, up to the rounding of logarithm, sine and cosine."""

from __future__ import annotations

import pytest
import torch

from more_megatron.model.noise import state_noise

pytestmark = pytest.mark.gpu


def test_the_noise_of_a_gpu_is_the_noise_of_a_cpu() -> None:
    samples, positions = torch.arange(64).repeat_interleave(128), torch.arange(128).repeat(64)
    on_cpu, on_gpu = (
        state_noise(samples.to(device), positions.to(device), 64, seed=1234, layer=3, std=1.0).cpu()
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0.0, atol=1e-5)
