"""Initial weights of recurrent blocks, as Huginn draws them, and of recurrent cells, as PyTorch does.

Takase et al. (arXiv 2312.16903) as used in Huginn (arXiv 2502.05171, section 4): truncated normal with variance 2/(5h);
projections back into the stream are divided by sqrt(2 L), where L is the depth after unrolling the recurrence.
Everything else in a model keeps Megatron's initialization.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from more_megatron.config import MoREConfig

__all__ = ["BlockInitializer"]


@dataclass(frozen=True)
class BlockInitializer:
    """Draws the weights of one layer's recurrent blocks.

    Each weight has a generator of its own, seeded by its name: a model starts with the same weights under any layout.

    Attributes:
        config: Model configuration.
        layer_number: Number of the layer, from 1.
    """

    config: MoREConfig
    layer_number: int

    @property
    def in_std(self) -> float:
        """Standard deviation of projections out of the stream."""
        return math.sqrt(2.0 / (5.0 * self.config.hidden_size))

    @property
    def out_std(self) -> float:
        """Standard deviation of projections back into the stream."""
        unrolled_depth = self.config.num_layers * self.config.mean_steps
        return self.in_std / math.sqrt(2.0 * unrolled_depth)

    def truncated_normal(self, shape: tuple[int, ...], name: str, std: float) -> torch.Tensor:
        """Return a weight in float32, cut off at three standard deviations.

        Args:
            shape: Shape of the whole weight, before it is split over ranks.
            name: Name of the weight, unique within the layer, with the number of the expert.
            std: Standard deviation before the cut.
        """
        weight = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        generator = self.generator(name, weight.device)
        return torch.nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)

    def orthogonal(self, shape: tuple[int, int], name: str) -> torch.Tensor:
        """Return a matrix with orthonormal rows or columns in float32 (Saxe et al., arXiv 1312.6120)."""
        weight = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        return torch.nn.init.orthogonal_(weight, generator=self.generator(name, weight.device))

    def megatron_in(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a projection out of the stream as wide as Megatron draws it."""
        return self.truncated_normal(shape, name, self.config.init_method_std)

    def megatron_out(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a projection back into the stream as wide as Megatron draws it."""
        return self.truncated_normal(shape, name, self.config.init_method_std / math.sqrt(2.0 * self.config.num_layers))

    def zeros(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(shape, device=torch.cuda.current_device())

    def recurrent(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a weight of a recurrent cell as PyTorch draws it, or a bias: uniform, as narrow as the cell is wide.

        Args:
            shape: Gates and their size, and for a weight its input.
            name: Name of the weight.
        """
        weight = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        bound = 1.0 / math.sqrt(shape[1])
        return torch.nn.init.uniform_(weight, -bound, bound, generator=self.generator(name, weight.device))

    def recurrent_sum(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return the sum of two such weights: of gates whose input is their state, or that have two biases."""
        return self.recurrent(shape, f"{name}/input") + self.recurrent(shape, f"{name}/state")

    def gru_of_its_state(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a weight or bias of a GRU whose input is its state: two gates see sums, the new state two products."""
        weight = self.recurrent(shape, f"{name}/input")
        weight[:2] += self.recurrent(shape, f"{name}/state")[:2]
        return weight

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """Return the generator of one weight."""
        key = f"{self.config.seed}/{self.layer_number}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.Generator(device=device).manual_seed(seed)
