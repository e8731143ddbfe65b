"""Which experts a token is sent to, the rows that go there, and what is kept of the decisions of a call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fields import Config


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
        if config.router_score_function != "softmax":
            probs, experts = self.best(router_scores(config, logits))
            if config.num_experts_per_tok > 1:
                probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        elif config.router_pre_softmax:
            probs, experts = self._topk(router_scores(config, logits))
        else:
            logits_of_best, experts = self._topk(logits)
            probs = logits_of_best.softmax(-1, dtype=torch.float32)
        return self.scaled(probs, logits), experts

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen experts, and these, where a bias may take part in the choice."""
        bias = 0.0 if self.expert_bias is None else self.expert_bias.float()
        experts = self._topk(scores + bias)[1]
        return scores.gather(-1, experts), experts

    def scaled(self, probs: Tensor, logits: Tensor) -> Tensor:
        """Return routing probabilities by their factor, in the type of the logits."""
        return (probs * (self.config.router_scaling_factor or 1.0)).to(logits.dtype)

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

    Given are routing probabilities and experts, [b, s, k] each, and the number of experts.

    Attributes:
        shape: (b, k, s), in which rows stand before they are sorted.
        chosen: Experts, [b, s, k].
        order: Place of each row before.
        restore: Row of each place before.
        experts: Expert of each row.
        tokens: Token of each row, sequence by sequence.
        ends: End of each expert's rows, int32.
        probs: Routing probability of each row, [rows, 1].
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
        tokens = torch.arange(batch * length, device=experts.device).view(batch, 1, length).expand(self.shape)
        self.tokens = tokens.flatten()[self.order]
        self.probs = probs.transpose(1, 2).flatten()[self.order].unsqueeze(-1)

    def select(self, places: Tensor) -> tuple[Routing, Tensor]:
        """Return the routing of some tokens, n of b s, as one sequence, and which of the rows here its rows are."""
        probs, experts = (part.flatten(0, 1)[places].unsqueeze(0) for part in (self._weights, self.chosen))
        made = Routing(probs, experts, len(self.ends))
        rows = self.restore.view(self.shape).transpose(1, 2).flatten(0, 1)[places]
        return made, rows.t().flatten()[made.order]

    def unsorted(self, rows: Tensor) -> Tensor:
        """Return rows as they stand before they are sorted, [b, k, s, any]."""
        return rows[self.restore].unflatten(0, self.shape)

    def dispatch(self, x: Tensor) -> Tensor:
        """Return the row of each token and expert, [rows, h], given [b, s, h]."""
        return x.flatten(0, 1)[self.tokens]

    def combine(self, rows: Tensor) -> Tensor:
        """Return the sum over the experts of each token, [b, s, h]."""
        return self.unsorted(rows).sum(1)

    def weigh(self, rows: Tensor) -> Tensor:
        """Return rows times routing probabilities."""
        return (rows * self.probs).to(rows.dtype)


class RouterLogits(tuple):
    """Logits of each decision, [b s, N], in the order of computation: a tuple that knows where each was made.

    Attributes:
        layers: Layer of each, from 0.
        steps: Recurrence step of each, from 0.
        routers: Name of the router of each.
        batch: Number of sequences of the call.
    """

    layers: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    routers: tuple[str, ...] = ()
    batch: int = 1

    @classmethod
    def of(cls, decisions: Sequence[tuple[Tensor, int, int, str]], batch: int) -> RouterLogits:
        """Return those of decisions: logits, layer, step and router."""
        made = cls(logits for logits, *_ in decisions)
        _, made.layers, made.steps, made.routers = zip(*decisions, strict=True) if decisions else ((),) * 4
        made.batch = batch
        return made

    def by_layer(self, router: str | None = None) -> dict[int, Tensor]:
        """Return the logits of all steps of each layer that has the router, by default its first, [steps, b, s, N]."""
        steps: dict[int, dict[int, Tensor]] = {}
        for logits, layer, step, name in zip(self, self.layers, self.steps, self.routers, strict=True):
            if router in (None, name):
                steps.setdefault(layer, {}).setdefault(step, logits.unflatten(0, (self.batch, -1)))
        return {layer: torch.stack([found[step] for step in sorted(found)]) for layer, found in steps.items()}

    def at(self, layer: int, step: int = 0, router: str | None = None) -> Tensor:
        """Return the logits of one decision; a `KeyError` is raised if it was not made, or there are several."""
        places = zip(self, self.layers, self.steps, self.routers, strict=True)
        found = [logits for logits, *place, name in places if place == [layer, step] and router in (None, name)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} routing decisions in layer {layer}, step {step}, router {router}")
        return found[0]


def load_balancing_loss(router_logits: Iterable[Tensor], config: Config, mask: Tensor | None) -> Tensor:
    """Return the balance loss of the Switch Transformer (arXiv 2101.03961, equation 4), the mean over decisions.

    It is 1 if experts get the same share of tokens and of probability. Padding, 0 in the mask, [b, T], is not counted.
    """
    losses = []
    for logits in router_logits:
        scores = router_scores(config, logits)
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(config.num_experts_per_tok, dim=-1)[1], 1.0)
        counted = scores.new_ones(len(scores), 1)
        if mask is not None:
            counted = mask[:, -(len(scores) // len(mask)) :].reshape(-1, 1).to(scores)
        tokens = counted.sum().clamp(min=1.0)
        load = (chosen * counted).sum(0) / (tokens * config.num_experts_per_tok)
        losses.append(config.num_experts * (load * (scores * counted).sum(0) / tokens).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
