"""A checkpoint as Megatron's own model, in one process on the CPU: what an export is compared with."""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from more_megatron.platform import Platform, initialize_platform

_PLATFORM = initialize_platform()

from megatron.core import ModelParallelConfig, dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args  # noqa: E402

from more_megatron.config import config_class  # noqa: E402
from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint  # noqa: E402
from more_megatron.model.builder import MoREModelConfig  # noqa: E402
from more_megatron.pickles import common_state  # noqa: E402
from more_megatron.systems import get_system  # noqa: E402

_NONE = (
    *("pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("moe_expert_capacity_factor", "fp8", "fp4"),
)
_OFF = (
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "perform_initialization"),
    *("moe_pad_expert_input_to_capacity", "moe_shared_expert_overlap", "moe_permute_fusion", "moe_router_fusion"),
    *("moe_grouped_gemm", "masked_softmax_fusion", "bias_gelu_fusion", "bias_swiglu_fusion", "bias_dropout_fusion"),
    *("apply_rope_fusion", "fp8_param_gather", "fp4_param_gather"),
)
# One rank without a GPU, in float32, beside what layouts and dtypes are by default.
_HERE = {
    **dict.fromkeys(_NONE),
    **dict.fromkeys(_OFF, False),
    **dict.fromkeys(("use_cpu_initialization", "no_persist_layer_norm", "attention_softmax_in_fp32"), True),
    "expert_tensor_parallel_size": 1,
    "moe_token_dispatcher_type": "alltoall",
    "transformer_impl": "local",
    "cuda_graph_impl": "none",
}


@torch.no_grad()
def megatron_logits(
    checkpoint: MegatronCheckpoint, tokens: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor | str:
    """Return the logits of Megatron's model in evaluation, [b, s, V] with padding, or why it cannot be built here.

    Args:
        checkpoint: The checkpoint.
        tokens: Input, [b, s].
        dtype: What the weights are rounded to before; None: they stay as they are.
    """
    if _PLATFORM is not Platform.CPU:
        return "this process has set itself up for a GPU"
    # Read again: before Megatron is imported, its types are not known.
    common = common_state(checkpoint.path)
    args: argparse.Namespace = common["args"]
    if not hasattr(args, "transformer_impl"):
        return "the checkpoint does not hold the arguments of a run"
    if args.add_bias_linear:
        return "biases need Transformer Engine"
    layout = {field.name: field.default for field in dataclasses.fields(ModelParallelConfig)}
    vars(args).update({**{name: value for name, value in layout.items() if hasattr(args, name)}, **_HERE})
    with _one_rank():
        model = _build(args)
        metadata = {**(common.get("content_metadata") or {}), "dp_cp_group": parallel_state.get_data_parallel_group()}
        state = {"model": model.sharded_state_dict(metadata=metadata)}
        model.load_state_dict(dist_checkpointing.load(state, str(checkpoint.path))["model"])
        for parameter in model.parameters() if dtype is not None else ():
            parameter.copy_(parameter.to(dtype))
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        return model.eval()(tokens, positions, None)


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Be the only rank. Its groups end with the block: their threads must not meet the end of the interpreter."""
    is_new = not torch.distributed.is_initialized()
    if is_new:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    try:
        yield
    finally:
        if is_new:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _build(args: argparse.Namespace) -> GPTModel:
    system = get_system(args.more_variant)
    config = core_transformer_config_from_args(args, config_class(system.Flags))
    model_config = gpt_config_from_args(args, config, MoREModelConfig)
    model_config.transformer_layer_spec = system.stack(config)
    model_config.parallel_output = False
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return model_config.get_builder_cls()(model_config).build_model(groups)
