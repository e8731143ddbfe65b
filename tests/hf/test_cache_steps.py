"""Caches that keep fewer steps than a model takes, and recurrences that start where the token before ended."""

import re
from typing import Any

import pytest
import torch

from more_megatron.hf.exported.cache import cache_sizes
from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.system import find_system
from tests.hf.reference_models import LENGTH, SYSTEMS, random_model, tokens

_STEPS = 6
_EXITS: dict[str, Any] = {"criterion": "latent-diff", "exit_threshold": 0.3}
_GENERATION: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
_CACHING = [name for name in SYSTEMS if find_system(name).caches_steps(random_model(name).config)]
_WITH_STATES = [name for name in SYSTEMS if find_system(name).num_states(random_model(name).config) > 0]


def _model(name: str, **fields: Any) -> MoREForCausalLM:
    return random_model(name, mean_recurrence=_STEPS, **fields)


@torch.no_grad()
def _fill(model: MoREForCausalLM, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    """Return the logits of a text in three pieces, and the cache."""
    cache, logits, ids = None, [], tokens()
    for start, end in ((0, 12), (12, 13), (13, LENGTH)):
        output = model(ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("name", _CACHING)
def test_sizes_of_caches(name: str) -> None:
    model = _model(name)
    plain, cache = _fill(model)
    full = cache_sizes(cache)
    for steps in (_STEPS, _STEPS + 3):
        logits, cache = _fill(model, cache_steps=steps)
        assert torch.equal(logits, plain)
        assert cache_sizes(cache) == full
    for steps in (1, 2, 4):
        logits, cache = _fill(model, cache_steps=steps)
        sizes = cache_sizes(cache)
        assert sizes["recurrent"] * _STEPS == full["recurrent"] * steps
        assert sizes["other"] == full["other"]
        # The first piece has nothing before it.
        assert torch.equal(logits[:, :12], plain[:, :12])
        assert (logits - plain).abs().max() > 1e-4


@pytest.mark.parametrize("name", _CACHING)
@torch.no_grad()
def test_a_step_reads_the_last_one_that_was_written_over_its_place(name: str) -> None:
    """Step i of a new token sees of the tokens before it the last step that is i modulo k."""
    model, ids = _model(name), tokens()
    kept = 2
    cache, full = (model(ids[:, :-1], cache_steps=steps).past_key_values for steps in (kept, None))
    places, all_places = (vars(own)["more_places"] for own in (cache, full))
    for place in [place for place in all_places if "step." in place]:
        head, step, rest = re.fullmatch(r"(.*step\.)(\d+)(/.*)", place).groups()
        found = cache.layers[places[f"{head}{int(step) % kept}{rest}"]]
        last = full.layers[all_places[f"{head}{_STEPS - kept + int(step) % kept}{rest}"]]
        assert torch.equal(found.keys, last.keys)
        assert torch.equal(found.values, last.values)


def _padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Return texts and their mask, the second text padded on the left."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask


def _check_alone_as_in_the_batch(model: MoREForCausalLM, **options: Any) -> None:
    """Check that a text goes on as it does without padding and without the others."""
    ids, mask = _padded()
    batch = model.generate(ids, attention_mask=mask, **_GENERATION, **options)
    alone = model.generate(ids[1:, 5:], attention_mask=mask[1:, 5:], **_GENERATION, **options)
    assert torch.equal(batch[1, 5:], alone[0])


@pytest.mark.parametrize("name", _CACHING)
def test_generation_with_fewer_steps_in_the_cache(name: str) -> None:
    model = _model(name)
    _check_alone_as_in_the_batch(model, cache_steps=2)
    # With tokens that stop: whatever the others do, a token leaves the same.
    _check_alone_as_in_the_batch(model, cache_steps=2, **_EXITS)
    ids, mask = _padded()
    model.generate(ids, attention_mask=mask, num_beams=2, cache_steps=2, **_GENERATION, **_EXITS)


def test_cache_steps_without_effect_are_refused() -> None:
    for name in SYSTEMS:
        if name not in _CACHING:
            with pytest.raises(ValueError, match="cache_steps has no effect: the cache of this system does not grow"):
                _model(name)(tokens(), cache_steps=1)
    model = _model(_CACHING[0])
    with pytest.raises(ValueError, match="cache_steps 0 must be at least 1"):
        model(tokens(), cache_steps=0)
    cache = model(tokens(), cache_steps=2).past_key_values
    with pytest.raises(ValueError, match="filled with cache_steps=2, and this call has cache_steps=3"):
        model(tokens()[:, :1], cache_steps=3, past_key_values=cache)


@pytest.mark.parametrize("name", _WITH_STATES)
@torch.no_grad()
def test_a_warm_start_equals_a_loop_that_hands_states_on(name: str) -> None:
    model, ids = _model(name), tokens()
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    prompt = mask[:, :18]
    output = model(ids[:, :18], attention_mask=prompt, output_recurrent_states=True)
    warm = model(ids[:, :18], attention_mask=prompt, warm_start=True)
    torch.testing.assert_close(warm.logits, output.logits, atol=0, rtol=0)
    # The second row ends in padding: its last token is the fifteenth.
    states = output.recurrent_states[:, -1, torch.arange(2), torch.tensor([17, 14])].unsqueeze(2)
    mask[1, 18:] = 1
    for place in range(18, LENGTH):
        arguments = {"attention_mask": mask[:, : place + 1], "output_recurrent_states": True}
        output = model(
            ids[:, place : place + 1], past_key_values=output.past_key_values, input_states=states, **arguments
        )
        warm = model(ids[:, place : place + 1], past_key_values=warm.past_key_values, warm_start=True, **arguments)
        torch.testing.assert_close(warm.logits, output.logits, atol=1e-6, rtol=0)
        states = output.recurrent_states[:, -1]
    cold = model(ids, attention_mask=mask).logits[:, -1]
    assert (cold - warm.logits[:, -1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", _WITH_STATES)
def test_generation_with_a_warm_start(name: str) -> None:
    model = _model(name).double()
    _check_alone_as_in_the_batch(model, warm_start=True)
    _check_alone_as_in_the_batch(model, warm_start=True, **_EXITS)


def test_a_warm_start_without_effect_is_refused() -> None:
    for name in SYSTEMS:
        if name not in _WITH_STATES:
            with pytest.raises(ValueError, match="warm_start has no effect: the recurrences of this system start from"):
                _model(name)(tokens(), warm_start=True)
