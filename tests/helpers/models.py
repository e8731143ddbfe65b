"""Small models of every system, built inside a rank without Megatron's trainer."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from more_megatron.config import MoREConfig, config_class
from more_megatron.model.builder import MoREModelBuilder, MoREModelConfig
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch
from more_megatron.systems import get_system
from more_megatron.training.problems import Problems

HIDDEN, EXPERTS, VOCABULARY = 16, 4, 24

# Fields of the configuration for each kind of recomputation.
RECOMPUTATION: dict[str, dict[str, Any]] = {
    "off": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def start_ranks(*, tensor: int = 1, expert: int = 1, expert_tensor: int | None = None) -> None:
    """Form Megatron's process groups over all ranks of the world, anew if they exist.

    Args:
        tensor: Tensor-parallel size.
        expert: Expert-parallel size.
        expert_tensor: Expert-tensor-parallel size. Default: as `tensor`.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, expert_model_parallel_size=expert, expert_tensor_parallel_size=expert_tensor
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)


def small_config(variant: str, **fields: Any) -> MoREConfig:
    """Return the configuration of a one-layer model without dropout, shared experts and losses of layers.

    Args:
        variant: Name of the system.
        fields: What differs; without experts if `num_moe_experts` is None.
    """
    topk = fields.setdefault("moe_router_topk", 1)
    defaults: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "ffn_hidden_size": 2 * HIDDEN,
        "moe_ffn_hidden_size": HIDDEN,
        "num_moe_experts": EXPERTS,
        "moe_router_pre_softmax": topk == 1,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
    }
    if fields.get("num_moe_experts", EXPERTS) is None:
        del defaults["moe_ffn_hidden_size"]
    # Losses that a system alone has.
    defaults |= {name: 0.0 for name in get_system(variant).own_flags() if name.endswith("_coeff")}
    return config_class(get_system(variant).Flags)(more_variant=variant, **{**defaults, **fields})


def build_model(config: MoREConfig, seq_length: int, vocabulary: int, **fields: Any) -> GPTModel:
    """Return this rank's pipeline stage of a model, as the trainer builds it.

    Args:
        config: Model configuration.
        seq_length: Length of a sequence.
        vocabulary: Size of the vocabulary.
        fields: Further fields of Megatron's model configuration.
    """
    defaults = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
    model_config = MoREModelConfig(
        transformer=config,
        transformer_layer_spec=get_system(config.more_variant).stack(config),
        vocab_size=vocabulary,
        seq_length=seq_length,
        should_pad_vocab=False,
        parallel_output=False,
        **{**defaults, **fields},
    )
    return MoREModelBuilder(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def gpt_model(config: MoREConfig, seq_length: int, weight_std: float | None = None, **fields: Any) -> GPTModel:
    """Return a whole model.

    Args:
        config: Model configuration.
        seq_length: Length of a sequence.
        weight_std: Standard deviation of weights drawn anew, the same in every model of these sizes: large ones, so
            that every part has its say in the output, and norms that are not the identity. None: as initialized.
        fields: Further fields of Megatron's model configuration.
    """
    model = build_model(config, seq_length, VOCABULARY, **fields)
    if weight_std is not None:
        redraw(model, weight_std)
    return model


@torch.no_grad()
def redraw(module: torch.nn.Module, std: float) -> None:
    """Draw all parameters anew: norms around 1, everything else around 0, but that positions do not halt at once."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        if ".halting." in name:
            noise = 0.1 * noise - float(name.endswith("bias"))
        parameter.copy_(noise + 1.0 if "norm" in name else noise)


def logits(
    model: GPTModel,
    embeddings: torch.Tensor,
    depth: Depth,
    sample_ids: tuple[int, ...] = (),
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the logits of a model, [b, s, vocabulary].

    Args:
        model: Whole model.
        embeddings: Of the tokens, [s, b, h].
        depth: Recurrence steps.
        sample_ids: Of the sequences; empty as in evaluation.
        starts: Where the problems of each row begin; None: a row is one sequence.
    """
    length, batch = embeddings.shape[:2]
    position_ids = torch.arange(length).expand(batch, length)
    return model(
        None,
        position_ids,
        None if starts is None else Problems(starts, torch.zeros_like(starts), length).attention_mask,
        decoder_input=embeddings,
        extra_block_kwargs=MicroBatch(depth, sample_ids, starts).block_kwargs(),
    )
