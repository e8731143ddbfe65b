"""Adaptive exit: each token stops by itself, and leaves the batch."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from more_megatron.hf.exported.exits import CRITERIA, Criterion
from more_megatron.hf.exported.experts import CellExperts
from more_megatron.hf.exported.modeling_more import MoREForCausalLM, MoREModel
from more_megatron.hf.exported.recurrent_block import RecurrentBlock
from more_megatron.hf.exported.system import find_system
from tests.hf.reference_models import LENGTH, SYSTEMS, VOCABULARY, random_model, tokens

_STEPS = 5
_RECURRENT = [name for name in SYSTEMS if find_system(name).recurrent]
# Thresholds at which no token stops, at which all do, and some between at which some do.
_NEVER = {name: 1e9 if name == "argmax-stability" else 0.0 for name in CRITERIA}
_ALWAYS = {name: 0.0 if name == "argmax-stability" else float("inf") for name in CRITERIA}
_BETWEEN = (1e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
_PAD = 7


def _model(name: str, **fields: Any) -> MoREForCausalLM:
    return random_model(name, mean_recurrence=_STEPS, **fields).double()


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two rows, the second padded on the left, and their mask, [b, s] each."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :_PAD] = 0
    return ids, mask


def _mixed(model: MoREForCausalLM, criterion: str | Criterion, **kwargs: Any) -> tuple[Any, float]:
    """Return the output at a threshold at which tokens take different numbers of steps, and the threshold."""
    ids, mask = _batch()
    for threshold in _BETWEEN:
        output = model(ids, attention_mask=mask, criterion=criterion, exit_threshold=threshold, **kwargs)
        if len(output.exit_steps[:, mask == 1].unique()) > 1:
            return output, threshold
    raise AssertionError("all tokens take the same steps at every threshold")


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        # Each system and each criterion always, each product in the whole matrix.
        pytest.param(name, criterion, marks=[] if (row + column) % len(CRITERIA) == 0 else pytest.mark.matrix)
        for row, name in enumerate(_RECURRENT)
        for column, criterion in enumerate(CRITERIA)
    ],
)
@torch.no_grad()
def test_thresholds_and_neighbours(name: str, criterion: str) -> None:
    model, (ids, mask) = _model(name, coda_layers=1, num_hidden_layers=3), _batch()
    real = mask == 1
    for threshold, min_steps, steps in ((_NEVER[criterion], 1, _STEPS), (_ALWAYS[criterion], 2, 2)):
        kwargs = {"criterion": criterion, "exit_threshold": threshold, "min_steps": min_steps}
        output = model(ids, attention_mask=mask, **kwargs)
        _close(output.logits[real], model(ids, attention_mask=mask, num_steps=steps).logits[real])
        assert output.exit_steps[:, real].unique().tolist() == [steps]
        assert output.exit_steps[:, ~real].unique().tolist() == [0]
    output, threshold = _mixed(model, criterion)
    kwargs = {"criterion": criterion, "exit_threshold": threshold}
    alone = model(ids[1:, _PAD:], **kwargs)
    _close(output.logits[1:, _PAD:], alone.logits)
    assert torch.equal(output.exit_steps[:, 1:, _PAD:], alone.exit_steps)
    on_the_right, right_mask = ids.clone(), mask.flip(1)
    on_the_right[1, :-_PAD] = ids[1, _PAD:]
    padded = model(on_the_right, attention_mask=right_mask, **kwargs)
    _close(padded.logits[right_mask == 1], output.logits[real])
    # A call without a cache forgets what the next call would need, and no more.
    _close(model(ids, attention_mask=mask, use_cache=False, **kwargs).logits[real], output.logits[real])


@pytest.mark.parametrize("name", _RECURRENT)
@torch.no_grad()
def test_tokens_equal_a_slow_loop_over_calls_that_do_not_stop(name: str) -> None:
    """Token by token, with more and more steps; then those that were not taken get the keys and values of the last."""
    fields = {"halting": "none"} if "halting" in find_system(name).fields else {}
    model = _model(name, num_hidden_layers=1, num_experts_per_tok=1, **fields)
    output, threshold = _mixed(model, "latent-diff", min_steps=2)
    cache, logits, row = DynamicCache(), [], tokens()[:1]
    for place, steps in enumerate(output.exit_steps[0, 0].tolist()):
        states: list[torch.Tensor] = []
        for number in range(1, steps + 1):
            tried = copy.deepcopy(cache)
            vars(tried)["more_steps"] = (number, None)
            result = model(
                row[:, place : place + 1], past_key_values=tried, num_steps=number, output_recurrent_states=True
            )
            states.append(result.recurrent_states[0, -1, 0, 0])
        distances = [((now - old).norm() / now.norm()).item() for old, now in itertools.pairwise(states)]
        assert min(distances[:-1], default=1e9) >= threshold
        assert distances[-1] < threshold or steps == _STEPS
        logits.append(result.logits)
        cache = _filled(tried, steps)
    _close(output.logits[:1], torch.cat(logits, dim=1))


def _filled(cache: DynamicCache, steps: int) -> DynamicCache:
    """Let the steps that the last token did not take have the keys and values of its last one."""
    names = vars(cache)["more_places"]
    for name in [name for name in names if f"step.{steps - 1}/" in name]:
        last = cache.layers[names[name]]
        for step in range(steps, _STEPS):
            number = names.setdefault(name.replace(f"step.{steps - 1}/", f"step.{step}/"), len(names))
            if number == len(cache.layers):
                cache.layers.append(copy.deepcopy(last))
            else:
                cache.layers[number].update(last.keys[..., -1:, :], last.values[..., -1:, :])
    return cache


@pytest.mark.parametrize("name", _RECURRENT)
@torch.no_grad()
def test_logits_are_those_of_a_call_that_ends_with_the_step(name: str) -> None:
    """For a first token, which sees no other, in the only recurrence of a model."""
    fields = {"num_hidden_layers": 3, "coda_layers": 1, "prelude_layers": 1}
    model = _model(name, **(fields if "coda_layers" in find_system(name).fields else {"num_hidden_layers": 1}))
    ids = torch.arange(VOCABULARY).unsqueeze(1)
    logs = torch.stack([model(ids, num_steps=steps).logits[:, 0].log_softmax(-1) for steps in range(1, _STEPS + 1)])
    divergence = (logs[:-1].exp() * (logs[:-1] - logs[1:])).sum(-1)
    # Between two of them: another order of sums decides nothing.
    middle = divergence[1:-1].flatten().sort().values[divergence[1:-1].numel() // 2 :][:2]
    threshold = middle.mean().item()
    expected = torch.full((VOCABULARY,), _STEPS)
    for step in reversed(range(_STEPS - 2)):
        expected = torch.where(divergence[step] < threshold, step + 2, expected)
    output = model(ids, criterion="kl", exit_threshold=threshold, min_steps=2)
    assert torch.equal(output.exit_steps[0, :, 0], expected)
    assert len(expected.unique()) > 2


@pytest.mark.parametrize("name", _RECURRENT)
@torch.no_grad()
def test_rows_that_stopped_are_not_computed(name: str) -> None:
    # With one expert a token, a row of an expert is a token.
    model, (ids, mask) = _model(name, num_experts_per_tok=1), _batch()
    threshold, rows = _mixed(model, "latent-diff")[1], []
    _count_rows(model, rows)
    steps = model(ids, attention_mask=mask, criterion="latent-diff", exit_threshold=threshold).exit_steps
    assert sum(rows) == steps.sum() < _STEPS * mask.sum() * len(steps)


def _count_rows(model: MoREForCausalLM, rows: list[int]) -> None:
    """Let a model note the rows that it computes in each step."""
    for group in find_system(model.config.variant).groups(model.config):
        if group.loop is not None:
            first = model.model.layers[group.layers[0]]
            first.register_forward_pre_hook(lambda _, call: rows.append(call[0][..., 0].numel()))
    for module in model.modules():
        if type(module).__name__ == "IteratedLayer":
            norm = module.post_attention_layernorm
            norm.register_forward_pre_hook(lambda _, call: rows.append(call[0][..., 0].numel()))
        elif isinstance(module, RecurrentBlock):
            _watch(module, "_mlp", rows, lambda x, *_: x[..., 0].numel())
        elif isinstance(module, CellExperts):
            _watch(module, "linear", rows, lambda x, name, _: len(x) if name in ("gru", "lstm") else 0)


def _watch(module: torch.nn.Module, method: str, rows: list[int], count: Callable[..., int]) -> None:
    original = getattr(module, method)

    def counted(*call: Any) -> Any:
        rows.append(count(*call))
        return original(*call)

    setattr(module, method, counted)


@pytest.mark.parametrize("name", _RECURRENT)
def test_generation_with_a_batch_equals_each_sequence_alone(name: str) -> None:
    model, (ids, mask) = _model(name), _batch()
    kwargs: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    kwargs |= {"exit_criterion": "cosine", "exit_threshold": _mixed(model, "cosine")[1]}
    batch = model.generate(ids, attention_mask=mask, **kwargs)
    alone = model.generate(ids[1:, _PAD:], attention_mask=mask[1:, _PAD:], **kwargs)
    assert torch.equal(batch.sequences[1, LENGTH:], alone.sequences[0, LENGTH - _PAD :])
    assert torch.equal(batch.exit_steps[:, 1, _PAD:], alone.exit_steps[:, 0])
    assert batch.exit_steps.shape[1:] == (2, LENGTH + 5)
    uncached = model.generate(ids, attention_mask=mask, use_cache=False, **kwargs)
    assert torch.equal(batch.sequences, uncached.sequences)
    # Beams and drafts of transformers go on to work.
    beams = [model.generate(ids, attention_mask=mask, num_beams=3, use_cache=use, **kwargs) for use in (True, False)]
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    text = ids[:1, :6].repeat(1, 3)
    kwargs["attention_mask"] = torch.ones_like(text)
    drafted = model.generate(text, prompt_lookup_num_tokens=3, eos_token_id=VOCABULARY, **kwargs)
    assert torch.equal(drafted.sequences, model.generate(text, **kwargs).sequences)


@torch.no_grad()
def test_tokens_stop_under_autocast() -> None:
    """Where a bias makes float32 queries of bfloat16 products, and attention is bfloat16 again."""
    model = random_model("shared_block_ffn", mean_recurrence=_STEPS, norm_type="layernorm", attention_bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = _mixed(model, "latent-diff")
    assert output.logits.isfinite().all()


class _AtTwo(Criterion):
    """A criterion of a user: stops all tokens behind the second step."""

    threshold = 1.5

    def measure(self, seen: torch.Tensor, former: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(seen[:, :1]) if former is None else former + 1.0

    def distance(self, former: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        return 3.0 - now[:, 0]


@torch.no_grad()
def test_criteria_of_users() -> None:
    for name in _RECURRENT:
        output = _model(name)(tokens(), criterion=_AtTwo())
        assert output.exit_steps.unique().tolist() == [2]


@torch.no_grad()
def test_states_of_tokens_that_stopped_stay() -> None:
    for name in _RECURRENT:
        model = _model(name, num_experts_per_tok=1)
        output, _ = _mixed(model, "latent-diff", output_recurrent_states=True)
        steps, states = output.exit_steps, output.recurrent_states
        assert states.shape[1] == _STEPS
        for step in range(1, _STEPS):
            stays = (states[:, step] == states[:, step - 1]).all(-1)
            assert torch.equal(stays, steps <= step)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": "entropy"}, "criterion 'entropy' does not exist: choose one of kl, entropy-diff, latent-diff"),
        ({"exit_threshold": 0.1}, "exit_threshold 0.1 has no effect without a criterion"),
        ({"min_steps": 2}, "min_steps 2 has no effect without a criterion"),
        ({"criterion": "kl", "min_steps": 9}, "min_steps 9 must be an integer between 1 and num_steps 5"),
        ({"criterion": "kl", "exit_threshold": -1.0}, "exit_threshold -1.0 must be a number of at least 0"),
        ({"criterion": "kl", "exit_threshold": float("nan")}, "exit_threshold nan must be a number of at least 0"),
        ({"criterion": "kl", "output_router_logits": True}, "router logits are not kept where tokens stop"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs: dict[str, Any], message: str) -> None:
    model = random_model(_RECURRENT[0], mean_recurrence=_STEPS)
    with pytest.raises(ValueError, match=message):
        model(tokens(), **kwargs)


def test_what_a_model_cannot_do_is_refused() -> None:
    for name in SYSTEMS:
        model = random_model(name)
        if find_system(name).recurrent:
            assert isinstance(model.model, MoREModel)
            with pytest.raises(ValueError, match="KLDivergence reads logits: load the model with AutoModelForCausalLM"):
                model.model(tokens(), criterion="kl")
        else:
            with pytest.raises(ValueError, match="criterion has no effect: in this system the number of steps means"):
                model(tokens(), criterion="cosine")
