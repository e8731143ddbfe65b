"""Self-speculation: drafts with few steps, verified with all, lead to what plain generation leads to."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from more_megatron.hf.exported.modeling_more import MoREForCausalLM
from more_megatron.hf.exported.system import find_system
from tests.hf.reference_models import SYSTEMS, VOCABULARY, random_model

_STEPS = 4
_RECURRENT = [name for name in SYSTEMS if find_system(name).recurrent]


def _model(name: str, **fields: Any) -> MoREForCausalLM:
    return random_model(name, mean_recurrence=_STEPS, num_experts_per_tok=1, **fields).double()


def _prompts(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of unequal length, padded on the left, and their mask, [b, s] each."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(1, VOCABULARY, (number, 9), generator=generator)
    mask = torch.arange(9) >= torch.randint(0, 6, (number, 1), generator=generator)
    return ids * mask, mask.long()


def _generate(model: MoREForCausalLM, ids: torch.Tensor, mask: torch.Tensor, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, **{**settings, **kwargs})


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        pytest.param(name, prompts, marks=[] if prompts < 100 else pytest.mark.matrix)
        for name in _RECURRENT
        for prompts in (6, 200)
    ],
)
def test_greedy_tokens_are_those_of_plain_generation(name: str, prompts: int) -> None:
    model, (ids, mask) = _model(name), _prompts(prompts)
    # An end that some sequences reach earlier than others, so that they leave the batch.
    for kwargs in ({}, {"eos_token_id": int(_generate(model, ids, mask).sequences[0, -3])}):
        plain = _generate(model, ids, mask, **kwargs).sequences
        for start in range(0, prompts, 50):
            part = slice(start, start + 50)
            output = _generate(model, ids[part], mask[part], draft_steps=2, lookahead_for_draft=3, **kwargs)
            found = output.sequences
            assert torch.equal(found, plain[part, : found.size(1)])
            assert (plain[part, found.size(1) :] == 0).all()
            assert (output.accepted <= output.drafted).all()
            assert output.accepted.sum() > 0


def test_each_verification_gives_one_token_more_than_it_accepts() -> None:
    for name in _RECURRENT:
        model, (ids, mask) = _model(name), _prompts(1)
        output = _generate(model, ids, mask, draft_steps=_STEPS - 1, draft_tokens=5)
        # The prompt's call gives one, too; what follows the last token is not asked for.
        made = output.sequences.size(1) - 9
        assert made <= output.accepted.sum() + output.verifications + 1 <= made + 1


@pytest.mark.parametrize("name", ["huginn", "recurrent_moe"])
def test_processors_see_the_text_of_each_sequence(name: str) -> None:
    model, (ids, mask) = _model(name), _prompts(4)
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": 3}
    plain = _generate(model, ids, mask, **settings).sequences
    assert torch.equal(plain, _generate(model, ids, mask, draft_steps=1, draft_tokens=4, **settings).sequences)


@pytest.mark.parametrize("name", ["huginn", "shared_block"])
def test_samples_have_the_distribution_of_plain_sampling(name: str) -> None:
    """Chi-square of three tokens, over a vocabulary of four."""
    model = _model(name, vocab_size=4, num_hidden_layers=3 if name == "huginn" else 1)
    row, samples = torch.tensor([[1, 2, 3]]), 4000
    with torch.no_grad():
        first = model(row).logits[0, -1].softmax(-1)
        behind = model(torch.cat((row.expand(4, -1), torch.arange(4).unsqueeze(1)), dim=1)).logits[:, -1].softmax(-1)
        third = torch.stack(
            [model(torch.tensor([[1, 2, 3, a, b]])).logits[0, -1].softmax(-1) for a in range(4) for b in range(4)]
        )
    expected = (first[:, None] * behind).flatten()[:, None] * third
    torch.manual_seed(5)
    output = _generate(
        model,
        row,
        torch.ones_like(row),
        do_sample=True,
        max_new_tokens=3,
        num_return_sequences=samples,
        draft_steps=1,
        draft_tokens=2,
        top_k=0,
    )
    triples = (output.sequences[:, 3:] * torch.tensor([16, 4, 1])).sum(1)
    counts = torch.bincount(triples, minlength=64).double()
    chi_square = ((counts - samples * expected.flatten()) ** 2 / (samples * expected.flatten())).sum().item()
    # 63 degrees of freedom: 99.99% of true samples are below 112.
    assert chi_square < 112.0
    assert 0.2 < (output.accepted.sum() / output.drafted.sum()).item() < 0.99
    # The distribution of drafts is another one.
    with torch.no_grad():
        draft = model(row, num_steps=1).logits[0, -1].softmax(-1)
    assert (draft - first).abs().max() > 0.05


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"draft_steps": 4}, "draft_steps 4 must be below num_steps 4"),
        ({"draft_steps": 0}, "draft_steps 0 must be at least 1"),
        ({"draft_steps": 1.5}, "draft_steps 1.5 must be an integer"),
        ({"draft_steps": 2, "draft_tokens": 0}, "lookahead_for_draft 0 must be at least 1"),
        ({"lookahead_for_draft": 3}, "lookahead_for_draft 3 has no effect without draft_steps"),
        ({"draft_steps": 2, "criterion": "kl"}, "draft_steps does not go together with criterion"),
        ({"draft_steps": 2, "num_beams": 2}, "draft_steps does not go together with num_beams"),
        ({"draft_steps": 2, "generation_config": GenerationConfig(num_beams=2)}, "does not go together with num_beams"),
        ({"draft_steps": 2, "cache_steps": 1}, "draft_steps does not go together with cache_steps"),
        ({"draft_steps": 2, "warm_start": True}, "draft_steps does not go together with warm_start"),
    ],
)
def test_what_makes_no_sense_is_refused(kwargs: dict[str, Any], message: str) -> None:
    model, (ids, mask) = _model(_RECURRENT[0]), _prompts(2)
    with pytest.raises(ValueError, match=message):
        _generate(model, ids, mask, **kwargs)
    others = [name for name in SYSTEMS if name not in _RECURRENT]
    for name in others:
        with pytest.raises(ValueError, match="draft_steps has no effect: in this system the number of steps means"):
            _generate(_model(name), ids, mask, draft_steps=2)
