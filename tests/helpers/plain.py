"""Parts of transformers in plain PyTorch, written from the papers: what slow references of whole models are made of."""

import math

import torch
from torch.nn import functional

Weights = dict[str, torch.Tensor]


class PlainModel:
    """Norms, causal attention with rotary positions, gated MLPs and experts, on hidden states [b, s, h].

    Args:
        weights: By the names in Megatron's model.
        heads: Attention heads.
        rotary_base: Base of the rotary angles.
        interleaved: Whether neighbouring channels are turned together; else those half a head apart.
        epsilon: Added to the variance.
        topk: Experts of a token.
    """

    def __init__(
        self, weights: Weights, heads: int, *, rotary_base: float, interleaved: bool, epsilon: float, topk: int = 2
    ) -> None:
        self.weights, self._heads, self._epsilon, self._topk = weights, heads, epsilon, topk
        self._base, self._interleaved = rotary_base, interleaved

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return the RMSNorm of that name in the decoder."""
        variance = x.square().mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self._epsilon) * self.weights[f"decoder.{name}.weight"]

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the attention of that name in the decoder, whose queries have keys of their own."""
        qkv = x @ self.weights[f"decoder.{name}.linear_qkv.weight"].T
        bias = self.weights.get(f"decoder.{name}.linear_qkv.bias")
        qkv = (qkv if bias is None else qkv + bias).view(*x.shape[:2], self._heads, 3, -1).transpose(1, 2)
        query, key, value = self._rotated(qkv[..., 0, :]), self._rotated(qkv[..., 1, :]), qkv[..., 2, :]
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.size(-1))
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        return context.transpose(1, 2).flatten(2) @ self.weights[f"decoder.{name}.linear_proj.weight"].T

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Turn pairs of channels, [b, heads, s, d], by the angle of their position."""
        length, channels = x.shape[-2:]
        frequencies = self._base ** (-torch.arange(0, channels, 2) / channels)
        turn = torch.polar(torch.ones(length, channels // 2), torch.outer(torch.arange(length), frequencies))
        pairs = x.unflatten(-1, (-1, 2)) if self._interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        return (turned if self._interleaved else turned.transpose(-1, -2)).flatten(-2)

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the gated MLP of that name in the decoder, or the mixture of experts."""
        if f"decoder.{name}.linear_fc1.weight" in self.weights:
            return self._gated(f"decoder.{name}", x)
        router = self.weights[f"decoder.{name}.router.weight"]
        chosen, experts = (x @ router.T).topk(self._topk)
        weights = torch.zeros(*x.shape[:2], len(router)).scatter(-1, experts, chosen.softmax(-1))
        names = [f"decoder.{name}.experts.local_experts.{expert}" for expert in range(len(router))]
        outputs = [self._gated(expert, x) for expert in names]
        return (torch.stack(outputs, dim=-1) * weights.unsqueeze(-2)).sum(-1)

    def _gated(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.weights[f"{name}.linear_fc1.weight"].T).chunk(2, dim=-1)
        return (functional.silu(gate) * up) @ self.weights[f"{name}.linear_fc2.weight"].T
