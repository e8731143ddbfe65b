"""Generation: with a cache as without, for prompts of unequal length, by every method of transformers."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.system import find_system
from tests.hf.reference_models import SYSTEMS, VOCABULARY, random_model, tokens

_NEW = 6
_LENGTHS = (5, 12, 9)


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three prompts of unequal length, padded on the left, and their mask, [b, s] each."""
    text, longest = tokens().flatten(), max(_LENGTHS)
    ids, mask = torch.zeros(2, len(_LENGTHS), longest, dtype=torch.int64)
    for row, length in enumerate(_LENGTHS):
        ids[row, longest - length :] = text[10 * row : 10 * row + length]
        mask[row, longest - length :] = 1
    return ids, mask


def _generate(model: MoREForCausalLM, ids: torch.Tensor, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, **{**settings, **kwargs})


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("variant", SYSTEMS)
def test_greedy_with_a_cache_equals_without(variant: str, topk: int) -> None:
    model = random_model(variant, num_experts_per_tok=topk)
    ids, mask = _prompts()
    kwargs = {"return_dict_in_generate": True, "output_logits": True}
    batch, plain = (_generate(model, ids, attention_mask=mask, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(batch.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(batch.logits), torch.stack(plain.logits), atol=1e-5, rtol=0)
    length = _LENGTHS[0]
    alone = _generate(model, ids[:1, -length:], **kwargs)
    assert torch.equal(alone.sequences[0, length:], batch.sequences[0, max(_LENGTHS) :])
    torch.testing.assert_close(torch.stack(alone.logits)[:, 0], torch.stack(batch.logits)[:, 0], atol=1e-5, rtol=0)
    # And as in one call over the whole text.
    with torch.no_grad():
        whole = model(alone.sequences).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(alone.logits, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", SYSTEMS)
def test_beams_and_samples_with_a_cache_equal_those_without(variant: str) -> None:
    model = random_model(variant)
    ids, mask = _prompts()
    for settings in ({"num_beams": 4}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}):
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            outputs.append(_generate(model, ids, attention_mask=mask, use_cache=use_cache, num_steps=2, **settings))
        assert torch.equal(*outputs), settings
        assert outputs[0].size(1) == max(_LENGTHS) + _NEW


@pytest.mark.parametrize("variant", SYSTEMS)
def test_drafts_are_rolled_back(variant: str) -> None:
    # A text that repeats itself, so that there are drafts; without an end they would not be made.
    model, ids = random_model(variant), tokens()[:1, :6].repeat(1, 3)
    plain = _generate(model, ids)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": random_model(SYSTEMS[0])}):
        assert torch.equal(_generate(model, ids, eos_token_id=VOCABULARY, **drafts), plain), drafts


@pytest.mark.parametrize("variant", SYSTEMS)
def test_number_of_steps_reaches_the_model(variant: str) -> None:
    model = random_model(variant)
    ids, mask = _prompts()
    asked = _generate(model, ids, attention_mask=mask, num_steps=6, init_scale=0.5)
    assert torch.equal(asked, _generate(model, ids, attention_mask=mask)) == (not find_system(variant).recurrent)
    model.config.mean_recurrence, model.config.state_std = 6, 0.25
    assert torch.equal(asked, _generate(model, ids, attention_mask=mask))


@pytest.mark.parametrize("own_cache", [True, False])
@pytest.mark.parametrize("variant", SYSTEMS)
@torch.no_grad()
def test_a_text_in_pieces_equals_the_whole(variant: str, own_cache: bool) -> None:
    model, ids = random_model(variant, moe_layers=[not own_cache, True]), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache, pieces = DynamicCache(config=model.config) if own_cache else None, []
    for start, end in ((0, 10), (10, 11), (11, 24)):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    difference = (torch.cat(pieces, dim=1) - whole).abs().amax(-1)
    assert difference[mask == 1].max() < 1e-5
    assert cache.get_seq_length() == 24


@torch.no_grad()
def test_a_cache_keeps_its_number_of_steps() -> None:
    ids = tokens()
    for variant in SYSTEMS:
        model = random_model(variant)
        cache = model(ids, num_steps=2).past_key_values
        if not find_system(variant).recurrent:
            model(ids[:, :1], past_key_values=cache, num_steps=4)
            continue
        with pytest.raises(ValueError, match="the cache was filled with num_steps=2, and this call has num_steps=4"):
            model(ids[:, :1], past_key_values=cache, num_steps=4)
        cache.crop(-ids.size(1))
        assert torch.equal(model(ids, past_key_values=cache, num_steps=4).logits, model(ids, num_steps=4).logits)


def test_a_static_cache_is_refused() -> None:
    model = random_model("recurrent_experts")
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="a StaticCache cannot hold the states of a MoRE model: use a DynamicCache"):
        model(tokens(), past_key_values=cache)
