"""The random initial state: a function of its coordinates, and normally distributed."""

import math

import numpy as np
import pytest
import torch

from more_megatron.model import noise
from more_megatron.model.noise import state_noise

_CHANNELS = 64

# Sample and position of some tokens, and their states of 4 channels for seed 1234, layer 3 and deviation 0.02.
_TOKENS = ([0, 0, 7, 2**40], [0, 1, 100, 4095])
_GOLDEN = [
    [-0.045447458, 0.022305446, 0.0093683545, -0.031269073],
    [0.0064647202, -0.033558417, -0.0099390373, 0.010536114],
    [-0.029572351, -0.018686196, 0.031784739, 0.00087881519],
    [-0.0138092, 0.0065355869, -0.0032266632, -0.0059012799],
]


def _noise(
    samples: list[int] | torch.Tensor,
    positions: list[int] | torch.Tensor,
    *,
    channels: int = _CHANNELS,
    seed: int = 1234,
    layer: int = 1,
    std: float = 1.0,
) -> torch.Tensor:
    samples, positions = torch.as_tensor(samples), torch.as_tensor(positions)
    return state_noise(samples, positions, channels, seed=seed, layer=layer, std=std)


def _grid(samples: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(samples).repeat_interleave(positions), torch.arange(positions).repeat(samples)


def test_order_and_company_do_not_matter() -> None:
    samples, positions = _grid(5, 40)
    whole = _noise(samples, positions)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_noise(samples[order], positions[order]), whole[order])
    subset = order[:17]
    assert torch.equal(_noise(samples[subset], positions[subset]), whole[subset])
    alone = torch.cat([_noise(samples[i : i + 1], positions[i : i + 1]) for i in subset.tolist()])
    assert torch.equal(alone, whole[subset])


@pytest.mark.parametrize("chunk", [1, 100, 1000, 1 << 30])
def test_the_size_of_a_piece_of_work_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, positions = _grid(3, 41)
    expected = _noise(samples, positions)
    monkeypatch.setattr(noise, "_CHUNK", chunk)
    assert torch.equal(_noise(samples, positions), expected)


def test_arguments_are_left_alone() -> None:
    samples, positions = _grid(2, 8)
    before = samples.clone(), positions.clone()
    _noise(samples, positions)
    assert torch.equal(samples, before[0])
    assert torch.equal(positions, before[1])


def test_no_rows_give_no_noise() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert _noise(none, none).shape == (0, _CHANNELS)


def test_the_type_is_float32() -> None:
    assert _noise([0], [0]).dtype == torch.float32


def test_the_generator_of_pytorch_is_not_asked() -> None:
    state = torch.get_rng_state()
    _noise([0, 1], [2, 3])
    assert torch.equal(torch.get_rng_state(), state)


def test_moments_are_those_of_a_normal_distribution() -> None:
    samples, positions = _grid(64, 256)
    values = _noise(samples, positions, std=0.5).double() / 0.5
    number = values.numel()
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0), (6, 15.0)):
        moment = values.pow(power)
        assert moment.mean() == pytest.approx(expected, abs=5 * float(moment.std()) / math.sqrt(number)), power
    # The share beyond one, two and three standard deviations.
    for border, expected in ((1.0, 0.3173105), (2.0, 0.0455003), (3.0, 0.0026998)):
        share = float((values.abs() > border).double().mean())
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected / number))
    assert values.abs().max() < 6.0


@pytest.mark.parametrize("coordinate", ["channel", "position", "sample", "layer", "seed"])
def test_neighbours_are_independent(coordinate: str) -> None:
    samples, positions = _grid(32, 64)
    here = _noise(samples, positions)
    match coordinate:
        case "channel":
            # Also the two halves, whose numbers come in pairs.
            pairs = [(here[:, :-1], here[:, 1:]), (here[:, : _CHANNELS // 2], here[:, _CHANNELS // 2 :])]
        case "position":
            pairs = [(here, _noise(samples, positions + 1))]
        case "sample":
            # Sample and position must not be interchangeable.
            pairs = [(here, _noise(samples + 1, positions)), (here[1:], _noise(positions, samples)[1:])]
            unlike = (samples != positions)[1:]
            pairs[1] = (pairs[1][0][unlike], pairs[1][1][unlike])
        case "layer":
            pairs = [(here, _noise(samples, positions, layer=2))]
        case _:
            pairs = [(here, _noise(samples, positions, seed=1235))]
    for a, b in pairs:
        number = a.numel()
        # Of the values, of their size, and of sign against size.
        for x, y in ((a, b), (a.abs(), b.abs()), (a.sign(), b.abs())):
            correlation = np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1]
            assert abs(correlation) < 5.0 / math.sqrt(number)


def test_no_two_tokens_share_a_state() -> None:
    states = torch.cat([_noise(*_grid(16, 64), layer=layer, seed=seed) for layer in (1, 2) for seed in (1, 2)])
    assert len(states[:, :2].unique(dim=0)) == len(states)


@pytest.mark.parametrize("sample", [0, 2**31, 2**40 + 3, 2**62])
@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**63 - 1, 2**64 - 1])
def test_large_coordinates_are_as_good_as_small_ones(sample: int, seed: int) -> None:
    values = _noise([sample] * 64, list(range(64)), seed=seed)
    assert torch.isfinite(values).all()
    assert float(values.std()) == pytest.approx(1.0, abs=0.06)
    assert not torch.equal(values, _noise([sample + 1] * 64, list(range(64)), seed=seed))


def test_values_stay_what_they_were() -> None:
    # A run that goes on with a newer version, and an exported model, must meet the states they would have met.
    values = _noise(*_TOKENS, channels=4, layer=3, std=0.02)
    assert values.tolist() == [pytest.approx(row, rel=1e-5) for row in _GOLDEN]


def test_values_are_those_of_the_published_generators() -> None:
    by_hand = [_by_hand(*token, channels=4, seed=1234, layer=3, std=0.02) for token in zip(*_TOKENS, strict=True)]
    assert by_hand == [pytest.approx(row, rel=1e-5) for row in _GOLDEN]


def _by_hand(sample: int, position: int, *, channels: int, seed: int, layer: int, std: float) -> list[float]:
    """Return one token's state, computed with Python's unbounded integers."""

    def splitmix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def lowbias(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = splitmix(seed)
    for coordinate in (layer, sample, position):
        key = splitmix((key + (coordinate + 1) * 0x9E3779B97F4A7C15) % 2**64)
    normals: list[list[float]] = [[], []]
    for channel in range(1, channels // 2 + 1):
        radius, angle = (
            ((lowbias((half + channel * 0x9E3779B9) % 2**32) >> 8) + 0.5) / 2**24 for half in (key % 2**32, key >> 32)
        )
        size = std * math.sqrt(-2.0 * math.log(radius))
        normals[0].append(size * math.cos(2.0 * math.pi * angle))
        normals[1].append(size * math.sin(2.0 * math.pi * angle))
    return normals[0] + normals[1]


def test_states_scale_with_their_deviation() -> None:
    assert torch.allclose(_noise([3], [4], std=0.02), 0.02 * _noise([3], [4]), rtol=1e-6, atol=0)
    assert torch.count_nonzero(_noise([3], [4], std=0.0)) == 0


@pytest.mark.gpu
def test_a_gpu_agrees_up_to_rounding() -> None:
    samples, positions = _grid(4, 64)
    on_gpu = _noise(samples.cuda(), positions.cuda())
    assert torch.allclose(on_gpu.cpu(), _noise(samples, positions), rtol=1e-5, atol=1e-6)
