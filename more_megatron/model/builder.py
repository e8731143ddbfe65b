"""Builds the model that a stack describes, with Megatron's own builder.

The only file that knows which of Megatron's models is filled: `GPTModel` today, whose decoder repeats groups of layers
where the stack has loops.
"""

from typing import Any, ClassVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from more_megatron.model.decoder import repeat_groups
from more_megatron.model.initialization import parameter_device
from more_megatron.model.stack import Stack


class MoREModelConfig(GPTModelConfig):
    """Megatron's configuration of a GPT model; `transformer_layer_spec` holds the stack."""

    builder: ClassVar[str] = "more_megatron.model.builder.MoREModelBuilder"


class MoREModelBuilder(GPTModelBuilder):
    """Builds one pipeline stage of a stack."""

    def build_model(self, pg_collection: ProcessGroupCollection, *args: Any, **kwargs: Any) -> GPTModel:
        """Return the model of this pipeline stage; arguments as for Megatron's builder."""
        stack = self._model_config.transformer_layer_spec
        if isinstance(stack, Stack) and stack.initialize is not None:
            stack.initialize(self._model_config.transformer)
        model = super().build_model(pg_collection, *args, **kwargs)
        if isinstance(stack, Stack):
            if not stack.is_plain:
                repeat_groups(model.decoder, stack)
            if stack.head_bias and model.post_process:
                _add_bias(model.output_layer)
        return model


def _add_bias(output_layer: Any) -> None:
    """Give Megatron's output layer, which is built without one, a bias for its part of the vocabulary."""
    config, size = output_layer.config, output_layer.output_size_per_partition
    # Drawn whole: outside of Megatron's regions for it, the random state is the same on all tensor-parallel ranks.
    whole = torch.zeros(size * output_layer.tp_group.size(), device=parameter_device(config))
    if config.perform_initialization:
        config.init_method(whole)
    own = whole.chunk(output_layer.tp_group.size())[output_layer.tp_group.rank()]
    bias = torch.nn.Parameter(own.to(config.params_dtype, copy=True))
    set_tensor_model_parallel_attributes(bias, True, 0, 1)
    output_layer.bias = bias
