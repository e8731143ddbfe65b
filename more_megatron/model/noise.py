"""The random initial state of a recurrence, a function of who asks and of nothing else.

Random numbers of a stateful generator would depend on the layout, on the order of micro-batches and on what was
recomputed. Here each number is a hash of its coordinates (seed, layer, sample, position, channel): the same token gets
the same noise on every rank, in recomputation and after a restart. A `TokenGrid` knows those of a rank's tokens.

A token's coordinates make a 64-bit key (SplitMix64; Steele et al., OOPSLA 2014). Its two halves, mixed with the channel
by a 32-bit finalizer (Wellons' lowbias32), give two uniform numbers, and these two normal ones (Box and Muller, 1958).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from more_megatron.config import MoREConfig
from more_megatron.model.micro_batch import MicroBatch

__all__ = ["TokenGrid", "state_noise"]

# Numbers made at a time on a CPU: intermediate results stay in its cache.
_CHUNK = 1 << 16


def _signed(value: int, bits: int = 64) -> int:
    """Return the low bits of `value` as a signed integer, which is what tensors hold."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_SPLITMIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
_LOWBIAS = ((16, _signed(0x7FEB352D, 32)), (15, _signed(0x846CA68B, 32)), (16, 1))
_CHANNEL_INCREMENT = _signed(0x9E3779B9, 32)


def state_noise(
    sample_ids: torch.Tensor, positions: torch.Tensor, channels: int, *, seed: int, layer: int, std: float
) -> torch.Tensor:
    """Return normally distributed initial states, in float32.

    Args:
        sample_ids: Position of each token's sequence in the stream of samples, int64 [tokens].
        positions: Position of each token in its sequence, int64 [tokens].
        channels: Size of a state; even.
        seed: Seed of the run.
        layer: Number of the layer.
        std: Standard deviation.

    Returns:
        Tensor [tokens, channels]. CPU and CUDA agree up to the rounding of logarithm, sine and cosine.
    """
    keys = _token_keys(sample_ids, positions, seed, layer)
    noise = torch.empty(len(keys), channels, dtype=torch.float32, device=keys.device)
    rows = max(_CHUNK // channels, 1) if keys.device.type == "cpu" else max(len(keys), 1)
    for part, out in zip(keys.split(rows), noise.split(rows), strict=True):
        _fill_normal(out, part, std)
    return noise


def _token_keys(sample_ids: torch.Tensor, positions: torch.Tensor, seed: int, layer: int) -> torch.Tensor:
    key = _mix(torch.full_like(positions, _signed(seed)), _SPLITMIX, 64)
    for coordinate in (torch.full_like(positions, layer), sample_ids, positions):
        key = _mix(key + coordinate * _INCREMENT + _INCREMENT, _SPLITMIX, 64)
    return key


def _fill_normal(out: torch.Tensor, keys: torch.Tensor, std: float) -> None:
    pairs = out.size(1) // 2
    channel = torch.arange(1, pairs + 1, dtype=torch.int32, device=keys.device) * _CHANNEL_INCREMENT
    halves = (keys.to(torch.int32), (keys >> 32).to(torch.int32))
    radius, angle = (_uniform(_mix(half.unsqueeze(1) + channel, _LOWBIAS, 32)) for half in halves)
    radius.log_().mul_(-2.0 * std * std).sqrt_()
    angle.mul_(2.0 * math.pi)
    torch.mul(radius, angle.cos(), out=out[:, :pairs])
    torch.mul(radius, angle.sin_(), out=out[:, pairs:])


def _mix(state: torch.Tensor, rounds: tuple[tuple[int, int], ...], width: int) -> torch.Tensor:
    """Scramble integers in place: in each round xor with a right shift, then multiply.

    The shift of a signed integer keeps its sign; the mask takes the copies of it away.
    """
    for shift, factor in rounds:
        state ^= (state >> shift).bitwise_and_((1 << (width - shift)) - 1)
        if factor != 1:
            state *= factor
    return state


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """Return 24 of 32 random bits as numbers in (0, 1), all of them exact in float32."""
    return (bits >> 8).bitwise_and_((1 << 24) - 1).to(torch.float32).add_(0.5).mul_(2.0**-24)


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of this rank stand."""

    shape: torch.Size  # of the hidden states, [s, b, h]; s is this rank's part of the sequence
    # Sequence, position and sample id of each token, in the order in which Megatron flattens hidden states, int64
    # [s * b, 3]. Each problem of a row is a sequence of its own
    coordinates: torch.Tensor
    seed: int  # seed of the run
    place: str = ""  # where in the model they are, in words

    @classmethod
    def of(
        cls,
        hidden_states: torch.Tensor,
        micro_batch: MicroBatch,
        config: MoREConfig,
        tp_group: torch.distributed.ProcessGroup,
        place: str = "",
        first_sequence: int = 0,
    ) -> TokenGrid:
        """Return the grid of this rank's hidden states, [s, b, h]; sequence parallelism splits s over `tp_group`.

        Sequences are counted from `first_sequence`.
        """
        (length, batch), device, starts = hidden_states.shape[:2], hidden_states.device, micro_batch.starts
        first = tp_group.rank() * length if config.sequence_parallel else 0
        position = (torch.arange(length, device=device) + first).unsqueeze(1).expand(length, batch)
        sequence = (torch.arange(batch, device=device) + first_sequence).expand(length, batch)
        if starts is not None:
            starts = starts.to(device, non_blocking=True)
            problem = torch.searchsorted(starts, position.t().contiguous(), right=True) - 1
            sequence = sequence * starts.size(1) + problem.t()
            position = position - starts.gather(1, problem).t()
        sample = torch.tensor(micro_batch.sample_ids or (0,), dtype=torch.int64).to(device, non_blocking=True)
        coordinates = torch.stack((sequence, position, sample.expand(length, batch)), dim=-1).flatten(0, 1)
        return cls(hidden_states.shape, coordinates, config.seed, place)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token, int64 [s, b]."""
        return self.coordinates[:, 1].view(self.shape[:2])

    def noise(self, layer: int, std: float) -> torch.Tensor:
        """Return random states, float32 [s, b, h]; `layer` sets those of one recurrence apart from those of another."""
        _, positions, sample_ids = self.coordinates.unbind(1)
        noise = state_noise(sample_ids, positions, self.shape[-1], seed=self.seed, layer=layer, std=std)
        return noise.view(self.shape)
