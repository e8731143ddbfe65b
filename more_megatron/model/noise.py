"""The random initial state of a recurrence, a function of who asks and of nothing else.

Random numbers of a stateful generator would depend on the layout, on the order of micro-batches and on what was
recomputed. Here each number is a hash of its coordinates (seed, layer, sample, position, channel): the same token gets
the same noise on every rank, in recomputation and after a restart. A `TokenGrid` knows those of a rank's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from more_megatron.config import MoREConfig
from more_megatron.hf.exported.noise import normal_pairs, token_keys
from more_megatron.model.micro_batch import MicroBatch

# Numbers made at a time on a CPU: intermediate results stay in its cache.
_CHUNK = 1 << 16


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
    keys, pairs = token_keys(sample_ids, positions, seed, layer), channels // 2
    noise = torch.empty(len(keys), channels, dtype=torch.float32, device=keys.device)
    rows = max(_CHUNK // channels, 1) if keys.device.type == "cpu" else max(len(keys), 1)
    for part, out in zip(keys.split(rows), noise.split(rows), strict=True):
        radius, angle = normal_pairs(part, pairs, std)
        torch.mul(radius, angle.cos(), out=out[:, :pairs])
        torch.mul(radius, angle.sin_(), out=out[:, pairs:])
    return noise


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
