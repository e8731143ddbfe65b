"""Initial weights, as Huginn and as MoEUT draw them, and of recurrent cells, as PyTorch does.

Takase et al. (arXiv 2312.16903) as used in Huginn (arXiv 2502.05171, section 4): truncated normal with variance 2/(5h);
projections back into the stream are divided by sqrt(2 L), where L is the depth after unrolling the recurrence.
MoEUT (arXiv 2405.16039): normal, each deviation over the root of the inputs times sqrt(2 / L).
Everything else in a model keeps Megatron's initialization, unless its stack has one of its own.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from more_megatron.config import MoREConfig


def parameter_device(config: MoREConfig) -> Any:
    """Return where parameters are created."""
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


def draw_as_takase(config: MoREConfig, unrolled_depth: int) -> None:
    """Make Megatron's modules that are built from the configuration draw as Takase et al. do.

    The depth is that of the model in layers, counting repetitions.
    """
    std = takase_std(config)
    config.init_method = config.embedding_init_method = _normal(std)
    config.output_layer_init_method = _normal(std / math.sqrt(2.0 * unrolled_depth))


def takase_std(config: MoREConfig) -> float:
    """Return the standard deviation of projections out of the stream."""
    return math.sqrt(2.0 / (5.0 * config.hidden_size))


def draw_as_moeut(config: MoREConfig) -> None:
    """Make them draw as MoEUT does what its layers do not draw: embeddings of variance 1/h, a uniform head."""
    bound = config.hidden_size**-0.5
    config.init_method = functools.partial(torch.nn.init.uniform_, a=-bound, b=bound)
    config.embedding_init_method = config.output_layer_init_method = functools.partial(torch.nn.init.normal_, std=bound)


def _normal(std: float) -> Callable[[torch.Tensor], Any]:
    return functools.partial(torch.nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)


@dataclass(frozen=True)
class BlockInitializer:
    """Draws the weights of one layer, or of one loop, in float32.

    Each weight has a generator of its own, seeded by its name: a model starts with the same weights under any layout.
    Methods that take a shape and a name are a `Draw`: the shape of the whole weight, before it is split over ranks, and
    a name that is unique within the layer, with the number of the expert.
    """

    config: MoREConfig
    layer_number: int

    def replicated_parameter(self, shape: tuple[int, ...], name: str, draw: Draw) -> torch.nn.Parameter:
        """Return a parameter that every tensor-parallel rank holds, as norms are."""
        config = self.config
        parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=parameter_device(config)))
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if config.perform_initialization:
            parameter.data.copy_(draw(self, shape, name))
        return parameter

    def truncated_normal(self, shape: tuple[int, ...], name: str, std: float) -> torch.Tensor:
        """Return a weight of that deviation before it is cut off at three of them."""
        return self._drawn(torch.nn.init.trunc_normal_, shape, name, std=std, a=-3 * std, b=3 * std)

    def takase_in(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a projection out of the stream as wide as Takase et al. draw it."""
        return self.truncated_normal(shape, name, takase_std(self.config))

    def takase_out(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a projection back into the stream as wide as Takase et al. draw it."""
        unrolled_depth = self.config.num_layers * self.config.mean_steps
        return self.truncated_normal(shape, name, takase_std(self.config) / math.sqrt(2.0 * unrolled_depth))

    def megatron_in(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a projection out of the stream as wide as Megatron draws it."""
        return self.truncated_normal(shape, name, self.config.init_method_std)

    def megatron_out(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a projection back into the stream as wide as Megatron draws it."""
        return self.truncated_normal(shape, name, self.config.init_method_std / math.sqrt(2.0 * self.config.num_layers))

    def normal(self, shape: tuple[int, ...], name: str, std: float) -> torch.Tensor:
        """Return a normally distributed weight."""
        return self._drawn(torch.nn.init.normal_, shape, name, std=std)

    def scaled_std(self, inputs: int) -> float:
        """Return the standard deviation that MoEUT gives a map of so many inputs."""
        return math.sqrt(2.0 / (self.config.num_layers * self.config.mean_steps)) / math.sqrt(inputs)

    def scaled_normal(self, shape: tuple[int, ...], name: str, inputs: int) -> torch.Tensor:
        """Return a weight as narrow as MoEUT has a map of so many inputs."""
        return self.normal(shape, name, self.scaled_std(inputs))

    def rows_of_equal_norm(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a matrix whose rows have one norm: no expert is preferred at the start."""
        weight = self.scaled_normal(shape, name, inputs=shape[1])
        rows = weight / weight.norm(dim=1, keepdim=True)
        return rows * (weight.std() / rows.std())

    def glorot(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a matrix, uniform as Glorot and Bengio draw it (AISTATS 2010)."""
        return self._drawn(torch.nn.init.xavier_uniform_, shape, name)

    def orthogonal(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a matrix with orthonormal rows or columns (Saxe et al., arXiv 1312.6120)."""
        return self._drawn(torch.nn.init.orthogonal_, shape, name)

    def zeros(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(shape, device=torch.cuda.current_device())

    def ones(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return ones."""
        return torch.ones(shape, device=torch.cuda.current_device())

    def recurrent(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a weight of a recurrent cell as PyTorch draws it, or a bias: uniform, as narrow as the cell is wide.

        The shape is the gates and their size, and for a weight its input.
        """
        bound = 1.0 / math.sqrt(shape[1])
        return self._drawn(torch.nn.init.uniform_, shape, name, a=-bound, b=bound)

    def recurrent_sum(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return the sum of two such weights: of gates whose input is their state, or that have two biases."""
        return self.recurrent(shape, f"{name}/input") + self.recurrent(shape, f"{name}/state")

    def gru_of_its_state(self, shape: tuple[int, ...], name: str) -> torch.Tensor:
        """Return a weight or bias of a GRU whose input is its state: two gates see sums, the new state two products."""
        weight = self.recurrent(shape, f"{name}/input")
        weight[:2] += self.recurrent(shape, f"{name}/state")[:2]
        return weight

    def _drawn(
        self, fill: Callable[..., torch.Tensor], shape: tuple[int, ...], name: str, **options: float
    ) -> torch.Tensor:
        weight = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        key = f"{self.config.seed}/{self.layer_number}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return fill(weight, generator=torch.Generator(device=weight.device).manual_seed(seed), **options)


# Draws a weight, given who draws, the weight's shape and its name.
Draw = Callable[[BlockInitializer, tuple[int, ...], str], torch.Tensor]
