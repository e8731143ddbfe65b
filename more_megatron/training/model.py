"""What `pretrain` is handed: the model configuration that it builds from, data and forward step."""

import argparse
import functools
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)

from more_megatron.config import MoREConfig, config_class
from more_megatron.errors import MoREError
from more_megatron.model.attached_loss import weigh_attached_losses
from more_megatron.model.builder import MoREModelConfig
from more_megatron.systems import get_system
from more_megatron.training.datasets import counted_share, datasets_provider
from more_megatron.training.former_weights import ask_for_former_weights
from more_megatron.training.forward import forward_step


def pretrain_arguments(args: argparse.Namespace, model_config: MoREModelConfig) -> tuple[Any, ...]:
    """Return the arguments of Megatron's `pretrain`."""
    data = datasets_provider(model_config.transformer)
    return pretrain_cfg_container_from_args(args, model_config), data, ModelType.encoder_or_decoder, forward_step


def model_config_from_args(args: argparse.Namespace) -> MoREModelConfig:
    """Return Megatron's GPT model with the layers of the chosen system.

    A specification given with `--spec` takes precedence, as in Megatron.

    Raises:
        MoREError: If the recurrence fields contradict each other, or the system cannot do what they ask for.
    """
    system = get_system(args.more_variant)
    config = core_transformer_config_from_args(args, config_class(system.Flags))
    check_system(config)
    model_config = gpt_config_from_args(args, config, MoREModelConfig)
    if model_config.transformer_layer_spec is None:
        if args.spec is not None:
            raise MoREError(f"--spec {' '.join(args.spec)} cannot be imported: name a module and what it holds")
        model_config.transformer_layer_spec = system.stack(config)
    model_config.pre_wrap_hooks.append(_mark_experts)
    model_config.pre_wrap_hooks.append(functools.partial(ask_for_former_weights, args))
    if args.loss_on_answers:
        model_config.pre_wrap_hooks.append(functools.partial(_weigh_by_answers, args))
    return model_config


def check_system(config: MoREConfig) -> None:
    """Refuse what the system of `config` cannot do.

    Raises:
        MoREError: If there is such a thing; the message names the flags to change.
    """
    system = get_system(config.more_variant)
    for fault in system.refusals(config):
        raise MoREError(f"--more-variant {system.name} {fault}")
    cut = system.stack(config).cut_group() if config.pipeline_model_parallel_size > 1 else None
    if cut is not None:
        raise MoREError(f"--more-variant {system.name} {cut}")


def _weigh_by_answers(args: argparse.Namespace, model: list[MegatronModule]) -> list[MegatronModule]:
    share = counted_share(args)
    for chunk in model:
        weigh_attached_losses(chunk.config, share)
    return model


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
