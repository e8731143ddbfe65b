"""What the systems do on the backend of Transformer Engine, found out in a process where a stand-in takes its place.

To be imported in a process of its own, after `stand_in.install()` and `initialize_platform()`.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from more_megatron.blocks.parameters import GroupedModule, Weight
from more_megatron.blocks.placement import Placement
from more_megatron.blocks.rows import RowPadding, Rows
from more_megatron.evaluation.gpu_check.work.tensors import gradient, lay
from more_megatron.model.depth import Depth
from more_megatron.model.initialization import BlockInitializer
from more_megatron.systems import get_system, systems
from more_megatron.systems.export import FEED_FORWARD
from tests.blocks.backends import stand_in
from tests.blocks.backends.compare import (
    BATCH,
    DEPTH,
    LENGTH,
    carry_over,
    contents,
    difference,
    model_of,
    step,
)
from tests.helpers.models import HIDDEN, RECOMPUTATION, small_config, start_ranks
from tests.helpers.ranks import free_port, rank_environment
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY

_FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
# Systems between them with every kind of attention.
MIXING = [name for name, system in systems().items() if system.mixes_tokens or system.block_width or system.Flags]
OWN_EXPERTS = [name for name, system in systems().items() if system.expert_rows is not FEED_FORWARD]


def interchange(variant: str) -> dict[str, Any]:
    """Return how far the backends are apart, and what they write to checkpoints."""
    local = model_of(variant, "local")
    expected = step(local)
    stand_in.REQUESTS.clear()
    te = model_of(variant, "transformer_engine")
    requests = list(stand_in.REQUESTS)
    carry_over(local, te)
    there = difference(step(te), expected)
    again = model_of(variant, "local")
    carry_over(te, again)
    return {
        "requests": requests,
        "difference": there,
        "and back": difference(step(again), expected),
        "contents": {"local": contents(local), "te": contents(te)},
    }


def in_fp8(variant: str) -> dict[str, Any]:
    """Return what FP8, which the stand-in does not round to, changes, and how rows were padded."""
    plain = step(model_of(variant, "transformer_engine"))
    model = model_of(variant, "transformer_engine", **_FP8)
    pads: list[int] = []
    original = RowPadding.pad
    RowPadding.pad = lambda self, rows: pads.append(len(rows)) or original(self, rows)  # type: ignore[method-assign]
    calls, counts = [], []
    try:
        for depth in (DEPTH, Depth(2, 2)):
            pads.clear()
            stand_in.CALLS.clear()
            model.zero_grad()
            outcome = step(model, depth)
            counts.append(len(pads))
            calls.append(list(stand_in.CALLS))
            found = outcome if depth == DEPTH else found  # noqa: F821
    finally:
        RowPadding.pad = original  # type: ignore[method-assign]
    return {"difference": difference(found, plain), "pads": counts, "calls": calls}


def partly_in_fp8(variant: str) -> list[stand_in.Call]:
    """Return the calls of a model whose first layer stays in bf16."""
    fields = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 0}
    model = model_of(variant, "transformer_engine", **_FP8, **fields)
    stand_in.CALLS.clear()
    step(model)
    return list(stand_in.CALLS)


def recomputed_in_fp8(variant: str) -> dict[str, Any]:
    """Return what full recomputation changes, and the calls."""
    plain = step(model_of(variant, "transformer_engine", **_FP8))
    model = model_of(variant, "transformer_engine", **_FP8, **RECOMPUTATION["full"])
    stand_in.CALLS.clear()
    return {"difference": difference(step(model), plain), "calls": list(stand_in.CALLS)}


def in_bf16(variant: str) -> float:
    """Return how far the backends are apart in bf16."""
    # One layer: in a second, a rounding could send a token elsewhere.
    fields = {"bf16": True, "params_dtype": torch.bfloat16, "num_layers": 1}
    local, te = (model_of(variant, backend, **fields) for backend in ("local", "transformer_engine"))
    carry_over(local, te)
    outputs = [step(model)["logits"].float() for model in (te, local)]
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def with_fused_accumulation(variant: str, depth: Depth) -> dict[str, Any]:
    """Return what fused accumulation of gradients changes over two micro-batches of a step."""
    outcomes = []
    for fused in (False, True):
        model = model_of(variant, "transformer_engine", **_FP8, gradient_accumulation_fusion=fused)
        if fused:
            for parameter in model.parameters():
                parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
        model.set_is_first_microbatch()
        stand_in.CALLS.clear()
        step(model, depth)
        if fused:
            # The hook of Megatron's buffers drops the dummies after each micro-batch, and adds what it must.
            for parameter in model.parameters():
                parameter.main_grad.copy_(gradient(parameter))
                parameter.grad, parameter.grad_added_to_main_grad = None, False
        outcomes.append(step(model, depth))
    firsts = [call.first for call in stand_in.CALLS if call.kind == "GroupedLinear"]
    return {"difference": difference(outcomes[1], outcomes[0]), "firsts": firsts}


def starved(variant: str) -> dict[str, float]:
    """Return how far the backends are apart when all rows go to one expert, and when there are none at all."""
    found = {}
    for name, counts in (("one expert", [0, 13, 0, 0]), ("none", [0, 0, 0, 0])):
        local, te = (
            model_of(variant, backend, num_layers=1, moe_router_topk=1) for backend in ("local", "transformer_engine")
        )
        carry_over(local, te)
        found[name] = difference(_routed(te, counts), _routed(local, counts))
    return found


def with_problems(variant: str) -> float:
    """Return how far the backends are apart on rows of several problems."""
    local, te = (model_of(variant, backend) for backend in ("local", "transformer_engine"))
    carry_over(local, te)
    starts = torch.tensor([[0, 3, 6], [0, 5, LENGTH]])
    return difference(step(te, starts=starts), step(local, starts=starts))


def _routed(model: GPTModel, counts: list[int]) -> dict[str, torch.Tensor]:
    """Return output and gradient of the experts for rows of one sequence and another."""
    moe, number = model.decoder.layers[0].mlp, sum(counts)
    hidden = torch.randn(number, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
    probs, tokens = torch.full((number,), 0.5), torch.tensor(counts)
    coordinates = torch.tensor([[place % BATCH, place // BATCH, 3] for place in range(number)])
    coordinates = coordinates.view(-1, 3).long()
    if not get_system(variant_of(model)).mixes_tokens:
        output, _ = moe.experts(hidden, tokens, probs, DEPTH)
    else:
        rows, order = Rows.sort(coordinates, tokens, BATCH, LENGTH, model.rotary_pos_emb(LENGTH))
        output = moe._compute_sorted(hidden, probs, rows, order, DEPTH)
    output.square().sum().backward()
    parameters = dict(moe.experts.named_parameters())
    if variant_of(model) == "shared_block":
        parameters |= dict(moe.recurrent_block.named_parameters())
    # The reduction of gradients waits for every parameter.
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters.values())
    return {"output": output.detach(), "hidden": hidden.grad}


def variant_of(model: GPTModel) -> str:
    """Return the name of a model's system."""
    return model.config.more_variant


def resumed() -> dict[str, list[float]]:
    """Return losses and gradient norms of a run, and of runs that are saved on one backend and go on on the other."""
    flags = f"{TINY} --split 1,0,0 --num-layers 2 --more-variant recurrent_experts --recurrence-steps 2 --lr 0.01"
    backends = {"local": "", "te": "--transformer-impl transformer_engine --moe-grouped-gemm"}
    with tempfile.TemporaryDirectory() as folder:
        saving = [
            f"{flags} {backend} --save {folder}/{name} --save-interval 3 --exit-interval 3"
            for name, backend in backends.items()
        ]
        loading = [f"{flags} {backends['te']} --load {folder}/local", f"{flags} --load {folder}/te"]
        whole, _, _, on_te, on_local = train_all([flags, *saving, *loading])
    found = {"whole": whole, "on te": on_te, "on local": on_local}
    return {name: [*history.losses[-3:], *history.grad_norms[-3:]] for name, history in found.items()}


class _Group:
    """A process group as a placement sees it."""

    def __init__(self, ranks: int, own: int) -> None:
        self.ranks, self.own = ranks, own

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def _numbers(initializer: BlockInitializer, shape: tuple[int, ...], name: str) -> torch.Tensor:
    number, group = map(int, name.split("/"))
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 1000 * number + 100 * group


def splits() -> dict[str, Any]:
    """Return weights that come together from two ranks that split them, on both backends, and their marks."""
    weights = {"wide": ((6, 4), 0, 1), "long": ((3, 8), 1, 1), "gated": ((2, 6, 4), 1, 1), "adapter": ((4, 8), None, 2)}
    found: dict[str, Any] = {"marks": {}}
    for backend in ("local", "transformer_engine"):
        config = small_config("recurrent_experts", transformer_impl=backend)
        found[backend] = {}
        for rank in range(2):
            placement = Placement(range(2, 4), 4, _Group(2, rank), 0)
            module = GroupedModule(config, placement)
            for number, (name, (shape, split, columns)) in enumerate(weights.items()):
                weight = Weight(shape, f"{number}/{{}}", _numbers, split)
                setattr(module, name, module.linear_weights(weight, columns))
            module.initialize(1)
            metadata = {"dp_cp_group": torch.distributed.group.WORLD}
            for value in module.sharded_state_dict("", ((0, 1, 3),), metadata).values():
                lay(found[backend], value)
        found["marks"][backend] = {
            name: (parameter.tensor_model_parallel, parameter.partition_dim, tuple(parameter.shape))
            for name, parameter in module.named_parameters()
        }
    return found


def main(file: str) -> None:
    """Find everything out."""
    os.environ.update(rank_environment(0, 1, free_port()))
    wanted: dict[str, Callable[[], Any]] = {
        "interchange": lambda: {name: interchange(name) for name in systems()},
        "fp8": lambda: {name: in_fp8(name) for name in systems()},
        "partly fp8": lambda: {name: partly_in_fp8(name) for name in ("recurrent_experts",)},
        "recomputed": lambda: {name: recomputed_in_fp8(name) for name in ("recurrent_experts",)},
        "bf16": lambda: {name: in_bf16(name) for name in ("recurrent_experts", "shared_block")},
        "fused": lambda: {
            (name, no_grad): with_fused_accumulation(name, Depth(no_grad, 2))
            for name, no_grad in (*((name, 0) for name in (*OWN_EXPERTS, "recurrent_moe")), ("recurrent_experts", 1))
        },
        "problems": lambda: {name: with_problems(name) for name in MIXING},
        "starved": lambda: {name: starved(name) for name in OWN_EXPERTS},
        "splits": splits,
    }
    # Megatron's trainer wants a process as it finds it at a start.
    found = {"resumed": resumed()}
    start_ranks()
    torch.save(found | {name: find() for name, find in wanted.items()}, file)
    torch.distributed.destroy_process_group()
