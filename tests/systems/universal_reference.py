"""The Universal Transformer in plain PyTorch, one position and one head at a time where that is plainest.

Written from the mathematics of Tensor2Tensor's `universal_transformer_util.py`, independently of the package.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import layer_norm, relu

_EPS = 1e-6


@dataclass(frozen=True)
class Outcome:
    """What a forward pass gives."""

    logits: torch.Tensor  # [b, s, vocabulary]
    steps: torch.Tensor  # passes until a position halts, [s, b]
    remainder: torch.Tensor  # weight of the last of them, 0 if it never halts, [s, b]
    halted: torch.Tensor  # whether it halts, [s, b]

    def ponder_cost(self) -> torch.Tensor:
        """Return the mean of steps and remainder."""
        return (self.steps + self.remainder).mean()


@dataclass(frozen=True)
class Universal:
    """One model."""

    weights: dict[str, torch.Tensor]  # parameters by Megatron's names
    heads: int  # attention heads
    layers: int = 1  # layers of the group
    topk: int = 0  # experts of a token; 0: the feed-forward part is dense
    post_norm: bool = False  # norms behind the residual sums
    sinusoid_time: bool = False  # whether the time signal is the sinusoid
    halting: str = "accumulated"  # "accumulated", "basic" or "none"
    epsilon: float = 0.01  # of halting

    def __call__(self, embeddings: torch.Tensor, no_grad_steps: int, grad_steps: int) -> Outcome:
        """Compute the logits of embeddings, [s, b, h]."""
        length, batch, hidden = embeddings.shape
        start = state = embeddings * math.sqrt(hidden)
        positions = torch.stack([self._sinusoid(p, hidden) for p in range(length)]).unsqueeze(1)
        output = torch.zeros_like(state)
        total, remainder, steps = (torch.zeros(length, batch) for _ in range(3))
        halted = torch.zeros(length, batch, dtype=torch.bool)
        for step in range(no_grad_steps + grad_steps):
            entering = state + positions + self._time(step, hidden)
            if self.halting == "none":
                state = output = self._group(entering)
                entered = torch.ones_like(total)
            else:
                scores = entering @ self.weights["decoder.loops.0.halting.weight"][0]
                p = torch.sigmoid(scores + self.weights["decoder.loops.0.halting.bias"])
                ends = ~halted & (total + p > 1 - self.epsilon)
                continues = ~halted & ~ends
                weight = torch.zeros_like(p)
                weight[ends] = (1 - total)[ends]
                weight[continues] = p[continues]
                remainder = remainder + torch.where(ends, 1 - total, 0.0)
                total = total + torch.where(continues, p, 0.0)
                steps = steps + (~halted).float()
                halted = halted | ends
                state = self._group(entering)
                # How much of the output goes back to where the stream began.
                past = torch.zeros_like(p) if step == 0 else entered
                kept = 1.0 if self.halting == "accumulated" else 1 - weight
                output = output * (kept if isinstance(kept, float) else kept.unsqueeze(-1))
                output = output + weight.unsqueeze(-1) * state
                entered = past * kept + weight
            if step < no_grad_steps:
                # Increments are constants; the stream is not.
                state = start + (state - start).detach()
                passed = entered.detach().unsqueeze(-1) * start
                output = passed + (output - passed).detach()
                total, remainder, entered = total.detach(), remainder.detach(), entered.detach()
        if not self.post_norm:
            output = self._norm(output, "decoder.final_layernorm")
        logits = (output @ self.weights["output_layer.weight"].T).transpose(0, 1)
        return Outcome(logits, steps, remainder, halted)

    @staticmethod
    def _sinusoid(place: int, hidden: int) -> torch.Tensor:
        half = hidden // 2
        angles = [place * 10 ** (-4 * i / (half - 1)) for i in range(half)]
        return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])

    def _time(self, step: int, hidden: int) -> torch.Tensor:
        if self.sinusoid_time:
            return self._sinusoid(step, hidden)
        return math.sqrt(hidden) * self.weights["decoder.loops.0.signals.time"][step]

    def _group(self, state: torch.Tensor) -> torch.Tensor:
        for layer in range(self.layers):
            name = f"decoder.layers.{layer}"
            if self.post_norm:
                state = self._norm(state + self._attention(state, name), f"{name}.post_attention_norm")
                state = self._norm(state + self._ffn(state, name), f"{name}.post_mlp_norm")
            else:
                state = state + self._attention(self._norm(state, f"{name}.input_layernorm"), name)
                state = state + self._ffn(self._norm(state, f"{name}.pre_mlp_layernorm"), name)
        return state

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], _EPS)

    def _attention(self, x: torch.Tensor, name: str) -> torch.Tensor:
        size = x.shape[-1] // self.heads
        qkv = (x @ self.weights[f"{name}.self_attention.linear_qkv.weight"].T).unflatten(-1, (self.heads, 3, size))
        heads = []
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        for head in range(self.heads):
            query, key, value = (qkv[:, :, head, part].transpose(0, 1) for part in range(3))
            scores = query @ key.transpose(1, 2) / math.sqrt(size)
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
        joined = torch.cat(heads, dim=-1).transpose(0, 1)
        return joined @ self.weights[f"{name}.self_attention.linear_proj.weight"].T

    def _ffn(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.topk > 0:
            return self._experts(x, name)
        fc1, fc2 = f"{name}.mlp.linear_fc1", f"{name}.mlp.linear_fc2"
        hidden = relu(x @ self.weights[f"{fc1}.weight"].T + self.weights[f"{fc1}.bias"])
        return hidden @ self.weights[f"{fc2}.weight"].T + self.weights[f"{fc2}.bias"]

    def _experts(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scores, chosen = (x @ self.weights[f"{name}.mlp.router.weight"].T).topk(self.topk, dim=-1)
        scores = scores.softmax(-1)
        rows = []
        for token, weights, experts in zip(x.flatten(0, 1), scores.flatten(0, 1), chosen.flatten(0, 1), strict=True):
            row = torch.zeros_like(token)
            for weight, expert in zip(weights, experts.tolist(), strict=True):
                part = f"{name}.mlp.experts.local_experts.{expert}"
                hidden = relu(self.weights[f"{part}.linear_fc1.weight"] @ token)
                row = row + weight * (self.weights[f"{part}.linear_fc2.weight"] @ hidden)
            rows.append(row)
        return torch.stack(rows).view_as(x)
