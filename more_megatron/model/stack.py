"""What a model is made of: groups of layers, each run once or looped.

A `Stack` describes the whole model; a pipeline stage takes its layers out of it. It is what a system says, and all
that the builder, the decoder and the cost formulas know of a system.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from more_megatron.config import MoREConfig
from more_megatron.model.costs import Cost, linear_cost


@dataclass(frozen=True)
class Layer:
    """One layer: how it is built, any attention and any feed-forward part, and its cost by length of a sequence."""

    spec: ModuleSpec
    cost: Callable[[int], Cost]

    def with_cost(self, more: Cost) -> Layer:
        """Return the layer with the cost of what it has besides."""
        return Layer(self.spec, lambda seq_length: self.cost(seq_length) + more)


@dataclass(frozen=True)
class Loop:
    """How a group of layers is repeated: what is injected, and when it ends."""

    # Builds the module that repeats the group, given the model configuration, the number of the group in the stack,
    # from 0, and the process groups; see `more_megatron.model.loops`
    module: Callable[[MoREConfig, int, ProcessGroupCollection], torch.nn.Module]
    cost: Cost = field(default_factory=Cost)  # cost of what is not part of the layers


@dataclass(frozen=True)
class Group:
    """Consecutive layers, and how they are repeated; None: they run once."""

    layers: tuple[Layer, ...]
    loop: Loop | None = None


@dataclass(frozen=True)
class Stack:
    """The layers of a whole model."""

    config: MoREConfig
    groups: tuple[Group, ...]  # groups of layers, in order
    norm: LayerNormBuilder | None  # builder of the norm after the last layer; None: there is none
    # Whether that norm is applied, with the same weight, behind the last looped group as well
    norms_core_output: bool = False
    embedding_scale: float = 1.0  # factor on the embeddings
    head_bias: bool = False  # whether the output layer has a bias
    # Sets how Megatron's modules that are built from the configuration draw their weights; None: as its flags say
    initialize: Callable[[MoREConfig], None] | None = None

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

    def cut_group(self) -> str | None:
        """Return what is wrong with a pipeline layout that cuts what must lie on one stage; None if it cuts nothing."""
        for group, layers in self.places():
            if group.loop is not None and not any(_is_within(layers, stage) for stage in self._stages()):
                return (
                    f"repeats layers {layers[0] + 1} to {layers[-1] + 1}, which {self._stage_sizes()} cut: a group "
                    "must lie on one stage; give --pipeline-model-parallel-layout or "
                    "--decoder-first-pipeline-num-layers so that it does, smaller groups, or fewer stages"
                )
        looped = [layers.stop for group, layers in self.places() if group.loop is not None]
        coda = range(max(looped, default=0), len(self.layers))
        if self.norms_core_output and len(coda) > 0 and not _is_within(coda, self._stages()[-1]):
            return (
                f"applies its last norm in front of layers {coda[0] + 1} to {coda[-1] + 1} as well, which "
                f"{self._stage_sizes()} part from it: these layers must lie on the last stage; give "
                "--pipeline-model-parallel-layout or --decoder-last-pipeline-num-layers so that they do, a smaller "
                "--recurrence-coda-layers, or fewer stages"
            )
        return None

    def _stages(self) -> list[range]:
        """Return the layers of each pipeline stage, in the order in which they are computed."""
        config, layout = self.config, self.config.pipeline_model_parallel_layout
        chunks = config.virtual_pipeline_model_parallel_size or 1
        places = list(itertools.product(range(chunks), range(config.pipeline_model_parallel_size)))
        if layout is None:
            return [self.stage(chunk if chunks > 1 else None, rank) for chunk, rank in places]
        # Megatron's own functions ask the process groups, which are not formed yet when flags are checked.
        sizes = [layout.layout[rank][chunk].count(LayerType.decoder) for chunk, rank in places]
        ends = itertools.accumulate(sizes)
        return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def _stage_sizes(self) -> str:
        return f"the pipeline stages of {[len(stage) for stage in self._stages()]} layers"

    def cost(self, seq_length: int) -> Cost:
        """Return the cost of all layers."""
        total = Cost()
        for group in self.groups:
            layers = sum((layer.cost(seq_length) for layer in group.layers), Cost())
            total += layers if group.loop is None else layers.in_every_step() + group.loop.cost
        return total

    def model_cost(self, layers: Cost, vocab_size: int, tied: bool) -> Cost:
        """Return the cost of the whole model, given that of its layers; `tied`: input and output embeddings are one."""
        hidden = self.config.hidden_size
        embedding = linear_cost(hidden, vocab_size)
        # The output layer meets all rows; where it is the embedding, they are stored once.
        head = Cost(0, embedding.parameters - hidden, embedding.once) if tied else embedding
        norm = 0 if self.norm is None else (2 if self.config.normalization == "LayerNorm" else 1) * hidden
        vectors = norm + (vocab_size if self.head_bias else 0)
        return Cost(embedding.parameters, hidden) + head + Cost(vectors, vectors) + layers

    def __call__(self, model_config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        """Return the layers of this rank's pipeline stage: what Megatron calls a layer specification."""
        layers = self.layers
        return TransformerBlockSubmodules(
            layer_specs=[layers[number].spec for number in self.stage(vp_stage)], layer_norm=self.norm
        )


def _is_within(layers: range, stage: range) -> bool:
    return layers[0] in stage and layers[-1] in stage
