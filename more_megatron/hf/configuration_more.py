"""Configuration of MoRE (Mixture of Recurrent Experts) models for Hugging Face transformers.

Depends on torch and transformers only: exports carry this file.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

__all__ = ["VARIANTS", "MoREConfig"]

VARIANTS = ("moe", "recurrent_experts", "shared_block", "shared_block_ffn", "recurrent_moe")
_CHOICES = {
    "variant": VARIANTS,
    "norm_type": ("rmsnorm", "layernorm"),
    "position_embedding": ("rope", "none", "learned"),
    "router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "router_dtype": ("fp32", "fp64", None),
}
# Width of the MLP in a recurrent block, in hidden sizes.
_BLOCK_WIDTHS = {"recurrent_experts": 2, "shared_block": 4, "shared_block_ffn": 4}


class MoREConfig(PretrainedConfig):
    """What a MoRE model is made of, and how its recurrence runs.

    Args:
        variant: Name of the system: "moe", "recurrent_experts", "shared_block", "shared_block_ffn" or "recurrent_moe".
        vocab_size: Rows of the embeddings, padding of the vocabulary included.
        hidden_size: Size of a hidden state.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads. Default: as many as query heads.
        head_dim: Size of a head. Default: hidden size over heads.
        intermediate_size: Width of the MLP in layers without experts.
        moe_layers: Whether each layer has experts. Default: all have.
        num_experts: Number of routed experts in a layer.
        num_experts_per_tok: Number of experts a token is sent to.
        moe_intermediate_size: Width of an expert that is an MLP.
        shared_expert_intermediate_size: Width of the shared expert; None without one.
        shared_expert_gate: Whether the output of the shared expert is gated.
        recurrent_intermediate_size: Width of the MLP in a recurrent block. Default: twice the hidden size if each
            expert is a block, four times if experts share one.
        hidden_act: Activation function of MLPs, by its name in transformers.
        gated_mlp: Whether MLPs are gated, as in SwiGLU.
        norm_type: "rmsnorm" or "layernorm". Recurrent blocks always have RMSNorms, except for that of
            "shared_block_ffn", which follows the layers.
        norm_eps: Added to the variance in norms.
        qk_norm: Whether queries and keys are normed.
        attention_bias: Whether the projections to queries, keys and values have biases.
        linear_bias: Whether the other linear maps, experts and router have biases.
        position_embedding: "rope", "learned" or "none".
        rope_theta: Base of the rotary embedding.
        rotary_percent: Part of each head that is rotated.
        rotary_interleaved: Whether neighbouring channels are rotated together, instead of the two halves.
        rope_scaling_factor: Factor by which the context is stretched as in Llama 3.1, from 8192 positions; None: not.
        max_position_embeddings: Longest sequence of training; the number of learned positions.
        router_score_function: "softmax", "sigmoid" or "sqrtsoftplus".
        router_pre_softmax: Whether the softmax comes before the choice of experts.
        router_scaling_factor: Factor on routing probabilities; None: 1.
        router_num_groups: Number of groups of experts in group-limited routing; None: no groups.
        router_group_topk: Number of groups a token may choose experts from.
        router_expert_bias: Whether a bias for each expert takes part in the choice.
        router_dtype: Type the router computes in: "fp32", "fp64" or None for that of the model.
        mean_recurrence: Recurrence steps taken if a call does not say how many.
        residual_scale: Factor on what a step of "recurrent_moe" adds to the residual stream.
        router_logit_ema: Weight of the former logits in the routing of "recurrent_moe".
        state_std: Standard deviation of initial states.
        noise_seed: Seed of initial states: the seed of the training run.
        initializer_range: Standard deviation of new weights outside recurrent blocks.
        router_aux_loss_coef: Coefficient of the load-balancing loss.
        output_router_logits: Whether router logits and load-balancing loss are returned if a call does not say.
        use_cache: Whether a cache is returned if a call does not say.
        tie_word_embeddings: Whether input and output embeddings are one.
        kwargs: Fields of every model in transformers.

    Raises:
        ValueError: If fields contradict each other.
    """

    model_type = "more"
    keys_to_ignore_at_inference = ("past_key_values", "cache")

    def __init__(
        self,
        variant: str = "recurrent_moe",
        vocab_size: int = 32000,
        hidden_size: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 2048,
        moe_layers: list[bool] | None = None,
        num_experts: int = 8,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int = 2048,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        recurrent_intermediate_size: int | None = None,
        hidden_act: str = "silu",
        gated_mlp: bool = True,
        norm_type: str = "rmsnorm",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        attention_bias: bool = False,
        linear_bias: bool = False,
        position_embedding: str = "rope",
        rope_theta: float = 10000.0,
        rotary_percent: float = 1.0,
        rotary_interleaved: bool = False,
        rope_scaling_factor: float | None = None,
        max_position_embeddings: int = 512,
        router_score_function: str = "softmax",
        router_pre_softmax: bool = False,
        router_scaling_factor: float | None = None,
        router_num_groups: int | None = None,
        router_group_topk: int | None = None,
        router_expert_bias: bool = False,
        router_dtype: str | None = "fp32",
        mean_recurrence: int = 4,
        residual_scale: float = 1.0,
        router_logit_ema: float = 0.0,
        state_std: float = 0.02,
        noise_seed: int = 1234,
        initializer_range: float = 0.02,
        router_aux_loss_coef: float = 0.001,
        output_router_logits: bool = False,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.variant = variant
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.moe_layers = [True] * num_hidden_layers if moe_layers is None else list(moe_layers)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        if recurrent_intermediate_size is None and variant in _BLOCK_WIDTHS:
            recurrent_intermediate_size = _BLOCK_WIDTHS[variant] * hidden_size
        self.recurrent_intermediate_size = recurrent_intermediate_size
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.linear_bias = linear_bias
        self.position_embedding = position_embedding
        self.rope_theta = rope_theta
        self.rotary_percent = rotary_percent
        self.rotary_interleaved = rotary_interleaved
        self.rope_scaling_factor = rope_scaling_factor
        self.max_position_embeddings = max_position_embeddings
        self.router_score_function = router_score_function
        self.router_pre_softmax = router_pre_softmax
        self.router_scaling_factor = router_scaling_factor
        self.router_num_groups = router_num_groups
        self.router_group_topk = router_group_topk
        self.router_expert_bias = router_expert_bias
        self.router_dtype = router_dtype
        self.mean_recurrence = mean_recurrence
        self.residual_scale = residual_scale
        self.router_logit_ema = router_logit_ema
        self.state_std = state_std
        self.noise_seed = noise_seed
        self.initializer_range = initializer_range
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.use_cache = use_cache
        self._check()
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} does not exist: choose one of {choices}")
        if len(self.moe_layers) != self.num_hidden_layers:
            raise ValueError(f"moe_layers names {len(self.moe_layers)} layers of {self.num_hidden_layers}")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} must be 1 to {self.num_experts}")
        if self.mean_recurrence < 1:
            raise ValueError(f"mean_recurrence {self.mean_recurrence} must be at least 1")


MoREConfig.register_for_auto_class()
