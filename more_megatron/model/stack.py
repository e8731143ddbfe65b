"""What a model is made of: groups of layers, each run once or looped.

A `Stack` describes the whole model; a pipeline stage takes its layers out of it. It is what a system says, and all
that the builder, the decoder and the cost formulas know of a system.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost

__all__ = ["Group", "Layer", "Loop", "Stack"]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        spec: How it is built: any attention, any feed-forward part.
        cost: Its cost, given the length of a sequence.
    """

    spec: ModuleSpec
    cost: Callable[[int], Cost]


class Loop(ABC):
    """How a group of layers is repeated: what is injected, and when it ends."""

    @abstractmethod
    def build(self, config: MoREConfig, group: int, pg_collection: ProcessGroupCollection) -> torch.nn.Module:
        """Return the module that repeats the group; see `more_megatron.model.loops`.

        Args:
            config: Model configuration.
            group: Number of the group in the stack, from 0.
            pg_collection: Process groups.
        """

    def cost(self, config: MoREConfig) -> Cost:
        """Return the cost of what is not part of the layers."""
        return Cost()


@dataclass(frozen=True)
class Group:
    """Consecutive layers.

    Attributes:
        layers: The layers.
        loop: How they are repeated; None: they run once.
    """

    layers: tuple[Layer, ...]
    loop: Loop | None = None


@dataclass(frozen=True)
class Stack:
    """The layers of a whole model.

    Attributes:
        config: Model configuration.
        groups: Groups of layers, in order.
        norm: Builder of the norm after the last layer.
        norms_core_output: Whether that norm is applied, with the same weight, behind the last looped group as well.
        embedding_scale: Factor on the embeddings.
        head_bias: Whether the output layer has a bias.
    """

    config: MoREConfig
    groups: tuple[Group, ...]
    norm: LayerNormBuilder
    norms_core_output: bool = False
    embedding_scale: float = 1.0
    head_bias: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether Megatron's own decoder computes it."""
        return self.embedding_scale == 1.0 and all(group.loop is None for group in self.groups)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in order."""
        return tuple(layer for group in self.groups for layer in group.layers)

    def places(self) -> Iterator[tuple[Group, range]]:
        """Yield each group and the numbers of its layers in the model, from 0."""
        first = 0
        for group in self.groups:
            yield group, range(first, first + len(group.layers))
            first += len(group.layers)

    def stage(self, vp_stage: int | None = None, pp_rank: int | None = None) -> range:
        """Return the numbers of the layers of a pipeline stage, from 0. Default: those of this rank."""
        first = get_transformer_layer_offset(self.config, vp_stage, pp_rank)
        return range(first, first + get_num_layers_to_build(self.config, vp_stage, pp_rank))

    def submodules(self, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Return the layers of this rank's pipeline stage, as Megatron's decoder takes them."""
        layers = self.layers
        return TransformerBlockSubmodules(
            layer_specs=[layers[number].spec for number in self.stage(vp_stage)], layer_norm=self.norm
        )

    def cut_group(self) -> str | None:
        """Return what is wrong with a pipeline layout that cuts a looped group; None if no stage cuts one."""
        config = self.config
        chunks = config.virtual_pipeline_model_parallel_size or 1
        stages = [
            self.stage(chunk if chunks > 1 else None, rank)
            for rank in range(config.pipeline_model_parallel_size)
            for chunk in range(chunks)
        ]
        for group, layers in self.places():
            if group.loop is None or any(layers[0] in stage and layers[-1] in stage for stage in stages):
                continue
            sizes = [len(stage) for stage in sorted(stages, key=lambda stage: stage.start)]
            return (
                f"repeats layers {layers[0] + 1} to {layers[-1] + 1}, which the pipeline stages of {sizes} layers cut: "
                "a group must lie on one stage; give --pipeline-model-parallel-layout or "
                "--decoder-first-pipeline-num-layers so that it does, smaller groups, or fewer stages"
            )
        return None

    def cost(self, seq_length: int) -> Cost:
        """Return the cost of all layers."""
        total = Cost()
        for group in self.groups:
            layers = sum((layer.cost(seq_length) for layer in group.layers), Cost())
            total += layers if group.loop is None else layers.in_every_step() + group.loop.cost(self.config)
        return total

    def __call__(self, model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Return the layers of a stage: what Megatron calls a layer specification."""
        return self.submodules(vp_stage)
