"""SwitchHead: attention whose heads choose among experts for their values and for their outputs.

    v_t,h = sum over the chosen j of sigmoid(S_V,h a_t)_j  x_t V_h,j
    out_t = sum over heads and the chosen j of sigmoid(S_O,h a_t)_j  ctx_t,h O_h,j

`a` is the norm of the stream `x`: it feeds queries, keys and both routers, `x` itself the values. With one expert V and
O are dense, and sigmoid(S_O,h a_t) is a gate on each head (Csordas et al., arXiv 2312.07987; MoEUT, arXiv 2405.16039).

Heads are split over tensor-parallel ranks.
"""

import functools
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from more_megatron.blocks.backends import backend_of
from more_megatron.blocks.entropy_balance import EntropyBalance, sum_over_positions
from more_megatron.blocks.head_experts import Choice, HeadExperts, HeadRouter
from more_megatron.blocks.row_ops import rotate, rotation_of
from more_megatron.blocks.statistics import is_routing_reported, record_routing
from more_megatron.model.costs import Cost, linear_cost
from more_megatron.model.initialization import BlockInitializer
from more_megatron.model.micro_batch import Pass

# In front of the names of figures.
ROUTER_KINDS = ("value ", "output ")


class SwitchHeadAttention(MegatronModule):
    """Causal self-attention with experts for values and outputs. Further arguments of Megatron's are not used."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self._groups = layer_number, pg_collection
        num_experts, balance_coeff = config.switchhead_num_experts, config.switchhead_balance_coeff
        self._is_dense = num_experts == 1
        self._recomputes_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self._balances = {
            kind: EntropyBalance(f"{kind}_balance_loss", balance_coeff, config, pg_collection)
            for kind in ("value", "output")
        }
        column_linear, row_linear = backend_of(config).linears()
        self.core_attention = backend_of(config).core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        hidden, head_dim = config.hidden_size, config.kv_channels
        heads = config.num_attention_heads * head_dim
        column = {"gather_output": False, "skip_bias_add": False, "tp_comm_buffer_name": "qkv"}
        self.query_key = self._linear(column_linear, hidden, 2 * heads, **column)
        self.output_router = HeadRouter(config, num_experts, layer_number, "output")
        if self._is_dense:
            self.value = self._linear(column_linear, hidden, heads, **column)
            row = {"input_is_parallel": True, "skip_bias_add": True, "tp_comm_buffer_name": "proj"}
            self.output = self._linear(row_linear, heads, hidden, **row)
            return
        self.value_router = HeadRouter(config, num_experts, layer_number, "value")
        experts = functools.partial(HeadExperts, config, num_experts, layer_number, pg_collection)
        self.value = experts(name="value", inputs=hidden, outputs=head_dim, fan_in=hidden)
        self.output = experts(name="output", inputs=head_dim, outputs=hidden, fan_in=heads)

    def _linear(self, kind: Any, inputs: int, outputs: int, **options: Any) -> torch.nn.Module:
        std = BlockInitializer(self.config, self.layer_number).scaled_std(inputs)
        return kind(
            inputs,
            outputs,
            config=self.config,
            init_method=functools.partial(torch.nn.init.normal_, std=std),
            bias=False,
            is_expert=False,
            tp_group=self._groups.tp,
            **options,
        )

    def forward(
        self,
        normed: torch.Tensor,
        stream: torch.Tensor,
        current: Pass,
        attention_mask: torch.Tensor | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, [s, b, h] to [s, b, h].

        Args:
            normed: What queries, keys and routers read.
            stream: What values are made of.
            current: The pass.
            attention_mask: True where attention is forbidden; None for plain causal attention.
            rotary_pos_emb: Angles of the rotary embedding, [s, 1, 1, d].
        """
        logits = {"output": self.output_router(normed)}
        if not self._is_dense:
            logits["value"] = self.value_router(normed)
        choices = {kind: self._choice(kind, of_kind, current) for kind, of_kind in logits.items()}
        attend = functools.partial(self.core_attention, attn_mask_type=AttnMaskType.causal)
        if self._recomputes_core and self.training:
            attend = functools.partial(tensor_parallel.checkpoint, attend, False)
        query_and_key = self._query_and_key(normed, rotary_pos_emb)
        context = attend(*query_and_key, self._values(stream, choices.get("value")), attention_mask)
        output = self._outputs(context, choices["output"])
        if self._is_dense or not (self.training and current.in_graph):
            return output
        for kind, of_kind in logits.items():
            output = self._balances[kind].attach(output, sum_over_positions(of_kind), current, self.layer_number)
        return output

    def _query_and_key(self, normed: torch.Tensor, rotary_pos_emb: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return both, [s, b, heads, head_dim]; in the weight each head's query is followed by its key."""
        both = self.query_key(normed)[0].unflatten(-1, (-1, self.config.kv_channels))
        if rotary_pos_emb is not None:
            interleaved = self.config.rotary_interleaved
            both = rotate(both, *rotation_of(rotary_pos_emb, interleaved, both.dtype), interleaved)
        return both.unflatten(-2, (-1, 2)).unbind(-2)

    def _values(self, stream: torch.Tensor, choice: Choice | torch.Tensor | None) -> torch.Tensor:
        """Return [s, b, heads, head_dim]."""
        if not isinstance(choice, Choice):
            return self.value(stream)[0].unflatten(-1, (-1, self.config.kv_channels))
        stream = self._gathered(stream)
        length, batch = stream.shape[:2]
        values = self.value(stream.flatten(0, 1), choice, length * batch * self._local_heads)
        return values.view(length, batch, self._local_heads, -1)

    def _outputs(self, context: torch.Tensor, choice: Choice | torch.Tensor) -> torch.Tensor:
        """Return [s, b, h], given [s, b, heads * head_dim] and experts, or gates of [s, b, heads, 1]."""
        heads = context.unflatten(-1, (self._local_heads, -1))
        if isinstance(choice, torch.Tensor):
            return self.output((heads * choice.to(heads.dtype)).flatten(-2))[0]
        length, batch = heads.shape[:2]
        output = self.output(heads.flatten(0, 2), choice, length * batch).view(length, batch, -1)
        # The sum over all ranks' heads, of this rank's positions.
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self._groups.tp)
        return reduce_from_tensor_model_parallel_region(output, group=self._groups.tp)

    def _choice(self, kind: str, logits: torch.Tensor, current: Pass) -> Choice | torch.Tensor:
        """Return the experts of this rank's heads at all positions, or their gates, [s, b, heads, 1]."""
        local = self._gathered(logits).chunk(self._groups.tp.size(), dim=2)[self._groups.tp.rank()]
        if self._is_dense:
            return local.sigmoid()
        dropout = self.config.switchhead_expert_dropout if self.training else 0.0
        choice = Choice.of(local.flatten(0, 1), self.config.switchhead_topk, dropout)
        if self.training and current.is_counted() and is_routing_reported(current.index):
            record_routing(current.index, logits, choice.loads(self._local_heads), kind=f"{kind} ")
        return choice

    @property
    def _local_heads(self) -> int:
        return self.config.num_attention_heads // self._groups.tp.size()

    def _gathered(self, x: torch.Tensor) -> torch.Tensor:
        """Return all positions. Backward the gradients of all ranks' heads are summed up."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self._groups.tp)
        return copy_to_tensor_model_parallel_region(x, group=self._groups.tp)


def switchhead_cost(config: Any, context: float) -> Cost:
    """Return the cost of the attention over a sequence of length `context`."""
    heads, hidden, num_experts = config.num_attention_heads, config.hidden_size, config.switchhead_num_experts
    width = heads * config.kv_channels
    routers = linear_cost(hidden, heads * num_experts) * (1 if num_experts == 1 else 2)
    projections = (linear_cost(hidden, width) * 2).routed(num_experts, min(config.switchhead_topk, num_experts))
    return linear_cost(hidden, 2 * width) + routers + projections + Cost(once=4.0 * width * context / 2)
