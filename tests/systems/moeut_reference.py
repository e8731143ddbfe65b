"""MoEUT in plain PyTorch, one sequence, one token, one expert at a time: slow and easy to check."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model."""

    layers: int  # layers of the group
    heads: int  # attention heads
    head_dim: int  # channels of a head
    rotary: int  # channels of a head that are rotated
    head_experts: int  # experts of a head
    head_topk: int  # experts that a head uses
    topk: int  # experts that a token uses


class ReferenceMoEUT:
    """The stack of a model: from embeddings to logits, and the entropy losses.

    Args:
        sizes: Sizes of the model.
        weights: By their names in Megatron's model; they may carry gradient.
    """

    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        self.sizes, self.weights = sizes, weights

    def forward(
        self, embeddings: torch.Tensor, no_grad_passes: int, grad_passes: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the logits, [b, s, V], and for each kind of router the sum over layers of its mean loss.

        Args:
            embeddings: [s, b, h].
            no_grad_passes: Passes whose increments are constants.
            grad_passes: Passes after them.
        """
        logits, losses = [], []
        for sequence in embeddings.unbind(1):
            output, loss = self._sequence(sequence, no_grad_passes, grad_passes)
            logits.append(output)
            losses.append(loss)
        return torch.stack(logits), {kind: sum(loss[kind] for loss in losses) / len(losses) for kind in losses[0]}

    def _sequence(
        self, stream: torch.Tensor, no_grad_passes: int, grad_passes: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        history: dict[str, list[list[torch.Tensor]]] = {
            kind: [[] for _ in range(self.sizes.layers)] for kind in ("expert", "value", "output")
        }
        for index in range(no_grad_passes + grad_passes):
            with torch.set_grad_enabled(index >= no_grad_passes):
                after = stream
                for layer in range(self.sizes.layers):
                    after = self._layer(layer, after, {kind: lists[layer] for kind, lists in history.items()})
            stream = after if index >= no_grad_passes else stream + (after - stream).detach()
        normed = self._norm("decoder.final_layernorm", stream)
        logits = normed @ self.weights["output_layer.weight"].T + self.weights["output_layer.bias"]
        kinds = ("expert",) if self.sizes.head_experts == 1 else ("expert", "value", "output")
        return logits, {kind: sum(map(_minus_entropy, history[kind])) for kind in kinds}

    def _layer(self, layer: int, stream: torch.Tensor, history: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        prefix = f"decoder.layers.{layer}"
        normed = self._norm(f"{prefix}.input_layernorm", stream)
        stream = stream + self._attention(f"{prefix}.self_attention", normed, stream, history)
        normed = self._norm(f"{prefix}.pre_mlp_layernorm", stream)
        return stream + self._experts(f"{prefix}.mlp", normed, stream, history)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5
        )

    def _experts(
        self, prefix: str, normed: torch.Tensor, stream: torch.Tensor, history: dict[str, list[torch.Tensor]]
    ) -> torch.Tensor:
        logits = normed @ self.weights[f"{prefix}.router.weight"].T
        history["expert"].append(logits)
        keys, values = (self.weights[f"{prefix}.experts.{name}"] for name in ("keys", "values"))
        rows = []
        for scores, x in zip(logits.sigmoid(), stream, strict=True):
            chosen = scores.topk(self.sizes.topk).indices
            rows.append(sum(scores[j] * (values[j] @ torch.relu(keys[j] @ x)) for j in chosen))
        return torch.stack(rows)

    def _attention(
        self, prefix: str, normed: torch.Tensor, stream: torch.Tensor, history: dict[str, list[torch.Tensor]]
    ) -> torch.Tensor:
        sizes, length = self.sizes, len(stream)
        both = self.weights[f"{prefix}.query_key.weight"].view(sizes.heads, 2, sizes.head_dim, -1)
        output_logits = normed @ self.weights[f"{prefix}.output_router.weight"].T
        output_logits = output_logits.view(length, sizes.heads, -1)
        history["output"].append(output_logits)
        value_logits = None
        if sizes.head_experts > 1:
            value_logits = (normed @ self.weights[f"{prefix}.value_router.weight"].T).view(length, sizes.heads, -1)
            history["value"].append(value_logits)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        output = torch.zeros_like(stream)
        for head in range(sizes.heads):
            query, key = (self._rotate(normed @ both[head, index].T * sizes.head_dim**-0.25) for index in (0, 1))
            scores = (query @ key.T).masked_fill(~mask, float("-inf")).softmax(-1)
            value_weights = None if value_logits is None else value_logits[:, head]
            context = scores @ self._mapped(f"{prefix}.value", head, stream, value_weights, is_output=False)
            output = output + self._mapped(f"{prefix}.output", head, context, output_logits[:, head], is_output=True)
        return output

    def _mapped(
        self, name: str, head: int, rows: torch.Tensor, logits: torch.Tensor | None, is_output: bool
    ) -> torch.Tensor:
        """Return the values of a head, or what it adds to the output."""
        sizes, weight = self.sizes, self.weights[f"{name}.weight"]
        part = slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)
        if sizes.head_experts == 1:
            if is_output:
                return (rows * logits.sigmoid()) @ weight[:, part].T
            return rows @ weight[part].T
        experts = weight.view(sizes.heads, sizes.head_experts, *weight.shape[1:])[head]
        mapped = []
        for scores, row in zip(logits.sigmoid(), rows, strict=True):
            chosen = scores.topk(sizes.head_topk).indices
            mapped.append(sum(scores[j] * (experts[j] @ row) for j in chosen))
        return torch.stack(mapped)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        rotary, half = self.sizes.rotary, self.sizes.rotary // 2
        angles = torch.arange(len(x)).unsqueeze(1) * 10000.0 ** (-torch.arange(half) * 2.0 / rotary)
        cos, sin = angles.cos(), angles.sin()
        first, second, rest = x[:, :half], x[:, half:rotary], x[:, rotary:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _minus_entropy(logits: list[torch.Tensor]) -> torch.Tensor:
    """Return minus the entropy of the mean distribution over passes and positions, and its mean over heads."""
    mean = torch.stack(logits).softmax(-1).mean(dim=(0, 1))
    assert math.isclose(float(mean.sum()), mean.numel() / mean.shape[-1], rel_tol=1e-4)
    return (mean * mean.log()).sum(-1).mean()
