"""Which kind of parameter is which, and which experts' weights it holds."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from more_megatron.blocks.parameters import linear_columns, local_groups
from more_megatron.monitoring.gradients import Owner

# The first that is found in a parameter's name says its kind.
_KINDS = (
    ("embedding", "embedding"),
    ("output_layer", "head"),
    (".router.", "router"),
    ("shared_experts", "shared experts"),
    (".experts.", "experts"),
    ("adapter", "adapter"),
    ("norm", "norms"),
    ("recurrent_block", "recurrent block"),
    ("attention", "attention"),
    ("loops.", "loop"),
    ("mlp", "mlp"),
)
# Megatron's experts: a module each, or a weight each.
_OF_ONE_EXPERT = re.compile(r"local_experts\.(\d+)\.|\.weight(\d+)$")


def parameter_owners(chunks: Iterable[torch.nn.Module]) -> dict[torch.nn.Parameter, Owner]:
    """Return whom each parameter belongs to, given a model's chunks on this rank, without Megatron's wrappers."""
    owners = {}
    for chunk in chunks:
        layers = {name: module for name, module in chunk.named_modules() if hasattr(module, "mlp")}
        for name, parameter in chunk.named_parameters():
            kind = next((kind for part, kind in _KINDS if part in name), "other")
            layer = next((layer for prefix, layer in layers.items() if name.startswith(f"{prefix}.")), None)
            owners[parameter] = Owner(kind) if layer is None else _in_layer(kind, name, parameter, layer)
    return owners


def _in_layer(kind: str, name: str, parameter: torch.nn.Parameter, layer: Any) -> Owner:
    place = f"layer {layer.layer_number}"
    if kind != "experts" or not isinstance(layer.mlp, MoELayer):
        return Owner(kind, place)
    indices, found = layer.mlp.local_expert_indices, _OF_ONE_EXPERT.search(name)
    local = local_groups(parameter, len(indices)) or ([int(found[1] or found[2])] if found else [])
    return Owner(kind, place, tuple(indices[index] for index in local), layer.config.num_moe_experts)


def adapters(chunk: torch.nn.Module) -> Iterator[tuple[str, Any, tuple[torch.Tensor, torch.Tensor]]]:
    """Yield each adapter of a model: its module's name, the module, and the halves for state and input, [..., h, h]."""
    for name, module in chunk.named_modules():
        held = getattr(module, "adapter", None)
        if held is None:
            continue
        halves: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        for parameter in [held] if isinstance(held, torch.nn.Parameter) else held.parameters():
            for column, half in linear_columns(parameter, 2).items():
                halves[column].append(half if half.dim() > 2 else half.unsqueeze(0))
        yield name, module, (torch.cat(halves[0]), torch.cat(halves[1]))
