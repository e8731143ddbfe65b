"""Recurrent experts in plain `torch.nn`, for one expert and one sequence at a time: slow and easy to check."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a block: hidden size, attention heads, query groups, width of the MLP."""

    hidden: int
    heads: int
    groups: int
    width: int

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden // self.heads


class ReferenceBlock(nn.Module):
    """Huginn's recurrent block: `u = A [s; x]`, `u = N2(u + Attn(N1(u)))`, `s = N4(u + MLP(N3(u)))`.

    Args:
        shape: Sizes.
        eps: Of the norms.
    """

    def __init__(self, shape: Shape, eps: float) -> None:
        super().__init__()
        self.shape = shape
        hidden, keys = shape.hidden, shape.groups * shape.head_dim
        self.adapter = nn.Linear(2 * hidden, hidden, bias=False)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, keys, bias=False)
        self.value = nn.Linear(hidden, keys, bias=False)
        self.proj = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, shape.width, bias=False)
        self.up = nn.Linear(hidden, shape.width, bias=False)
        self.down = nn.Linear(shape.width, hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, eps=eps) for _ in range(4))

    def forward(
        self, inputs: torch.Tensor, state: torch.Tensor, positions: list[int], no_grad_steps: int, grad_steps: int
    ) -> torch.Tensor:
        """Return the last state of rows that attend to each other, [rows, h]: gradient through the last steps only."""
        for _ in range(no_grad_steps):
            state = self._step(inputs, state, positions).detach()
        for _ in range(grad_steps):
            state = self._step(inputs, state, positions)
        return state

    def _step(self, inputs: torch.Tensor, state: torch.Tensor, positions: list[int]) -> torch.Tensor:
        mixed = self.adapter(torch.cat((state, inputs), dim=1))
        attended = self.norms[1](mixed + self._attention(self.norms[0](mixed), positions))
        normed = self.norms[2](attended)
        gate = self.gate(normed)
        return self.norms[3](attended + self.down(gate * torch.sigmoid(gate) * self.up(normed)))

    def _attention(self, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        shape, place = self.shape, torch.tensor(positions)
        forbidden = place.unsqueeze(0) > place.unsqueeze(1)
        query, key, value = self.query(x), self.key(x), self.value(x)
        heads = []
        for head in range(shape.heads):
            group = head // (shape.heads // shape.groups)
            q, k, v = (
                part[:, index * shape.head_dim : (index + 1) * shape.head_dim]
                for part, index in ((query, head), (key, group), (value, group))
            )
            scores = _rotate(q, place) @ _rotate(k, place).T / math.sqrt(shape.head_dim)
            heads.append(torch.softmax(scores.masked_fill(forbidden, -torch.inf), dim=1) @ v)
        return self.proj(torch.cat(heads, dim=1))

    def packed(self, gradients: bool = False) -> dict[str, torch.Tensor]:
        """Return weights, or their gradients, as a grouped block stores one group."""
        get = (lambda weight: weight.grad) if gradients else (lambda weight: weight.detach())
        shape = self.shape
        query, key, value = (
            get(linear.weight).view(shape.groups, -1, shape.hidden) for linear in (self.query, self.key, self.value)
        )
        return {
            "adapter": get(self.adapter.weight),
            "qkv": torch.cat((query, key, value), dim=1).flatten(0, 1),
            "proj": get(self.proj.weight),
            "fc1": torch.stack((get(self.gate.weight), get(self.up.weight))),
            "fc2": get(self.down.weight),
            **{f"norm_{number}": get(norm.weight) for number, norm in enumerate(self.norms, start=1)},
        }


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_{i + d/2}) by the angle position * 10000^(-2i/d): RoPE (Su et al., arXiv 2104.09864)."""
    half = x.size(1) // 2
    angles = positions.unsqueeze(1) * 10000.0 ** (-torch.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=1
    )


class LightExpert(nn.Module):
    """One hidden layer of twice the hidden size.

    Args:
        hidden: Hidden size.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden, 2 * hidden, bias=False)
        self.outer = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for rows, [rows, h]."""
        inner = self.inner(x)
        return self.outer(inner * 0.5 * (1.0 + torch.erf(inner / math.sqrt(2.0))))
