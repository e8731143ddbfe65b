"""MoRE (Mixture of Recurrent Experts) models for Hugging Face transformers.

Every system of the training code, computing in evaluation what the training code computes. Depends on torch and
transformers only: exports carry this file. Calls take, beside what every causal language model takes:

- `num_steps`: recurrence steps r. Default: `mean_recurrence` of the configuration. Without effect on "moe".
- `input_states`: initial states of the recurrences, [layers, b, s, h]. Default: noise that depends on the seed, layer,
  position and channel only, so that a text has the same logits in every call.
- `init_scale`: factor on the standard deviation of that noise.

"moe" and "recurrent_moe" have no initial states. The letters in shapes: b sequences, s tokens of this call, T tokens
with those in the cache, k experts a token is sent to, N experts, h hidden size, d head size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .configuration_more import MoREConfig

__all__ = ["MoREForCausalLM", "MoREModel", "MoREPreTrainedModel"]

# Newer releases of transformers call it `cache`.
_CACHE_FIELD = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


# Initial states


def _signed(value: int, bits: int = 64) -> int:
    """Return the low bits of `value` as a signed integer, which is what tensors hold."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_SPLITMIX = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))
_LOWBIAS = ((16, _signed(0x7FEB352D, 32)), (15, _signed(0x846CA68B, 32)), (16, 1))
_CHANNEL_INCREMENT = _signed(0x9E3779B9, 32)


def state_noise(positions: Tensor, channels: int, seed: int, layer: int, std: float) -> Tensor:
    """Return normally distributed initial states in float32, [..., channels], each number a hash of its coordinates.

    SplitMix64 (Steele et al., OOPSLA 2014) makes a key of seed, layer (from 1) and position; its halves and the
    channel, mixed by Wellons' lowbias32, give two uniform numbers, and these two normal ones (Box and Muller, 1958).
    """
    keys = _mix(torch.full_like(positions, _signed(seed)), _SPLITMIX, 64)
    # In evaluation all sequences are sample 0.
    for coordinate in (torch.full_like(positions, layer), torch.zeros_like(positions), positions):
        keys = _mix(keys + coordinate * _INCREMENT + _INCREMENT, _SPLITMIX, 64)
    pairs = torch.arange(1, channels // 2 + 1, dtype=torch.int32, device=positions.device) * _CHANNEL_INCREMENT
    halves = (keys.to(torch.int32), (keys >> 32).to(torch.int32))
    radius, angle = (_uniform(_mix(half.unsqueeze(-1) + pairs, _LOWBIAS, 32)) for half in halves)
    radius, angle = (radius.log() * (-2.0 * std * std)).sqrt(), angle * (2.0 * math.pi)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)


def _mix(state: Tensor, rounds: tuple[tuple[int, int], ...], width: int) -> Tensor:
    """Scramble integers: in each round xor with a right shift, then multiply."""
    for shift, factor in rounds:
        # The shift of a signed integer keeps its sign; the mask takes the copies of it away.
        state = (state ^ ((state >> shift) & ((1 << (width - shift)) - 1))) * factor
    return state


def _uniform(bits: Tensor) -> Tensor:
    """Return 24 of 32 random bits as numbers in (0, 1), all of them exact in float32."""
    return (((bits >> 8) & ((1 << 24) - 1)).to(torch.float32) + 0.5) * 2.0**-24


# Parts of layers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class MoRERMSNorm(nn.Module):
    """RMSNorm of the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed `x`."""
        return rms_norm(x, self.weight, self.eps)


def _norm(config: MoREConfig, size: int) -> nn.Module:
    kind = MoRERMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


def rotation(config: MoREConfig, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return cosine and sine of the rotary embedding's angles (Su et al., arXiv 2104.09864), [b, s, planes] each."""
    if config.position_embedding != "rope":
        return None
    size = int(config.head_dim * config.rotary_percent)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling_factor is not None:
        frequencies = _stretch(frequencies, config.rope_scaling_factor)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def _stretch(frequencies: Tensor, factor: float, context: int = 8192) -> Tensor:
    """Slow down the frequencies that turn less than four times in the context, as Llama 3.1 does."""
    turns = context * frequencies / (2.0 * math.pi)
    kept = ((turns - 1.0) / 3.0).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / factor)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor] | None, interleaved: bool) -> Tensor:
    """Rotate the leading channels of [b, ..., s, d]; a plane is two neighbouring channels, or one of each half."""
    if rotation is None:
        return x
    batch, length, planes = rotation[0].shape
    cos, sin = (part.to(x.dtype).view(batch, *(1,) * (x.dim() - 3), length, planes) for part in rotation)
    turned, rest = x[..., : 2 * planes], x[..., 2 * planes :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention of [b, heads, rows, d] to [b, groups, keys, d] where the mask is True; None: causal."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.size(2) > 1,
        enable_gqa=query.size(1) != key.size(1),
    )


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Apply to each group of rows, [rows, in] sorted by group, its map of [groups, out, in], all groups at once.

    `ends` is the end of each group's rows, int32 [groups].
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if _has_grouped_kernel(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return _padded_linear(rows, weight, ends)


def _has_grouped_kernel(rows: Tensor, weight: Tensor) -> bool:
    known = rows.device.type in ("cpu", "cuda") and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not (hasattr(F, "grouped_mm") and known):
        return False
    # The kernels want rows of weights and of activations to begin at multiples of 16 bytes.
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    aligned = aligned and all(tensor.data_ptr() % 16 == 0 for tensor in (rows, weight))
    return aligned and (rows.device.type == "cpu" or torch.cuda.get_device_capability(rows.device) >= (8, 0))


def _padded_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Compute `grouped_linear` as a batched product over groups padded to the size of the largest."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
    longest, device = int(counts.max()), rows.device
    group = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=len(rows))
    places = group * longest + torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[group]
    padded = rows.new_zeros(len(counts) * longest, rows.size(1)).index_copy(0, places, rows)
    return torch.bmm(padded.view(len(counts), longest, -1), weight.transpose(1, 2)).flatten(0, 1)[places]


# What layers are told


@dataclass(frozen=True)
class CallContext:
    """What every layer knows about one call of the model.

    Attributes:
        positions: Position of each token, [b or 1, s].
        rotation: Cosine and sine of its angles; None without rotary embedding.
        padding: True for padding, [b, T]; None without any.
        past: Number of tokens in the cache.
        num_steps: Recurrence steps.
        state_std: Standard deviation of initial states.
        input_states: Initial states, [layers, b, s, h]; None for noise.
    """

    positions: Tensor
    rotation: tuple[Tensor, Tensor] | None
    padding: Tensor | None
    past: int
    num_steps: int
    state_std: float
    input_states: Tensor | None

    @property
    def mask(self) -> Tensor | None:
        """The keys that each token sees, [b, 1, s, T]; None where the plain causal kernel does."""
        plain = self.padding is None and (self.past == 0 or self.positions.size(1) == 1)
        return None if plain else self.visible

    @functools.cached_property
    def visible(self) -> Tensor:
        """The keys that each token sees, True for these, [b or 1, 1, s, T].

        A token sees itself even if it is padding: a row of a softmax must not be empty.
        """
        length, device = self.positions.size(1), self.positions.device
        query = torch.arange(self.past, self.past + length, device=device).unsqueeze(1)
        key = torch.arange(self.past + length, device=device)
        visible = (key <= query)[None, None]
        if self.padding is not None:
            visible = visible & ~self.padding[:, None, None] | (key == query)
        return visible

    def initial_state(self, config: MoREConfig, layer_idx: int, like: Tensor) -> Tensor:
        """Return the state that a layer's recurrence starts from, shaped and typed as `like`, [b, s, h]."""
        if self.input_states is not None:
            return self.input_states[layer_idx].to(like)
        noise = state_noise(self.positions, config.hidden_size, config.noise_seed, layer_idx + 1, self.state_std)
        return noise.to(like.dtype).expand_as(like)

    def to(self, device: torch.device, **kwargs: Any) -> CallContext:
        """Return a copy on another device, which is how accelerate hands arguments to layers that live there."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(move(part) for part in value)
            return value.to(device, **kwargs) if isinstance(value, Tensor) else value

        return CallContext(**{field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)})


@dataclass(frozen=True)
class LayerCache:
    """The layers of a cache that one layer of the model owns.

    The first holds keys and values of ordinary attention; then, where experts attend, one the experts that tokens were
    sent to; then one each recurrence step's keys and values, which differ from step to step.

    Attributes:
        cache: The whole cache; None without one.
        first: Index of the layer's first.
    """

    cache: Cache | None
    first: int

    def extend(self, keys: Tensor, values: Tensor, entry: int) -> tuple[Tensor, Tensor]:
        """Append [b, any, s, any] to an entry and return all of it, [b, any, T, any]."""
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, self.first + entry)


def cache_entries(config: MoREConfig, layer_idx: int, num_steps: int) -> int:
    """Return how many layers of a cache a layer of the model owns."""
    if not config.moe_layers[layer_idx] or config.variant in ("moe", "recurrent_moe"):
        return 1
    return num_steps + (1 if config.variant == "shared_block_ffn" else 2)


def prepare_cache(cache: Cache, config: MoREConfig, num_steps: int) -> None:
    """Give a cache the layers that a call needs, which are more than the model has.

    Raises:
        ValueError: If the cache cannot grow, or was filled with another number of steps.
    """
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(f"a {type(cache).__name__} cannot hold the states of a MoRE model: use a DynamicCache")
    filled = getattr(cache, "num_steps", num_steps)
    if filled != num_steps and config.variant != "moe":
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"the cache was filled with num_steps={filled}, and this call has num_steps={num_steps}: "
                "use the same number or start with an empty cache"
            )
        cache.layers.clear()
    setattr(cache, "num_steps", num_steps)  # noqa: B010
    needed = sum(cache_entries(config, layer_idx, num_steps) for layer_idx in range(config.num_hidden_layers))
    cache.layers.extend(DynamicLayer() for _ in range(needed - len(cache.layers)))


# Attention and MLP


class MoREAttention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__()
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = nn.Linear(hidden, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(hidden, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.linear_bias)
        self.q_norm = _norm(config, size) if config.qk_norm else nn.Identity()
        self.k_norm = _norm(config, size) if config.qk_norm else nn.Identity()

    def forward(self, hidden_states: Tensor, context: CallContext, memory: LayerCache) -> Tensor:
        """Return what each token gathers from those before it, [b, s, h]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in projections
        )
        query = rotate(self.q_norm(query), context.rotation, self.config.rotary_interleaved)
        key = rotate(self.k_norm(key), context.rotation, self.config.rotary_interleaved)
        key, value = memory.extend(key, value, entry=0)
        return self.o_proj(attend(query, key, value, context.mask).transpose(1, 2).flatten(2))


class MoREMLP(nn.Module):
    """Feed-forward network of a layer without experts, or shared expert."""

    def __init__(self, config: MoREConfig, width: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.linear_bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., h]."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


# Routing


def _scores(config: MoREConfig, logits: Tensor) -> Tensor:
    """Return how well each expert suits each token, in float32, before any choice."""
    wide = logits.float()
    if config.router_score_function == "softmax":
        return wide.softmax(-1)
    return wide.sigmoid() if config.router_score_function == "sigmoid" else F.softplus(wide).sqrt()


class MoRERouter(nn.Module):
    """Chooses the experts of each token: Megatron's top-k router."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.linear_bias else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if config.router_expert_bias else None

    def forward(self, x: Tensor, former_logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of [b, s, h], [b, s, N] in the router's own type, and probabilities and experts, [b, s, k].

        With weight beta of the former logits: l_t = beta l_{t-1} + (1 - beta) W s_t, and l_0 = W s_0.
        """
        dtype = {"fp32": torch.float32, "fp64": torch.float64, None: x.dtype}[self.config.router_dtype]
        bias, beta = None if self.bias is None else self.bias.to(dtype), self.config.router_logit_ema
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype), bias)
        if former_logits is not None and beta > 0.0:
            logits = beta * former_logits + (1.0 - beta) * logits
        return (logits, *self._choose(logits))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routing probabilities and the experts of each token, [b, s, k] each."""
        config = self.config
        if config.router_score_function == "softmax":
            scores = _scores(config, logits) if config.router_pre_softmax else logits
            probs, experts = self._topk(scores)
            if not config.router_pre_softmax:
                probs = probs.softmax(-1, dtype=torch.float32)
        else:
            scores = _scores(config, logits)
            bias = 0.0 if self.expert_bias is None else self.expert_bias.float()
            experts = self._topk(scores + bias)[1]
            probs = scores.gather(-1, experts)
            if config.num_experts_per_tok > 1:
                probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        return (probs * (config.router_scaling_factor or 1.0)).to(logits.dtype), experts

    def _topk(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the highest scores and their experts, within the best groups of experts if these are limited."""
        topk, group_topk = self.config.num_experts_per_tok, self.config.router_group_topk
        if group_topk:
            grouped = scores.unflatten(-1, (self.config.router_num_groups, -1))
            best = grouped.topk(topk // group_topk, dim=-1)[0].sum(-1).topk(group_topk, dim=-1)[1]
            allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, True)
            scores = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
        return scores.topk(topk, dim=-1)


class Routing:
    """The rows that go to experts: each token once for each of its experts, sorted by expert.

    Args:
        probs: Routing probabilities, [b, s, k].
        experts: Experts, [b, s, k].
        num_experts: Number of experts.
    """

    def __init__(self, probs: Tensor, experts: Tensor, num_experts: int) -> None:
        batch, length, topk = experts.shape
        self.shape = (batch, topk, length)
        self.chosen = experts
        unsorted = experts.transpose(1, 2).flatten()
        self.order = unsorted.argsort(stable=True)
        self.restore = self.order.argsort()
        self.experts = unsorted[self.order]
        self.ends = torch.bincount(unsorted, minlength=num_experts).cumsum(0).to(torch.int32)
        self.probs = probs.transpose(1, 2).flatten()[self.order].unsqueeze(-1)

    def dispatch(self, x: Tensor) -> Tensor:
        """Return the row of each token and expert, [rows, h], given [b, s, h]."""
        batch, _, length = self.shape
        tokens = torch.arange(batch * length, device=x.device).view(batch, 1, length).expand(self.shape)
        return x.flatten(0, 1)[tokens.flatten()[self.order]]

    def combine(self, rows: Tensor) -> Tensor:
        """Return the sum over the experts of each token, [b, s, h]."""
        return rows[self.restore].unflatten(0, self.shape).sum(1)

    def weigh(self, rows: Tensor) -> Tensor:
        """Return rows times routing probabilities."""
        return (rows * self.probs).to(rows.dtype)


# Experts


class FeedForwardExperts(nn.Module):
    """Megatron's experts: MLPs."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gated, inner = config.gated_mlp, width * (2 if config.gated_mlp else 1)
        self.up_name = "gate_up_proj" if config.gated_mlp else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(experts, inner, hidden)))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        up_bias = nn.Parameter(torch.empty(experts, inner)) if config.linear_bias else None
        self.register_parameter(f"{self.up_name}_bias", up_bias)
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden)) if config.linear_bias else None
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h]."""
        inner = grouped_linear(rows, getattr(self, self.up_name), routing.ends)
        if self.down_proj_bias is not None:
            inner = inner + getattr(self, f"{self.up_name}_bias")[routing.experts]
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        output = grouped_linear(routing.weigh(inner), self.down_proj, routing.ends)
        if self.down_proj_bias is not None:
            output = output + routing.weigh(self.down_proj_bias[routing.experts])
        return output


class LightExperts(nn.Module):
    """Expert i computes `W2_i . GELU(W1_i . x)`, h -> 2h -> h."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_size
        self.fc1 = nn.Parameter(torch.empty(experts, 2 * hidden, hidden))
        self.fc2 = nn.Parameter(torch.empty(experts, hidden, 2 * hidden))

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """Return weighted outputs, [rows, h]."""
        inner = F.gelu(grouped_linear(rows, self.fc1, routing.ends))
        return routing.weigh(grouped_linear(inner, self.fc2, routing.ends))


class ProjectionExperts(nn.Module):
    """Expert i computes `W_out_i . R(W_in_i . x)`, where R is the block that all experts share."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__()
        shape = (config.num_experts, config.hidden_size, config.hidden_size)
        self.proj_in, self.proj_out = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))

    def forward(self, rows: Tensor, routing: Routing, block: Callable[[Tensor], Tensor]) -> Tensor:
        """Return weighted outputs, [rows, h]."""
        state = block(grouped_linear(rows, self.proj_in, routing.ends))
        return routing.weigh(grouped_linear(state, self.proj_out, routing.ends))


@dataclass(frozen=True)
class BlockRows:
    """The rows that a recurrent block works on.

    Attributes:
        shape: (b, k, s): each token is k rows.
        mask: Keys that each row sees, [b, 1, k s, k T]; None where the plain causal kernel does.
        rotation: Cosine and sine of each token's angles.
        memory: Where keys and values are kept.
        first_entry: Entry of the first step.
        routing: Where the rows are sorted by expert; None if they are in the order of `shape`.
    """

    shape: tuple[int, int, int]
    mask: Tensor | None
    rotation: tuple[Tensor, Tensor] | None
    memory: LayerCache
    first_entry: int
    routing: Routing | None


class RecurrentBlock(nn.Module):
    """Huginn's recurrent block (Geiping et al., arXiv 2502.05171, section 3), one for all rows or one for each expert.

        u <- Adapter([s; x]),   u <- N2(u + Attn(N1(u))),   s <- N4(u + MLP(N3(u)))

    Args:
        config: Model configuration.
        experts: Number of blocks; None: one for all rows.
        follows_layers: Whether norms and biases are those of the layers around it.
    """

    adapter: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    fc1: Tensor
    fc2: Tensor

    def __init__(self, config: MoREConfig, experts: int | None = None, follows_layers: bool = False) -> None:
        super().__init__()
        self.config = config
        hidden, width = config.hidden_size, config.recurrent_intermediate_size or 0
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {
            "adapter": (hidden, 2 * hidden),
            # For each key head its queries, then the key, then the value.
            "qkv": ((heads + 2 * groups) * config.head_dim, hidden),
            "proj": (hidden, heads * config.head_dim),
            "fc1": (2, width, hidden),
            "fc2": (hidden, width),
            **{f"norm_{number}": (hidden,) for number in range(1, 5)},
        }
        self.layernorm = follows_layers and config.norm_type == "layernorm"
        if self.layernorm:
            shapes.update({f"norm_{number}_bias": (hidden,) for number in range(1, 5)})
        self.register_parameter("qkv_bias", None)
        if follows_layers and config.attention_bias:
            shapes["qkv_bias"] = shapes["qkv"][:1]
        for name, shape in shapes.items():
            shape = shape if experts is None else (experts, *shape)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor, state: Tensor, rows: BlockRows, num_steps: int) -> Tensor:
        """Return the last state, [rows, h], given what is injected in every step and the first, [rows, h] each."""
        adapter_state, adapter_input = self.adapter.split(self.config.hidden_size, dim=-1)
        injected = self._linear(x, adapter_input, rows)
        for step in range(num_steps):
            mixed = self._linear(state, adapter_state, rows) + injected
            attended = self._attention(self._norm(mixed, 1, rows), rows, step)
            mixed = self._norm(mixed + attended, 2, rows)
            state = self._norm(mixed + self._mlp(self._norm(mixed, 3, rows), rows), 4, rows)
        return state

    def _attention(self, x: Tensor, rows: BlockRows, step: int) -> Tensor:
        config, routing = self.config, rows.routing
        groups = config.num_key_value_heads
        qkv = self._linear(x, self.qkv, rows)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias
        qkv = qkv if routing is None else qkv[routing.restore]
        # [b, groups, queries of a group + 2, k, s, d]
        qkv = qkv.view(*rows.shape, groups, -1, config.head_dim).permute(0, 3, 4, 1, 2, 5)
        query = rotate(qkv[:, :, :-2].flatten(1, 2), rows.rotation, config.rotary_interleaved)
        key = rotate(qkv[:, :, -2], rows.rotation, config.rotary_interleaved)
        extended = rows.memory.extend(key.flatten(1, 2), qkv[:, :, -1].flatten(1, 2), rows.first_entry + step)
        key, value = (part.unflatten(1, (groups, -1)).flatten(2, 3) for part in extended)
        output = attend(query.flatten(2, 3), key, value, rows.mask)
        output = output.unflatten(2, rows.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2)
        return self._linear(output if routing is None else output[routing.order], self.proj, rows)

    def _mlp(self, x: Tensor, rows: BlockRows) -> Tensor:
        gate, up = self._linear(x, self.fc1.flatten(-3, -2), rows).chunk(2, dim=-1)
        return self._linear(F.silu(gate) * up, self.fc2, rows)

    def _linear(self, x: Tensor, weight: Tensor, rows: BlockRows) -> Tensor:
        if weight.dim() == 2 or rows.routing is None:
            return F.linear(x, weight)
        return grouped_linear(x, weight, rows.routing.ends)

    def _norm(self, x: Tensor, number: int, rows: BlockRows) -> Tensor:
        weight, eps = getattr(self, f"norm_{number}"), self.config.norm_eps
        if self.layernorm:
            return F.layer_norm(x, x.shape[-1:], weight, getattr(self, f"norm_{number}_bias"), eps)
        if weight.dim() > 1 and rows.routing is not None:
            weight = weight[rows.routing.experts]
        return rms_norm(x, weight, eps)


# Layers with experts, one class for each system


class MoREMoE(nn.Module):
    """Router, routed experts that are MLPs, and shared expert: "moe", and one step of "recurrent_moe".

    Args:
        config: Model configuration.
        layer_idx: Index of the layer, from 0.
    """

    def __init__(self, config: MoREConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.gate = MoRERouter(config)
        self.build_experts()
        width = config.shared_expert_intermediate_size
        self.shared_expert = MoREMLP(config, width) if width else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def build_experts(self) -> None:
        """Create the routed experts."""
        self.experts: nn.Module = FeedForwardExperts(self.config)

    def forward(
        self, x: Tensor, context: CallContext, memory: LayerCache, former_logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Route, compute and combine.

        Args:
            x: Normed hidden states, [b, s, h].
            context: What the layer knows about the call.
            memory: The layer's part of the cache.
            former_logits: Logits of the step before, which the router averages with; None at the first.

        Returns:
            Output, [b, s, h], and router logits, [b, s, N].
        """
        logits, probs, experts = self.gate(x, former_logits)
        routing = Routing(probs, experts, self.config.num_experts)
        output = routing.combine(self.apply_experts(x, routing, context, memory))
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            output = output + shared
        return self.finish(output, context, memory), logits

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: LayerCache) -> Tensor:
        """Return weighted outputs of the routed experts, [rows, h]."""
        return self.experts(routing.dispatch(x), routing)

    def finish(self, output: Tensor, context: CallContext, memory: LayerCache) -> Tensor:
        """Return what the layer makes of the combined output, [b, s, h]."""
        return output


class MixingMoE(MoREMoE):
    """Experts that let the tokens of a sequence that were sent to them attend to each other, causally."""

    def block_rows(self, routing: Routing, context: CallContext, memory: LayerCache) -> BlockRows:
        """Return the rows that go through a recurrent block: each sees those of its expert that its token sees."""
        topk = routing.shape[1]
        chosen, _ = memory.extend(routing.chosen.unsqueeze(1), routing.chosen.unsqueeze(1), entry=1)
        query, key = routing.chosen.transpose(1, 2).flatten(1), chosen.squeeze(1).transpose(1, 2).flatten(1)
        same = query.unsqueeze(2) == key.unsqueeze(1)
        mask = same.unsqueeze(1) & context.visible.repeat(1, 1, topk, topk)
        return BlockRows(routing.shape, mask, context.rotation, memory, first_entry=2, routing=routing)

    def initial_rows(self, x: Tensor, routing: Routing, context: CallContext) -> Tensor:
        """Return the initial state of each row, [rows, h]."""
        return routing.dispatch(context.initial_state(self.config, self.layer_idx, x))


class RecurrentExpertsMoE(MixingMoE):
    """Each expert is a recurrent block of its own."""

    def build_experts(self) -> None:
        """Create the blocks."""
        self.experts = RecurrentBlock(self.config, self.config.num_experts)

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: LayerCache) -> Tensor:
        """Return weighted last states, [rows, h]."""
        state, rows = self.initial_rows(x, routing, context), self.block_rows(routing, context, memory)
        return routing.weigh(self.experts(routing.dispatch(x), state, rows, context.num_steps))


class SharedBlockMoE(MixingMoE):
    """Experts are projections around one recurrent block."""

    def build_experts(self) -> None:
        """Create the projections and the block."""
        self.experts = ProjectionExperts(self.config)
        self.recurrent_block = RecurrentBlock(self.config)

    def apply_experts(self, x: Tensor, routing: Routing, context: CallContext, memory: LayerCache) -> Tensor:
        """Return weighted projections of the last states, [rows, h]."""
        state, rows = self.initial_rows(x, routing, context), self.block_rows(routing, context, memory)
        block = functools.partial(self.recurrent_block, state=state, rows=rows, num_steps=context.num_steps)
        return self.experts(routing.dispatch(x), routing, block)


class CombinedBlockMoE(MoREMoE):
    """Light experts are combined first; then one recurrent block runs over the whole sequence."""

    def build_experts(self) -> None:
        """Create the light experts and the block."""
        self.experts = LightExperts(self.config)
        self.recurrent_block = RecurrentBlock(self.config, follows_layers=True)

    def finish(self, output: Tensor, context: CallContext, memory: LayerCache) -> Tensor:
        """Return the block's last state, [b, s, h]."""
        shape = (output.size(0), 1, output.size(1))
        rows = BlockRows(shape, context.mask, context.rotation, memory, first_entry=1, routing=None)
        state = context.initial_state(self.config, self.layer_idx, output).flatten(0, 1)
        return self.recurrent_block(output.flatten(0, 1), state, rows, context.num_steps).view_as(output)


_MOE_CLASSES: dict[str, type[MoREMoE]] = {
    "moe": MoREMoE,
    "recurrent_experts": RecurrentExpertsMoE,
    "shared_block": SharedBlockMoE,
    "shared_block_ffn": CombinedBlockMoE,
    "recurrent_moe": MoREMoE,
}


class MoRELayer(GradientCheckpointingLayer):
    """Attention and MLP or experts, each with a norm before it and a residual around it."""

    def __init__(self, config: MoREConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.is_moe = config, config.moe_layers[layer_idx]
        self.input_layernorm = _norm(config, config.hidden_size)
        self.self_attn = MoREAttention(config)
        self.post_attention_layernorm = _norm(config, config.hidden_size)
        moe = _MOE_CLASSES[config.variant]
        self.mlp = moe(config, layer_idx) if self.is_moe else MoREMLP(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, context: CallContext, memory: LayerCache) -> tuple[Tensor, ...]:
        """Return hidden states, [b, s, h], and the logits of each routing decision, [b, s, N]."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), context, memory)
        if not self.is_moe:
            return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)
        iterated = self.config.variant == "recurrent_moe"
        scale = self.config.residual_scale if iterated else 1.0
        decisions: list[Tensor] = []
        for _ in range(context.num_steps if iterated else 1):
            normed = self.post_attention_layernorm(hidden_states)
            output, logits = self.mlp(normed, context, memory, decisions[-1] if decisions else None)
            hidden_states = hidden_states + (output if scale == 1.0 else output * scale)
            decisions.append(logits)
        return (hidden_states, *decisions)


# Models


class MoREPreTrainedModel(PreTrainedModel):
    """What MoRE models have in common."""

    config: MoREConfig
    config_class = MoREConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoRELayer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: MoREConfig) -> None:
        super().__init__(config)
        if config.router_expert_bias:
            self._keep_in_fp32_modules_strict = ["expert_bias"]

    def _asked(self, states: bool | None, logits: bool | None) -> tuple[bool, bool]:
        """Return whether hidden states and router logits are asked for, by the call or else by the configuration."""
        config = self.config
        return (
            bool(config.output_hidden_states if states is None else states),
            bool(config.output_router_logits if logits is None else logits),
        )

    def _as_asked(self, output: Any, return_dict: bool | None) -> Any:
        """Return the output as an object or as a tuple."""
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw the weights a module itself holds that were not loaded, recurrent blocks as the training code does.

        These follow Takase et al. (arXiv 2312.16903) as used in Huginn (arXiv 2502.05171, section 4).
        """
        for name, weight in module.named_parameters(recurse=False):
            if not getattr(weight, "_is_hf_initialized", False):
                self._draw(module, name, weight)

    def _draw(self, module: nn.Module, name: str, weight: Tensor) -> None:
        std = self.config.initializer_range
        if name.endswith("bias"):
            weight.zero_()
        elif isinstance(module, MoRERMSNorm | nn.LayerNorm) or name.startswith("norm_"):
            weight.fill_(1.0)
        elif isinstance(module, ProjectionExperts):
            for matrix in weight:
                matrix.copy_(nn.init.orthogonal_(torch.empty_like(matrix, dtype=torch.float32)))
        elif isinstance(module, RecurrentBlock | LightExperts):
            std = math.sqrt(2.0 / (5.0 * self.config.hidden_size))
            if name in ("proj", "fc2"):
                std /= math.sqrt(2.0 * self.config.num_hidden_layers * self.config.mean_recurrence)
            nn.init.trunc_normal_(weight, std=std, a=-3.0 * std, b=3.0 * std)
        else:
            weight.normal_(0.0, std)


class MoREModel(MoREPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: MoREConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        size = (config.max_position_embeddings, config.hidden_size)
        self.embed_positions = nn.Embedding(*size) if learned else None
        self.layers = nn.ModuleList(MoRELayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = _norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

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
        return_dict: bool | None = None,
        num_steps: int | None = None,
        input_states: Tensor | None = None,
        init_scale: float = 1.0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """Compute hidden states.

        Args:
            input_ids: Tokens, [b, s].
            attention_mask: 0 for padding, on the left or on the right, [b, T].
            position_ids: Positions, [b, s]. Default: counted from the first token that is not padding.
            past_key_values: Cache of the tokens before these.
            inputs_embeds: Embeddings in the place of tokens, [b, s, h].
            use_cache: Whether to fill and return a cache. Default: the configuration's, but not in training.
            output_hidden_states: Whether to return the hidden states between layers.
            output_router_logits: Whether to return the logits of each routing decision, [b s, N], one for each layer
                with experts, and for each step of "recurrent_moe".
            return_dict: Whether to return an object instead of a tuple.
            num_steps: Recurrence steps.
            input_states: Initial states, [layers, b, s, h].
            init_scale: Factor on the standard deviation of initial states.
            cache: The same as `past_key_values`.
            kwargs: Ignored.

        Raises:
            ValueError: If arguments contradict each other, or the cache was filled with another number of steps.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        num_steps = self.config.mean_recurrence if num_steps is None else int(num_steps)
        if num_steps < 1:
            raise ValueError(f"num_steps {num_steps} must be at least 1")
        cache = self._cache(past_key_values if cache is None else cache, use_cache, num_steps)
        context = self._context(hidden_states, attention_mask, position_ids, cache, num_steps, input_states, init_scale)
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(context.positions)
        keep_states, keep_logits = self._asked(output_hidden_states, output_router_logits)
        states: list[Tensor] = []
        decisions: list[Tensor] = []
        first = 0
        for layer_idx, layer in enumerate(self.layers):
            states += [hidden_states] if keep_states else []
            hidden_states, *logits = layer(hidden_states, context, LayerCache(cache, first))
            first += cache_entries(self.config, layer_idx, num_steps)
            decisions += [part.flatten(0, 1) for part in logits] if keep_logits else []
        hidden_states = self.norm(hidden_states)
        fields: dict[str, Any] = {
            "last_hidden_state": hidden_states,
            "hidden_states": (*states, hidden_states) if keep_states else None,
            "router_logits": tuple(decisions) if keep_logits else None,
            _CACHE_FIELD: cache,
        }
        return self._as_asked(MoeModelOutputWithPast(**fields), return_dict)

    def _cache(self, cache: Cache | None, use_cache: bool | None, num_steps: int) -> Cache | None:
        """Return the cache to fill, ready for this call; None for none."""
        if self.training and self.gradient_checkpointing:
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        if cache is not None:
            prepare_cache(cache, self.config, num_steps)
        return cache

    def _context(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        num_steps: int,
        input_states: Tensor | None,
        init_scale: float,
    ) -> CallContext:
        """Return what the layers are told."""
        (batch, length, hidden), device = embeddings.shape, embeddings.device
        past = 0 if cache is None else cache.get_seq_length()
        padding = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + length):
                shape = tuple(attention_mask.shape)
                raise ValueError(f"attention_mask has shape {shape}, and not (b, T) = {(batch, past + length)}")
            padding = attention_mask == 0
            padding = padding.to(device) if bool(padding.any()) else None
        if positions is None and padding is not None:
            positions = ((~padding).long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        elif positions is None:
            positions = torch.arange(past, past + length, device=device).unsqueeze(0)
        shape = (self.config.num_hidden_layers, batch, length, hidden)
        if input_states is not None and input_states.shape != shape:
            raise ValueError(f"input_states has shape {tuple(input_states.shape)}, and not {shape}")
        return CallContext(
            positions=positions.long(),
            rotation=rotation(self.config, positions),
            padding=padding,
            past=past,
            num_steps=num_steps,
            state_std=self.config.state_std * init_scale,
            input_states=input_states,
        )


class MoREForCausalLM(MoREPreTrainedModel, GenerationMixin):
    """A MoRE model with an output layer over the vocabulary."""

    # A mapping since transformers 5, names before; a mapping is both.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoREConfig) -> None:
        super().__init__(config)
        self.model = MoREModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_steps: int | None = None,
        input_states: Tensor | None = None,
        init_scale: float = 1.0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Compute logits, and the loss if there are labels.

        Args:
            labels: Tokens, [b, s]; each is predicted from those before it, so labels are the input. -100: not counted.
            output_router_logits: Whether to return router logits, and to compute the load-balancing loss, which is
                added to the loss with `router_aux_loss_coef`.
            logits_to_keep: Number of last positions to compute logits of, or their indices. Default: all.
            kwargs: For the loss function of transformers, such as `num_items_in_batch`.

        All other arguments are those of `MoREModel`.
        """
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
            num_steps=num_steps,
            input_states=input_states,
            init_scale=init_scale,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if outputs.router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        fields = {name: outputs.get(name) for name in (_CACHE_FIELD, "hidden_states", "router_logits")}
        output = MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **fields)
        return self._as_asked(output, return_dict)


def load_balancing_loss(router_logits: tuple[Tensor, ...], config: MoREConfig, mask: Tensor | None) -> Tensor:
    """Return the balance loss of the Switch Transformer (arXiv 2101.03961, equation 4), the mean over decisions.

    It is 1 if experts get the same share of tokens and of probability.

    Args:
        router_logits: Logits of each decision, [b s, N].
        config: Model configuration.
        mask: 0 for padding, which is not counted, [b, T].
    """
    losses = []
    for logits in router_logits:
        scores = _scores(config, logits)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(config.num_experts_per_tok, dim=-1)[1], 1.0)
        counted = scores.new_ones(len(scores), 1)
        if mask is not None:
            counted = mask[:, -(len(scores) // len(mask)) :].reshape(-1, 1).to(scores)
        tokens = counted.sum().clamp(min=1.0)
        load = (chosen * counted).sum(0) / (tokens * config.num_experts_per_tok)
        losses.append(config.num_experts * (load * (scores * counted).sum(0) / tokens).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


MoREModel.register_for_auto_class("AutoModel")
MoREForCausalLM.register_for_auto_class("AutoModelForCausalLM")
