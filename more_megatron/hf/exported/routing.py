"""Which experts a token is sent to, and the rows that go there."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import Config

__all__ = ["MoRERouter", "Routing", "averaged_logits", "router_scores"]


def averaged_logits(config: Config, logits: Tensor, *former: Tensor) -> Tensor:
    """Return logits averaged over steps: l_t = beta l_{t-1} + (1 - beta) W s_t, and l_0 = W s_0.

    Args:
        config: Model configuration; `router_logit_ema` is beta.
        logits: Those of this step, [b, s, N].
        former: Those of the step before, if there was one.
    """
    beta = config.router_logit_ema
    return beta * former[0] + (1.0 - beta) * logits if former and beta > 0.0 else logits


def router_scores(config: Config, logits: Tensor) -> Tensor:
    """Return how well each expert suits each token, in float32, before any choice."""
    wide = logits.float()
    if config.router_score_function == "softmax":
        return wide.softmax(-1)
    return wide.sigmoid() if config.router_score_function == "sigmoid" else F.softplus(wide).sqrt()


class MoRERouter(nn.Module):
    """Chooses the experts of each token: Megatron's top-k router."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.linear_bias else None
        bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if config.router_expert_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of [b, s, h], [b, s, N], in the router's own type."""
        dtype = {"fp32": torch.float32, "fp64": torch.float64, None: x.dtype}[self.config.router_dtype]
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routing probabilities and the experts of each token, [b, s, k] each."""
        config = self.config
        if config.router_score_function == "softmax":
            scores = router_scores(config, logits) if config.router_pre_softmax else logits
            probs, experts = self._topk(scores)
            if not config.router_pre_softmax:
                probs = probs.softmax(-1, dtype=torch.float32)
        else:
            scores = router_scores(config, logits)
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
        self.chosen, self._weights = experts, probs
        unsorted = experts.transpose(1, 2).flatten()
        self.order = unsorted.argsort(stable=True)
        self.restore = self.order.argsort()
        self.experts = unsorted[self.order]
        numbers = torch.arange(num_experts, device=experts.device)
        self.ends = torch.searchsorted(self.experts, numbers, right=True, out_int32=True)
        self.probs = probs.transpose(1, 2).flatten()[self.order].unsqueeze(-1)

    def select(self, places: Tensor) -> tuple[Routing, Tensor]:
        """Return the routing of some tokens, n of b s, as one sequence, and which of the rows here its rows are."""
        probs, experts = (part.flatten(0, 1)[places].unsqueeze(0) for part in (self._weights, self.chosen))
        made = Routing(probs, experts, len(self.ends))
        rows = self.restore.view(self.shape).transpose(1, 2).flatten(0, 1)[places]
        return made, rows.t().flatten()[made.order]

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
