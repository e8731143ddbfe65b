"""The decoder that repeats groups of layers: against the unrolled model, in recomputation, and what is counted."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from more_megatron.blocks.statistics import router_figures
from more_megatron.config import MoREConfig
from more_megatron.model.depth import Depth
from more_megatron.monitoring.figures import Figures, report_to
from tests.helpers.models import HIDDEN, gpt_model, logits, small_config, start_ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY, History, dense

_LENGTH, _BATCH = 8, 2
_SAMPLES = (3, 8)
# One layer in front of the group, one behind it.
_LAYERS, _PRELUDE, _GROUP = 4, 1, 2
_DIVISION = {"num_layers": _LAYERS, "recurrence_prelude_layers": _PRELUDE, "recurrence_coda_layers": 1}
_DEPTHS = (Depth(0, 1), Depth(0, 3), Depth(2, 1), Depth(1, 2))

_EXPERTS = {
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.1,
}
_MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_moe_experts": None},
    "experts": _EXPERTS,
    "experts, ema": _EXPERTS | {"router_logit_ema": 0.5},
    "experts and dense layers": _EXPERTS | {"moe_layer_freq": [0, 1, 0, 1]},
    "input added": {"num_moe_experts": None, "recurrence_injection": "add"},
    "groups of one": _EXPERTS | {"recurrence_group_layers": 1},
}


def _full(method: str, layers: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


_RECOMPUTATION: dict[str, dict[str, Any]] = {
    "off": {},
    "uniform 1": _full("uniform", 1),
    "uniform 2": _full("uniform", 2),
    "block 1": _full("block", 1),
    "attention": _selective("core_attn"),
    "mlp": _selective("mlp"),
    "moe": _selective("moe"),
}

Gradients = dict[str, torch.Tensor]


class _Unrolled:
    """The same weights as a model of Megatron's own layers, each pass through a group with layers of its own.

    Args:
        looped: Configuration of the model with loops.
        depth: Number of passes.
    """

    def __init__(self, looped: MoREConfig, fields: dict[str, Any], depth: Depth) -> None:
        self._depth, self._ema = depth, looped.router_logit_ema
        self._adds_input = looped.recurrence_injection == "add"
        size = looped.recurrence_group_layers or _GROUP
        # For each group, its passes; for each pass, the layers of the looped model that it is a copy of.
        groups = [range(first, first + size) for first in range(_PRELUDE, _PRELUDE + _GROUP, size)]
        self._passes = [[[*group] for _ in range(depth.steps)] for group in groups]
        self.sources = [0, *(layer for group in self._passes for passed in group for layer in passed), _LAYERS - 1]
        unrolled = {**fields, "num_layers": len(self.sources)}
        if isinstance(frequency := fields.get("moe_layer_freq"), list):
            unrolled["moe_layer_freq"] = [frequency[source] for source in self.sources]
        for name in ("router_logit_ema", "recurrence_injection", "recurrence_group_layers"):
            unrolled.pop(name, None)
        self.model = gpt_model(small_config("moe", **unrolled), _LENGTH)

    @torch.no_grad()
    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the weights of the model with loops."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[self._source(name)])

    def gradients(self) -> Gradients:
        """Return the gradient of each weight of the model with loops: the sum over its copies."""
        sums: Gradients = {}
        for name, parameter in self.model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sums[self._source(name)] = sums.get(self._source(name), 0) + gradient
        return sums

    def _source(self, name: str) -> str:
        head, _, tail = name.partition("decoder.layers.")
        if not tail:
            return name
        number, _, rest = tail.partition(".")
        return f"{head}decoder.layers.{self.sources[int(number)]}.{rest}"

    def logits(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the logits, [b, s, vocabulary]: the increments of passes without gradient are constants."""
        layers = iter(self.model.decoder.layers)
        hidden = self._run(next(layers), embeddings)
        for passes in self._passes:
            hidden = self._repeat(passes, layers, hidden)
        hidden = self.model.decoder.final_layernorm(self._run(next(layers), hidden))
        return self.model.output_layer(hidden)[0].transpose(0, 1)

    def _repeat(self, passes: list[list[int]], layers: Any, hidden: torch.Tensor) -> torch.Tensor:
        inputs, former = hidden, {}
        for index, numbers in enumerate(passes):
            has_grad = index >= self._depth.no_grad_steps
            with torch.set_grad_enabled(has_grad):
                state = hidden + inputs if self._adds_input and index > 0 else hidden
                for number in numbers:
                    layer = next(layers)
                    self._prepare_router(layer, number, former)
                    state = self._run(layer, state)
            hidden = state if has_grad else hidden + (state - hidden).detach()
        return hidden

    def _prepare_router(self, layer: Any, number: int, former: dict[int, torch.Tensor]) -> None:
        """Average the logits over the passes, and weigh the losses of one with one over those with gradient."""
        router = getattr(layer.mlp, "router", None)
        if router is None:
            return
        router.config = small_config("moe", **_EXPERTS, num_layers=len(self.sources))
        router.config.moe_aux_loss_coeff /= self._depth.grad_steps
        router.config.moe_z_loss_coeff /= self._depth.grad_steps
        gating = type(router).gating

        def averaged(inputs: torch.Tensor) -> torch.Tensor:
            result = gating(router, inputs)
            if number in former:
                result = self._ema * former[number] + (1 - self._ema) * result
            former[number] = result if torch.is_grad_enabled() else result.detach()
            return result

        router.gating = averaged if self._ema else functools.partial(gating, router)

    def _run(self, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        angles = self.model.rotary_pos_emb(_LENGTH)
        return layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles)[0]


def _weighed(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(5))).mean()


def _embeddings() -> torch.Tensor:
    return torch.randn(_LENGTH, _BATCH, HIDDEN, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _backward(forward: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = _embeddings()
    output = forward(embeddings)
    _weighed(output).backward()
    assert embeddings.grad is not None
    return output.detach(), embeddings.grad


def _kinds(place: int, whole_matrix: bool) -> list[str]:
    """Return the kinds of recomputation that are tried at the depth of that place: between the depths, all of them."""
    plain, *kinds = _RECOMPUTATION
    return [plain, *(kinds if whole_matrix else (kinds * 2)[2 * place : 2 * place + 2])]


def _equals_the_unrolled_model(name: str, whole_matrix: bool) -> None:
    start_ranks()
    fields = _MODELS[name]
    for place, depth in enumerate(_DEPTHS):
        destroy_moe_metrics_tracker()  # it is made for a number of layers
        config = small_config("loop", **_DIVISION, **fields)
        weights = dict(gpt_model(config, _LENGTH, weight_std=0.2).named_parameters())
        unrolled = _Unrolled(config, fields, depth)
        unrolled.take(weights)
        expected, expected_input = _backward(unrolled.logits)
        gradients = unrolled.gradients()
        for kind in _kinds(place, whole_matrix):
            recomputation = _RECOMPUTATION[kind]
            if kind == "moe" and config.num_moe_experts is None:  # nothing that Megatron would recompute
                continue
            where = f"{name}, {depth}, {kind}"
            model = gpt_model(small_config("loop", **_DIVISION, **fields, **recomputation), _LENGTH, weight_std=0.2)
            output, of_input = _backward(lambda x, model=model, depth=depth: logits(model, x, depth, _SAMPLES))
            _assert_close(output, expected, where)
            _assert_close(of_input, expected_input, f"{where}: input")
            for key, parameter in model.named_parameters():
                if key.startswith("embedding"):
                    continue
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                _assert_close(gradient, gradients[key], f"{where}: {key}")


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{where}\n{text}")


@pytest.mark.parametrize("name", _MODELS)
def test_a_repeated_group_equals_the_unrolled_model(name: str, whole_matrix: bool) -> None:
    run_ranks(1, _equals_the_unrolled_model, name, whole_matrix)


def _routing_by_pass() -> None:
    """Compare the figures of each pass with a count by hand, with and without recomputation."""
    start_ranks()
    depth = Depth(1, 2)
    figures = {}
    for kind in ("off", "uniform 1", "block 1", "moe"):
        fields = _EXPERTS | _RECOMPUTATION[kind]
        model = gpt_model(small_config("loop", **_DIVISION, **fields), _LENGTH, weight_std=0.2)
        reported = Figures(router_figures(depth.steps + 1))
        report_to(reported)
        routed = _watch_routers(model)
        _backward(lambda x, model=model: logits(model, x, depth, _SAMPLES))
        figures[kind] = {name: mean for name, mean in reported.means().items() if "entropy" not in name}
        if kind == "off":
            counted = _count(routed, depth.steps)
    for kind, means in figures.items():
        assert means == pytest.approx(counted, rel=1e-5), kind


def _watch_routers(model: GPTModel) -> dict[int, list[torch.Tensor]]:
    """Return the routing maps of the layers of the group, by layer, filled by the next forward pass."""
    routed: dict[int, list[torch.Tensor]] = {}
    for number in range(_PRELUDE, _PRELUDE + _GROUP):
        router = model.decoder.layers[number].mlp.router

        def keep(module: Any, inputs: Any, output: Any, number: int = number) -> None:
            routed.setdefault(number, []).append((output[1] if isinstance(output, tuple) else output).detach())

        router.register_forward_hook(keep)
    return routed


def _count(routed: dict[int, list[torch.Tensor]], steps: int) -> dict[str, float]:
    variation, change = torch.zeros(2, steps)
    for maps in routed.values():
        assert len(maps) == steps
        for index, routing_map in enumerate(maps):
            load = routing_map.sum(0).float()
            variation[index] += load.std(correction=0) / load.mean() / len(routed)
            if index > 0:
                moved = [not torch.equal(now, before) for now, before in zip(routing_map, maps[index - 1], strict=True)]
                change[index] += sum(moved) / len(moved) / len(routed)
    loads = {f"expert load cv/step {step}": value for step, value in enumerate(variation.tolist(), 1)}
    return loads | {f"expert change/step {step}": value for step, value in enumerate(change.tolist(), 1) if step > 1}


def test_each_pass_is_counted_once() -> None:
    run_ranks(1, _routing_by_pass)


def _bytes_kept(system: str, fields: dict[str, Any], depth: Depth) -> int:
    """Return the size of what the backward pass of a model will read, parameters aside."""
    config = small_config(system, **_DIVISION, num_moe_experts=None, **fields)
    model = gpt_model(config, _LENGTH, weight_std=0.2)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits(model, _embeddings(), depth, _SAMPLES)
    return sum(storage.nbytes() for storage in kept.values())


def _memory() -> None:
    start_ranks()
    for system in ("loop", "huginn"):
        dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
        once, *deeper = (_bytes_kept(system, dropout, Depth(steps, 2)) for steps in (0, 2, 14))
        assert deeper == [once, once], system
        assert _bytes_kept(system, dropout, Depth(0, 4)) > 1.3 * once
        full = _full("uniform", 2)
        assert _bytes_kept(system, full, Depth(0, 4)) < 0.6 * _bytes_kept(system, {}, Depth(0, 4))


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_passes_before() -> None:
    run_ranks(1, _memory)


_RUN = (
    f"{TINY} --train-iters 3 --more-variant loop --recurrence-prelude-layers 1 --recurrence-coda-layers 1 "
    "--recurrence-sampling uniform --recurrence-min-steps 1 --recurrence-max-steps 4 --recurrence-backprop-steps 2 "
    "--attention-dropout 0.2 --hidden-dropout 0.2"
)
_TP2 = "--tensor-model-parallel-size 2"
_RECOMPUTED = (
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "--recompute-granularity selective --recompute-modules core_attn",
)


@pytest.mark.parametrize(
    ("ranks", "run"),
    [
        (1, dense(_RUN)),
        # With experts every system is tried in tests/training/test_dropout.py.
        *(pytest.param(ranks, f"{_RUN} {flags}", marks=pytest.mark.matrix) for ranks, flags in ((1, ""), (2, _TP2))),
    ],
)
def test_recomputation_draws_the_same_dropout(ranks: int, run: str) -> None:
    kept, *recomputed = run_ranks(ranks, train_all, [f"{run} {flags}" for flags in ("", *_RECOMPUTED)])[-1]
    for history in recomputed:
        assert history.losses == pytest.approx(kept.losses, rel=1e-6)
        assert history.grad_norms == pytest.approx(kept.grad_norms, rel=1e-5)


def test_one_pass_is_the_plain_model_bit_for_bit() -> None:
    run = f"{TINY} --train-iters 3 --weight-decay 0"
    once = "--more-variant loop --recurrence-steps 1"
    around = "--recurrence-prelude-layers 1 --recurrence-group-layers 1"
    lines = [f"{run} --more-variant moe", f"{run} {once}", f"{run} {once} {around}"]
    plain, *looped = run_ranks(1, train_all, lines)[0]
    for history in looped:
        assert _figures(history) == _figures(plain)


def _figures(history: History) -> tuple[list[float], list[float]]:
    return history.losses, history.grad_norms
