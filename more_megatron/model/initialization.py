"""Initial weights, as Huginn and as MoEUT draw them.

Takase et al. (arXiv 2312.16903) as used in Huginn (arXiv 2502.05171, section 4): truncated normal with variance 2/(5h);
projections back into the stream are divided by sqrt(2 L), where L is the depth after unrolling the recurrence.
MoEUT (arXiv 2405.16039): normal, each deviation over the root of the inputs times sqrt(2 / L).
Everything else in a model keeps Megatron's initialization.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel

from more_megatron.config import MoREConfig

__all__ = ["BlockInitializer", "DepthScaledInitializer", "draw_uniform_head"]


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

    def generator(self, name: str, device: torch.device) -> torch.Generator:
        """Return the generator of one weight."""
        key = f"{self.config.seed}/{self.layer_number}/{name}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.Generator(device=device).manual_seed(seed)


@dataclass(frozen=True)
class DepthScaledInitializer(BlockInitializer):
    """Draws the weights of one layer as MoEUT does."""

    def std(self, inputs: int) -> float:
        """Return the standard deviation of a map of so many inputs."""
        return math.sqrt(2.0 / (self.config.num_layers * self.config.mean_steps)) / math.sqrt(inputs)

    def normal(self, shape: tuple[int, ...], name: str, inputs: int) -> torch.Tensor:
        """Return a weight in float32.

        Args:
            shape: Shape of the whole weight.
            name: Name of the weight, unique within the layer.
            inputs: Number of inputs of the map.
        """
        weight = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        return weight.normal_(0.0, self.std(inputs), generator=self.generator(name, weight.device))

    def rows_of_equal_norm(self, shape: tuple[int, int], name: str) -> torch.Tensor:
        """Return a weight in float32 whose rows have one norm: no expert is preferred at the start."""
        weight = self.normal(shape, name, inputs=shape[1])
        rows = weight / weight.norm(dim=1, keepdim=True)
        return rows * (weight.std() / rows.std())


@torch.no_grad()
def draw_uniform_head(model: GPTModel) -> None:
    """Draw embeddings and output layer as PyTorch would, whole and then split over ranks.

    Embeddings are normal with variance 1/h, weight and bias of an output layer of its own uniform within h^-1/2.

    Args:
        model: A pipeline stage.
    """
    config = model.config
    bound = config.hidden_size**-0.5
    initializer = BlockInitializer(config, layer_number=0)

    def draw(parameter: torch.nn.Parameter | None, name: str) -> None:
        if parameter is None:
            return
        ranks, rank = model.pg_collection.tp.size(), model.pg_collection.tp.rank()
        shape = (parameter.size(0) * ranks, *parameter.shape[1:])
        whole = torch.empty(shape, dtype=torch.float32, device=torch.cuda.current_device())
        generator = initializer.generator(name, whole.device)
        if name == "embedding":
            whole.normal_(0.0, bound, generator=generator)
        else:
            whole.uniform_(-bound, bound, generator=generator)
        parameter.copy_(whole.chunk(ranks)[rank])

    if model.pre_process:
        draw(model.embedding.word_embeddings.weight, "embedding")
    if model.post_process and not model.share_embeddings_and_output_weights:
        draw(model.output_layer.weight, "head")
    if model.post_process:
        draw(model.output_layer.bias, "head bias")
