"""The model configuration that `pretrain` builds from."""

from __future__ import annotations

import argparse

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from more_megatron.config import MoREConfig
from more_megatron.variants import block_spec, check_variant

__all__ = ["model_config_from_args"]


def model_config_from_args(args: argparse.Namespace) -> GPTModelConfig:
    """Return Megatron's GPT model with the layers of the chosen system.

    A specification given with `--spec` takes precedence, as in Megatron.

    Raises:
        MoREError: If the recurrence fields contradict each other, or the system cannot do what they ask for.
    """
    config = core_transformer_config_from_args(args, MoREConfig)
    check_variant(config)
    model_config = gpt_config_from_args(args, config)
    if model_config.transformer_layer_spec is None:
        model_config.transformer_layer_spec = _layers
    model_config.pre_wrap_hooks.append(_mark_experts)
    return model_config


def _layers(model_config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    return block_spec(model_config.transformer, vp_stage)


def _mark_experts(model: list[MegatronModule]) -> list[MegatronModule]:
    """Mark the parameters of experts as such under any layout.

    Megatron does so only with expert parallelism, and gives marked parameters an optimizer of their own. Marked always,
    the optimizer's state has one structure, and what was saved with expert parallelism loads without it.
    """
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                for parameter in module.experts.parameters():
                    parameter.allreduce = False
    return model
