"""Initial states of recurrences: noise that is a function of where it stands."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int, bits: int = 64) -> int:
    """Return the low bits of `value` as a signed integer, which is what tensors hold."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_SPLITMIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
_LOWBIAS = ((16, _signed(0x7FEB352D, 32)), (15, _signed(0x846CA68B, 32)), (16, 1))
_CHANNEL_INCREMENT = _signed(0x9E3779B9, 32)


def state_noise(positions: Tensor, channels: int, seed: int, layer: int, std: float) -> Tensor:
    """Return normally distributed initial states in float32, [..., channels], each number a hash of its coordinates."""
    # In evaluation all sequences are sample 0.
    keys = token_keys(torch.zeros_like(positions), positions, seed, layer)
    radius, angle = normal_pairs(keys, channels // 2, std)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)


def token_keys(sample_ids: Tensor, positions: Tensor, seed: int, layer: int) -> Tensor:
    """Return a key of each token's coordinates, int64 as these (SplitMix64; Steele et al., OOPSLA 2014)."""
    keys = _mix(torch.full_like(positions, _signed(seed)), _SPLITMIX, 64)
    for coordinate in (torch.full_like(positions, layer), sample_ids, positions):
        keys = _mix(keys + coordinate * _INCREMENT + _INCREMENT, _SPLITMIX, 64)
    return keys


def normal_pairs(keys: Tensor, pairs: int, std: float) -> tuple[Tensor, Tensor]:
    """Return pairs of normal numbers by radius and angle (Box and Muller, 1958), float32 [..., pairs] each.

    The halves of a key, mixed with the pair by a 32-bit finalizer (Wellons' lowbias32), give the two uniform numbers.
    """
    channel = torch.arange(1, pairs + 1, dtype=torch.int32, device=keys.device) * _CHANNEL_INCREMENT
    halves = (keys.to(torch.int32), (keys >> 32).to(torch.int32))
    radius, angle = (_uniform(_mix(half.unsqueeze(-1) + channel, _LOWBIAS, 32)) for half in halves)
    return radius.log_().mul_(-2.0 * std * std).sqrt_(), angle.mul_(2.0 * math.pi)


def _mix(state: Tensor, rounds: tuple[tuple[int, int], ...], width: int) -> Tensor:
    """Scramble integers in place: in each round xor with a right shift, then multiply.

    The shift of a signed integer keeps its sign; the mask takes the copies of it away.
    """
    for shift, factor in rounds:
        state ^= (state >> shift).bitwise_and_((1 << (width - shift)) - 1)
        if factor != 1:
            state *= factor
    return state


def _uniform(bits: Tensor) -> Tensor:
    """Return 24 of 32 random bits as numbers in (0, 1), all of them exact in float32."""
    return (bits >> 8).bitwise_and_((1 << 24) - 1).to(torch.float32).add_(0.5).mul_(2.0**-24)
