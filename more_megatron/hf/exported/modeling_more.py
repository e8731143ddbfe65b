"""MoRE (Mixture of Recurrent Experts) models for Hugging Face transformers.

Every system of the training code, computing in evaluation what the training code computes. Calls take, beside what
every causal language model takes, what options.py names: the number of steps, when tokens stop by themselves, where
recurrences start, and what is kept of them.

The letters in shapes: b sequences, s tokens of this call, T tokens with those in the cache, k experts a token is sent
to, N experts, h hidden size, d head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .cache import Memory, prepare_cache
from .configuration_more import MoREConfig
from .context import CallContext, Records, find_places
from .generation import MoREGenerationMixin
from .options import CallOptions
from .stack import run_stack
from .system import find_system

# Newer releases of transformers call it `cache`.
_CACHE_FIELD = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class MoREModelOutput(MoeModelOutputWithPast):
    """What layers return: `losses` are what loops want to have added in training, the rest is as below."""

    losses: tuple[Tensor, ...] | None = None
    recurrent_states: Tensor | None = None
    exit_steps: Tensor | None = None


@dataclass
class MoRECausalLMOutput(MoeCausalLMOutputWithPast):
    """What the model returns.

    Attributes:
        recurrent_states: The state behind each step, [recurrences, steps, b, s, h], in the order of the loops or, where
            layers have recurrences inside them, of these layers.
        exit_steps: Steps that each token took where tokens stop by themselves, [recurrences, b, s]; 0 for padding.
    """

    recurrent_states: Tensor | None = None
    exit_steps: Tensor | None = None


class MoREPreTrainedModel(PreTrainedModel):
    """What MoRE models have in common."""

    config: MoREConfig
    config_class = MoREConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MoREConfig) -> None:
        # It may have been changed since it was made.
        config.check()
        super().__init__(config)
        self.system = find_system(config.variant)
        self._no_split_modules = [self.system.layer_class.__name__]
        if config.router_expert_bias:
            self._keep_in_fp32_modules_strict = ["expert_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights a module itself holds that were not loaded. (Pretraining draws its own, in Megatron.)"""
        for name, weight in module.named_parameters(recurse=False):
            if getattr(weight, "_is_hf_initialized", False):
                continue
            if name.endswith("bias"):
                weight.zero_()
            elif name.startswith("norm") or isinstance(module, nn.RMSNorm | nn.LayerNorm):
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, self.config.initializer_range)


class MoREModel(MoREPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(self.system.build_layer(config, index) for index in range(config.num_hidden_layers))
        loops = [group.loop for group in self.system.groups(config) if group.loop is not None]
        self.loops = nn.ModuleList(loop(config) for loop in loops)
        self.norm = self.system.build_final_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        read: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> MoREModelOutput | tuple:
        """Compute hidden states.

        Args:
            input_ids: Tokens, [b, s].
            attention_mask: 0 for padding, on the left or on the right, [b, T]. Masks of four dimensions are refused:
                experts and cells need to know which tokens are padding, not only what attends to what.
            position_ids: Positions, [b, s]. Default: counted from the first token that is not padding. Where they begin
                anew, a document begins that sees nothing of what stands before it.
            past_key_values: Cache of the tokens before these.
            inputs_embeds: Embeddings in the place of tokens, [b, s, h].
            use_cache: Whether to fill and return a cache. Default: the configuration's, but not in training.
            output_hidden_states: Whether to return what each layer is given, in every pass, and the result.
            output_router_logits: Whether to return the logits of each routing decision, [b s, N], which know their
                layer and step.
            cache: The same as `past_key_values`.
            read: Output layer, for criteria that read logits.
            kwargs: The options of `CallOptions`.

        Raises:
            ValueError: If arguments contradict each other, or the cache was filled with another number of steps.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden_states.dim() != 3:
            raise ValueError("input_ids must have the shape (b, T), inputs_embeds (b, T, hidden_size)")
        options = CallOptions.taken_from(kwargs, self.config)
        self.system.check_call(self.config, options, hidden_states)
        wants_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        if options.criterion is not None and options.criterion.reads_logits and read is None:
            reader = type(options.criterion).__name__
            raise ValueError(f"{reader} reads logits: load the model with AutoModelForCausalLM")
        if options.criterion is not None and (wants_states or wants_logits):
            raise ValueError("hidden states and router logits are not kept where tokens stop by themselves")
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        memory = self._memory(cache, options, hidden_states)
        records = Records(options.output_recurrent_states, [] if wants_states else None, [] if wants_logits else None)
        padding, documents, positions = find_places(position_ids, attention_mask, memory, hidden_states.device)
        context = CallContext(
            config=self.config,
            options=options,
            memory=memory,
            records=records,
            positions=positions,
            padding=padding,
            documents=documents,
            read=None if read is None else lambda x: read(self.norm(x)),
        )
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(positions)
        if self.system.scales_embeddings:
            hidden_states = hidden_states * math.sqrt(self.config.hidden_size)
        hidden_states = self.norm(run_stack(self, hidden_states, context))
        records.see_states(hidden_states)
        kept: dict[str, Any] = {_CACHE_FIELD: cache, **records.outputs(hidden_states.size(0))}
        return MoREModelOutput(last_hidden_state=hidden_states, **kept)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the cache that a call fills; None without one.

        A layer that is computed again for its gradients would fill it twice.
        """
        if self.training and self.gradient_checkpointing and torch.is_grad_enabled():
            if given is not None and given.get_seq_length() > 0:
                raise ValueError("with gradient checkpointing, what a cache holds cannot be read in training")
            return None
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        return DynamicCache() if given is None and wanted else given

    def _memory(self, cache: Cache | None, options: CallOptions, embeddings: Tensor) -> Memory:
        shape = (embeddings.size(0), embeddings.size(1))
        if cache is None:
            # Tokens that go on see what those that stopped have left.
            return Memory(None if options.criterion is None else DynamicCache(), shape, slots=1)
        prepare_cache(cache, options.num_steps if self.system.recurrent else None, options.slots)
        return Memory(cache, shape, cache.get_seq_length(), options.slots)


class MoREForCausalLM(MoREGenerationMixin, MoREPreTrainedModel):
    """A MoRE model with an output layer over the vocabulary."""

    # A mapping since transformers 5, names before; a mapping is both.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoREConfig) -> None:
        super().__init__(config)
        self.model = MoREModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=self.system.head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoRECausalLMOutput | tuple:
        """Compute logits, and the loss if there are labels.

        Args:
            labels: Tokens, [b, s]; each is predicted from those before it, so labels are the input. -100: not counted.
            output_router_logits: Whether to return router logits, and to compute the load-balancing loss, which is
                added to the loss with `router_aux_loss_coef`.
            logits_to_keep: Number of last positions to compute logits of, or their indices. Default: all.
            kwargs: The options of `CallOptions`, and what the loss function of transformers takes, such as
                `num_items_in_batch`.

        All other arguments are those of `MoREModel`.
        """
        if position_ids is None and any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx")):
            raise ValueError("packed rows need position_ids that begin anew: a collator's return_position_ids=True")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            read=self.lm_head,
            **kwargs,
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, places])
        loss = aux_loss = None
        added = list(outputs.losses or ()) if self.training else []
        if outputs.router_logits:
            aux_loss, balance = self.system.router_loss(self.config, outputs.router_logits, attention_mask)
            added.insert(0, balance)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            weight = _weight(labels, kwargs.get("num_items_in_batch"))
            loss = sum((weight * part.to(loss.device) for part in added), start=loss)
        names = (_CACHE_FIELD, "hidden_states", "router_logits", "recurrent_states", "exit_steps")
        kept = {name: outputs.get(name) for name in names}
        return MoRECausalLMOutput(loss=loss, aux_loss=aux_loss, logits=logits, **kept)


def _weight(labels: Tensor, num_items: Tensor | int | None) -> Tensor | float:
    """Return the share of a call in its batch, which is more than one call where gradients are accumulated.

    The loss of transformers is then a sum over the tokens of the call, divided by the number in the batch; whatever is
    a mean over the call gets the same weight.
    """
    if num_items is None:
        return 1.0
    counted = (labels[..., 1:] != -100).sum()
    return counted / (num_items.to(counted.device) if isinstance(num_items, Tensor) else num_items)


MoREModel.register_for_auto_class("AutoModel")
MoREForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# The trainer asks this table whether labels must be shifted under label smoothing, and pipelines whether a model is
# theirs; that a class is registered tells them nothing.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoREConfig.model_type] = MoREForCausalLM.__name__
