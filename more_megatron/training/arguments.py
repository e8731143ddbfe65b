"""The command line: Megatron's flags with our defaults, and the MoRE group."""

import argparse
import enum
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_and_validate_args

from more_megatron.console import LOG, VERBOSE, say
from more_megatron.errors import MoREError, speak_in_one_line
from more_megatron.flags import MoREFlags
from more_megatron.platform import Platform
from more_megatron.platform.packages import has_package, imports
from more_megatron.systems import default_name, flag_names, get_system, systems
from more_megatron.training.data_checks import read_blend_files
from more_megatron.training.flag_checks import check_flags, convert, unread_flags
from more_megatron.training.stored_flags import given_flags, take_stored_flags

# What every system shares, so that a run is described by sizes, data and system alone.
_SHARED_DEFAULTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "num_experts": 8,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_dtype": "fp32",
    # Needed even where nothing is evaluated; what Megatron-LM's own scripts took.
    "eval_interval": 1000,
    # The optimizer's state is saved so that it can be loaded under any other layout.
    "use_distributed_optimizer": True,
    "dist_ckpt_optim_fully_reshardable": True,
}

_PLATFORM_DEFAULTS: dict[Platform, dict[str, Any]] = {
    Platform.CUDA: {"bf16": True},
    Platform.CPU: {
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        # Worker processes would take the cores that train.
        "num_workers": 0,
    },
}

# Megatron's switches go one way. Where our default is the other end, these turn it back.
_WAYS_BACK: dict[str, tuple[str, bool]] = {
    "--no-swiglu": ("swiglu", False),
    "--enable-bias-linear": ("add_bias_linear", True),
    "--tie-embeddings-and-output-weights": ("untie_embeddings_and_output_weights", False),
    "--no-use-distributed-optimizer": ("use_distributed_optimizer", False),
    "--no-dist-ckpt-optim-fully-reshardable": ("dist_ckpt_optim_fully_reshardable", False),
    "--no-bf16": ("bf16", False),
}


@dataclass
class TrainingFlags:
    """Flags of the MoRE group that say how a run trains and not what a model is: no checkpoint sets them."""

    loss_on_answers: bool = False
    """Count the loss of answers only, where a dataset has a mask of them; problems of a row do not see each other.
    Implies --calculate-per-token-loss."""

    seq_length_curriculum: str | None = None
    """Length of training rows by iteration, as in 0:128,10000:256; samples of --seq-length are cut into these."""

    health_interval: int = 100
    """Watch recurrence, routing, gradients and loss in every N-th step, and warn of what is not healthy. 0: never."""

    health_stop: Literal["none", "non-finite", "collapse", "any"] = "non-finite"
    """What ends a run: nothing; numbers that are not finite, of which nothing is saved; a collapse as well, or any
    warning, after a checkpoint was saved."""

    health_ranges: str | None = None
    """YAML file with ranges that replace those of docs/health.md: `routing/load cv: [0, 0.5]`, null for an open end."""


def parse_arguments(platform: Platform) -> argparse.Namespace:
    """Parse and check the command line, set Megatron's globals, and return its namespace with the MoRE fields in it.

    The platform decides some defaults.

    Raises:
        MoREError: If a flag is wrong in a way that Megatron does not check.
        AssertionError: If Megatron's own check of a flag fails.
    """
    args = parse_and_validate_args(extra_args_provider=functools.partial(_extend_parser, platform=platform))
    if args.moe_shared_expert_intermediate_size is None:
        args.moe_shared_expert_intermediate_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    elif args.moe_shared_expert_intermediate_size == 0:
        args.moe_shared_expert_intermediate_size = None
    return args


def _extend_parser(parser: argparse.ArgumentParser, platform: Platform) -> argparse.ArgumentParser:
    group = _add_group(parser)
    for option, (dest, value) in _WAYS_BACK.items():
        group.add_argument(option, dest=dest, action="store_const", const=value, help=f"Set {dest} to {value}.")
    group.add_argument(VERBOSE, action="store_true", help=f"Show all that goes into {LOG} beside the checkpoints.")
    parser.set_defaults(**_SHARED_DEFAULTS, **_PLATFORM_DEFAULTS[platform])
    if platform is Platform.CUDA:
        parser.set_defaults(**_installed_defaults())
    # A bare percent sign in a help text, which Megatron has, would end --help in an error.
    for action in parser._actions:
        action.help = action.help and re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
        if action.type not in (None, int, float, str, bool):
            members = [choice for choice in action.choices or () if isinstance(choice, enum.Enum)]
            action.type = functools.partial(convert, cast(Callable, action.type), members)
    speak_in_one_line(parser)
    parser.set_defaults(more_variant=default_name())
    parse = functools.partial(_parse, parser.parse_args)
    parser.parse_args = parse  # type: ignore[method-assign, assignment]
    return parser


def _add_group(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that systems share, and those that each alone reads, as one group."""
    group = parser.add_argument_group("MoRE", MoREFlags.__doc__)
    into_group: Any = argparse.Namespace(add_argument_group=lambda **_: group)
    for flags in (MoREFlags, *(system.Flags for system in systems().values()), TrainingFlags):
        if flags is not None:
            ArgumentGroupFactory(flags).build_group(into_group)
    return group


def _set_defaults(args: argparse.Namespace, given: set[str]) -> None:
    """Give arguments that the command line does not set the defaults of the system."""
    for name, value in get_system(args.more_variant).defaults.items():
        if name not in given:
            setattr(args, name, value)


def _installed_defaults() -> dict[str, Any]:
    """Return the defaults on CUDA that depend on which packages are there."""
    defaults: dict[str, Any] = {}
    if not imports("transformer_engine.pytorch"):
        state = "does not load on this PyTorch" if has_package("transformer_engine") else "is not installed"
        say(f"> Transformer Engine {state}: --transformer-impl local, in plain PyTorch, is the default")
        defaults |= {"transformer_impl": "local", "no_persist_layer_norm": True, "masked_softmax_fusion": False}
        defaults |= {} if imports("apex") else {"apply_rope_fusion": False}
    # Megatron's output layer adds to gradients with a kernel of NVIDIA apex, also under Transformer Engine.
    if not imports("fused_weight_gradient_mlp_cuda"):
        defaults["gradient_accumulation_fusion"] = False
    return defaults


def _parse(parse_args: Callable[..., argparse.Namespace], *arguments: Any) -> argparse.Namespace:
    """Parse, check, and complete the flags whose default depends on a system, a checkpoint or another flag."""
    args = parse_args(*arguments)
    parser = parse_args.__self__  # type: ignore[attr-defined]
    given = given_flags(parser)
    for fault in unread_flags(parser, given):
        raise MoREError(fault)
    asked, is_described_by_checkpoint = args.more_variant, args.use_checkpoint_args
    _set_defaults(args, given)
    take_stored_flags(args, given)
    if args.more_variant != asked and not is_described_by_checkpoint:
        _set_defaults(args, given | flag_names())
    read_blend_files(args)
    check_flags(args, given)
    system = get_system(args.more_variant)
    for fault in system.without_effect(system.flags(args), given & (flag_names() | system.unread(args))):
        raise MoREError(fault)
    _complete(args)
    return args


def _complete(args: argparse.Namespace) -> None:
    args.calculate_per_token_loss = args.calculate_per_token_loss or args.loss_on_answers
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    # Megatron trains MoE layers under tensor parallelism only with it.
    args.sequence_parallel = args.sequence_parallel or args.tensor_model_parallel_size > 1
    # A softmax over the one chosen expert would be 1 for every token.
    if args.moe_router_topk == 1 and args.moe_router_score_function == "softmax":
        args.moe_router_pre_softmax = True
    # Attention kernels build causal masks themselves.
    if not args.reset_attention_mask:
        args.create_attention_mask_in_dataloader = False
    args.bf16 = args.bf16 and not args.fp16
    args.enable_one_logger = args.enable_one_logger and has_package("one_logger")
    if args.async_strategy == "nvrx" and not has_package("nvidia_resiliency_ext"):
        args.async_strategy = "mcore"
