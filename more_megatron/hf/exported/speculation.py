"""Self-speculation: the model drafts tokens with few steps and verifies them together with all.

Drafts read what tokens before them left at full depth (Leviathan et al., arXiv 2211.17192, for the rule of acceptance),
so that one cache serves both. Sequences of a batch accept different numbers of tokens: what one rejects stays in the
cache as padding, as far as others accept more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import cut
from .options import OPTIONS

DRAFT_TOKENS = 4
"""Tokens of a draft if a call does not say how many."""


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What speculative generation returns.

    Attributes:
        drafted: Tokens that were drafted for each sequence, [b].
        accepted: Those of them that were accepted, [b].
        verifications: Calls that verified, for all sequences together.
    """

    drafted: Tensor | None = None
    accepted: Tensor | None = None
    verifications: int | None = None


@dataclass
class _Speculation:
    """One generation; `rows` are the sequences that go on, in the order of the rows of mask and cache."""

    model: Any
    texts: list[Tensor]  # prompts, [s], which grow
    process: LogitsProcessorList  # turns logits, [b, V], into scores, given the tokens before, [b, any]
    stopping: StoppingCriteriaList  # says whether a sequence is complete, given its tokens, [1, any]
    sample: bool  # whether tokens are drawn; else the best is taken
    draft_steps: int  # steps of a draft
    draft_tokens: int  # tokens of a draft
    mask: Tensor  # 0 for padding, [b, s]
    cache: Any  # empty, or with the beginning of the prompts
    kwargs: dict[str, Any]  # further arguments of the model's calls
    verifications: int = 0

    def __post_init__(self) -> None:
        self.rows = list(range(len(self.texts)))
        self.drafted, self.accepted = torch.zeros(2, len(self.texts), dtype=torch.long)

    def run(self) -> None:
        """Generate until all sequences are complete."""
        past, states = self.cache.get_seq_length(), self.kwargs.pop("input_states", None)
        prompts = torch.stack(self.texts)
        logits = self._call(prompts[:, past:], self.mask, input_states=states)
        # The last token of a prompt that is no padding.
        last = self.mask.cumsum(-1).argmax(-1) - past
        scores = self._scores(logits[torch.arange(len(last)), last].unsqueeze(1), prompts[:, :0])
        first = self._choose(scores)
        self._keep_rows([row for row, token in enumerate(first) if self._append(row, token) == (1, False)])
        while self.rows:
            self._round()

    def _round(self) -> None:
        """Draft, verify and append."""
        past = self.cache.get_seq_length()
        drafts, guesses = self._draft()
        cut(self.cache, past)
        tokens = torch.cat((self._pending(), drafts), dim=1)
        mask = torch.cat((self.mask, torch.ones_like(tokens)), dim=1)
        counts, following = self._verify(drafts, guesses, self._scores(self._call(tokens, mask), drafts))
        self.verifications += 1
        kept = []
        for place, row in enumerate(self.rows):
            count = int(counts[place])
            added, complete = self._append(row, [*drafts[place, :count], following[place]])
            counts[place] = min(added, count)
            self.drafted[row] += drafts.size(1)
            self.accepted[row] += counts[place]
            if not complete:
                kept.append(place)
        # The pending token and those that were accepted are in the cache; the rest is padding or cut off.
        longest = int(counts.max()) + 1
        cut(self.cache, past + longest)
        mask[:, past:] *= torch.arange(tokens.size(1), device=mask.device) <= counts.unsqueeze(1)
        self.mask = mask[:, : past + longest]
        self._keep_rows(kept)

    def _draft(self) -> tuple[Tensor, Tensor]:
        """Return drafted tokens, [b, draft], none of them behind the longest end, and their scores, [b, draft, V]."""
        length, limit = self.draft_tokens, self.stopping.max_length
        if limit is not None:
            length = min(length, limit - max(len(self.texts[row]) for row in self.rows))
        last, mask, guesses = self._pending(), self.mask, []
        drafts = last[:, :0]
        # What drafts append to a cache of another number of steps is cut off again.
        filled, self.cache.more_steps = self.cache.more_steps, (self.draft_steps, None)
        for _ in range(length):
            mask = torch.cat((mask, torch.ones_like(last)), dim=1)
            guesses.append(self._scores(self._call(last, mask, num_steps=self.draft_steps), drafts))
            last = self._choose(guesses[-1])
            drafts = torch.cat((drafts, last), dim=1)
        self.cache.more_steps = filled
        return drafts, torch.cat(guesses, dim=1)

    def _verify(self, drafts: Tensor, guesses: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many drafted tokens each sequence accepts, and the token that follows them, [b] each."""
        rows = torch.arange(len(drafts), device=drafts.device)
        if not self.sample:
            best = scores.argmax(-1)
            counts = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
            return counts, best[rows, counts]
        wanted, drafted, tokens = scores.softmax(-1), guesses.softmax(-1), drafts.unsqueeze(-1)
        chances = torch.rand_like(drafted[..., 0]) * drafted.gather(-1, tokens).squeeze(-1)
        counts = (chances < wanted[:, :-1].gather(-1, tokens).squeeze(-1)).long().cumprod(1).sum(1)
        # Behind a draft that is accepted as a whole nothing was guessed.
        wanted, drafted = wanted[rows, counts], F.pad(drafted, (0, 0, 0, 1))[rows, counts]
        rest = (wanted - drafted).clamp(min=0.0)
        return counts, torch.multinomial(torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, wanted), 1).squeeze(1)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the next tokens, [b, 1], given their scores, [b, 1, V]."""
        return torch.multinomial(scores[:, 0].softmax(-1), 1) if self.sample else scores.argmax(-1)

    def _append(self, row: int, tokens: Iterable[Tensor]) -> tuple[int, bool]:
        """Append tokens until a sequence is complete; return how many, and whether it is."""
        number, complete = 0, False
        for token in tokens:
            self.texts[row] = torch.cat((self.texts[row], token.view(1).to(self.texts[row])))
            number, complete = number + 1, bool(self.stopping(self.texts[row].unsqueeze(0), None).all())
            if complete:
                break
        return number, complete

    def _pending(self) -> Tensor:
        """Return the last token of each sequence, which the cache does not have yet, [b, 1]."""
        return torch.stack([self.texts[row][-1:] for row in self.rows])

    def _scores(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """Return the scores that follow from logits, [b, n, V]; the last ones are those behind whole drafts, [b, any].

        Processors know the sequences of a batch by their rows, and want texts of one length: each length is a call.
        """
        if not self.process:
            return logits
        scores, by_length = logits.clone(), defaultdict(list)
        for place, row in enumerate(self.rows):
            text = torch.cat((self.texts[row], drafts[place].to(self.texts[row])))
            for number in range(logits.size(1)):
                length = len(text) - logits.size(1) + 1 + number
                by_length[length].append((place, number, text[:length]))
        for members in by_length.values():
            texts, given = (part.repeat(len(self.texts), 1) for part in (members[0][2], logits[0, 0]))
            for place, number, text in members:
                texts[self.rows[place]], given[self.rows[place]] = text, logits[place, number]
            made = self.process(texts, given)  # type: ignore[arg-type]
            for place, number, _ in members:
                scores[place, number] = made[self.rows[place]]
        return scores

    def _call(self, tokens: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        """Return the logits of a call, [b, s, V], in float32 as in transformers."""
        kwargs = {"attention_mask": mask, "past_key_values": self.cache, "use_cache": True, **self.kwargs, **kwargs}
        return self.model(tokens, **kwargs).logits.float()

    def _keep_rows(self, kept: list[int]) -> None:
        """Go on with some of the sequences."""
        if len(kept) < len(self.rows):
            self.rows = [self.rows[place] for place in kept]
            places = torch.tensor(kept, dtype=torch.long, device=self.mask.device)
            self.mask = self.mask[places]
            self.cache.batch_select_indices(places)


def speculate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft_steps: int,
    draft_tokens: int,
    **kwargs: Any,
) -> SpeculativeOutput | Tensor:
    """Generate as `generate` does, given what transformers has prepared for it, and the steps and tokens of a draft.

    Returns:
        Sequences, [b, any], padded on the right, or an object with them and the tokens that were accepted.
    """
    cache, mask = kwargs.get("past_key_values", kwargs.get("cache")), kwargs.get("attention_mask")
    generation = _Speculation(
        model,
        list(input_ids),
        logits_processor,
        stopping_criteria,
        sample=bool(generation_config.do_sample),
        draft_steps=draft_steps,
        draft_tokens=draft_tokens,
        mask=torch.ones_like(input_ids) if mask is None else mask,
        cache=DynamicCache() if cache is None else cache,
        kwargs={name: kwargs[name] for name in kwargs if name in OPTIONS},
    )
    generation.run()
    pad = generation_config._pad_token_tensor
    sequences: Any = torch.nn.utils.rnn.pad_sequence(
        generation.texts, batch_first=True, padding_value=0 if pad is None else int(pad)
    )
    if not generation_config.return_dict_in_generate:
        return sequences
    counts = {name: getattr(generation, name) for name in ("drafted", "accepted", "verifications")}
    return SpeculativeOutput(sequences=sequences, **counts)
