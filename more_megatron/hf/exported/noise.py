"""Initial states of recurrences: noise that is a function of where it stands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["state_noise"]


def _signed(value: int, bits: int = 64) -> int:
    """Return the low bits of `value` as a signed integer, which is what tensors hold."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_SPLITMIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
_LOWBIAS = ((16, _signed(0x7FEB352D, 32)), (15, _signed(0x846CA68B, 32)), (16, 1))
_CHANNEL_INCREMENT = _signed(0x9E3779B9, 32)


def state_noise(positions: Tensor, channels: int, seed: int, layer: int, std: float) -> Tensor:
    """Return normally distributed initial states in float32, [..., channels], each number a hash of its coordinates.

    SplitMix64 (Steele et al., OOPSLA 2014) makes a key of seed, layer (from 1) and position; its halves and the
    channel, mixed by Wellons' lowbias32, give two uniform numbers, and these two normal ones (Box and Muller, 1958).
    """
    keys = _mix(torch.full_like(positions, _signed(seed)), _SPLITMIX, 64)
    # In evaluation all sequences are sample 0.
    for coordinate in (torch.full_like(positions, layer), torch.zeros_like(positions), positions):
        keys = _mix(keys + coordinate * _INCREMENT + _INCREMENT, _SPLITMIX, 64)
    pairs = torch.arange(1, channels // 2 + 1, dtype=torch.int32, device=positions.device) * _CHANNEL_INCREMENT
    halves = (keys.to(torch.int32), (keys >> 32).to(torch.int32))
    radius, angle = (_uniform(_mix(half.unsqueeze(-1) + pairs, _LOWBIAS, 32)) for half in halves)
    radius, angle = (radius.log() * (-2.0 * std * std)).sqrt(), angle * (2.0 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)


def _mix(state: Tensor, rounds: tuple[tuple[int, int], ...], width: int) -> Tensor:
    """Scramble integers: in each round xor with a right shift, then multiply."""
    for shift, factor in rounds:
        # The shift of a signed integer keeps its sign; the mask takes the copies of it away.
        state = (state ^ ((state >> shift) & ((1 << (width - shift)) - 1))) * factor
    return state


def _uniform(bits: Tensor) -> Tensor:
    """Return 24 of 32 random bits as numbers in (0, 1), all of them exact in float32."""
    return (((bits >> 8) & ((1 << 24) - 1)).to(torch.float32) + 0.5) * 2.0**-24
