"""Self-speculation: the model drafts tokens with few steps and verifies them together with all.

Drafts read what tokens before them left at full depth (Leviathan et al., arXiv 2211.17192, for the rule of acceptance),
so that one cache serves both. Sequences of a batch accept different numbers of tokens: what one rejects stays in the
cache as padding, as far as others accept more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import cut, filled_as
from .options import CallOptions

__all__ = ["DRAFT_TOKENS", "SpeculativeOutput", "speculate"]

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
    """One generation.

    Attributes:
        model: The model.
        texts: Prompts, [s], which grow.
        process: Turns logits, [b, V], into scores, given the tokens before, [b, any].
        stops: Returns whether a sequence is complete, given its tokens, [1, any].
        sample: Whether tokens are drawn; else the best is taken.
        draft_steps: Steps of a draft.
        draft_tokens: Tokens of a draft.
        longest: Length of a complete sequence; None: no limit.
        mask: 0 for padding, [b, s].
        cache: A cache, empty or with the beginning of the prompts.
        kwargs: Further arguments of the model's calls.
        rows: The sequences that go on, in the order of the rows of mask and cache.
    """

    model: Any
    texts: list[Tensor]
    process: LogitsProcessorList
    stops: Callable[[Tensor], bool]
    sample: bool
    draft_steps: int
    draft_tokens: int
    longest: int | None
    mask: Tensor
    cache: Cache
    kwargs: dict[str, Any]
    verifications: int = 0

    def __post_init__(self) -> None:
        self.rows = list(range(len(self.texts)))
        self.drafted, self.accepted = torch.zeros(2, len(self.texts), dtype=torch.long)

    def run(self) -> None:
        """Generate until all sequences are complete."""
        past, states = self.cache.get_seq_length(), self.kwargs.pop("input_states", None)
        logits = self._call(torch.stack(self.texts)[:, past:], self.mask, input_states=states)
        # The last token of a prompt that is no padding.
        last = self.mask.cumsum(-1).argmax(-1) - past
        scores = self._scores([own[place : place + 1] for own, place in zip(logits, last, strict=True)])
        self._keep_rows([row for row, made in enumerate(scores) if not self._append(row, self._choose(made[0]))])
        while self.rows:
            self._round()

    def _round(self) -> None:
        """Draft, verify and append."""
        past = self.cache.get_seq_length()
        drafts, guesses = self._draft()
        cut(self.cache, past)
        pending = torch.stack([self.texts[row][-1] for row in self.rows]).unsqueeze(1)
        tokens = torch.cat((pending, drafts), dim=1)
        mask = torch.cat((self.mask, torch.ones_like(tokens)), dim=1)
        scores = self._scores(self._call(tokens, mask), drafts)
        self.verifications += 1
        accepted, kept = [], []
        for place in range(len(self.rows)):
            count, complete = self._accept(place, drafts[place], guesses[place], scores[place])
            accepted.append(count)
            if not complete:
                kept.append(place)
        # The pending token and those that were accepted are in the cache; the rest is padding or cut off.
        longest = max(accepted) + 1
        cut(self.cache, past + longest)
        counts = torch.tensor(accepted, device=mask.device).unsqueeze(1)
        mask[:, past:] *= torch.arange(tokens.size(1), device=mask.device) <= counts
        self.mask = mask[:, : past + longest]
        self._keep_rows(kept)

    def _draft(self) -> tuple[Tensor, list[list[Tensor]]]:
        """Return drafted tokens, [b, draft], and the scores that each was chosen by, [V]."""
        last = torch.stack([self.texts[row][-1] for row in self.rows]).unsqueeze(1)
        guesses: list[list[Tensor]] = [[] for _ in self.rows]
        mask, drafts = self.mask, last[:, :0]
        with filled_as(self.cache, self.draft_steps):
            for _ in range(self._draft_length()):
                mask = torch.cat((mask, torch.ones_like(last)), dim=1)
                logits = self._call(last, mask, num_steps=self.draft_steps)
                scores = [made[-1] for made in self._scores(logits, drafts)]
                last = torch.stack([self._choose(own) for own in scores]).unsqueeze(1)
                drafts = torch.cat((drafts, last), dim=1)
                for own, made in zip(guesses, scores, strict=True):
                    own.append(made)
        return drafts, guesses

    def _draft_length(self) -> int:
        """Return the number of tokens to draft: none is behind the end of a sequence."""
        if self.longest is None:
            return self.draft_tokens
        return min(self.draft_tokens, self.longest - max(len(self.texts[row]) for row in self.rows))

    def _accept(self, place: int, draft: Tensor, guesses: list[Tensor], scores: list[Tensor]) -> tuple[int, bool]:
        """Append what a sequence accepts and one token more; return how many it accepts and whether it is complete."""
        row = self.rows[place]
        self.drafted[row] += len(draft)
        for number, token in enumerate(draft):
            accepted, other = self._verify(token, guesses[number], scores[number])
            if not accepted:
                return number, self._append(row, other)
            self.accepted[row] += 1
            if self._append(row, token):
                return number + 1, True
        return len(draft), self._append(row, self._choose(scores[-1]))

    def _verify(self, token: Tensor, guess: Tensor, scores: Tensor) -> tuple[bool, Tensor]:
        """Return whether a drafted token is accepted, and what else to take, given scores of draft and model, [V]."""
        if not self.sample:
            best = scores.argmax(-1)
            return bool(best == token), best
        wanted, drafted = scores.softmax(-1), guess.softmax(-1)
        if torch.rand((), device=token.device) * drafted[token] < wanted[token]:
            return True, token
        rest = (wanted - drafted).clamp(min=0.0)
        return False, torch.multinomial(rest if rest.sum() > 0.0 else wanted, 1)[0]

    def _choose(self, scores: Tensor) -> Tensor:
        return torch.multinomial(scores.softmax(-1), 1)[0] if self.sample else scores.argmax(-1)

    def _append(self, row: int, token: Tensor) -> bool:
        """Append a token and return whether the sequence is complete."""
        self.texts[row] = torch.cat((self.texts[row], token.view(1).to(self.texts[row])))
        return self.stops(self.texts[row].unsqueeze(0))

    def _scores(self, logits: Iterable[Tensor], drafts: Tensor | None = None) -> list[list[Tensor]]:
        """Return the scores, [V], of each sequence that follow from logits.

        Processors know the sequences of a batch by their rows, and want texts of one length: each length is a call.

        Args:
            logits: Logits of each sequence, [tokens, V]; the last ones are those behind its whole draft.
            drafts: Tokens that were drafted for it, [b, draft]; None: none.
        """
        scores = [list(own) for own in logits]
        if not self.process:
            return scores
        by_length: dict[int, list[tuple[int, int, Tensor]]] = {}
        for place, own in enumerate(scores):
            text = self.texts[self.rows[place]]
            text = text if drafts is None else torch.cat((text, drafts[place].to(text)))
            for number in range(len(own)):
                length = len(text) - len(own) + 1 + number
                by_length.setdefault(length, []).append((place, number, text[:length]))
        for members in by_length.values():
            place, number, text = members[0]
            texts, given = (part.repeat(len(self.texts), 1) for part in (text, scores[place][number]))
            for place, number, text in members:
                texts[self.rows[place]], given[self.rows[place]] = text, scores[place][number]
            made = self.process(texts, given)  # type: ignore[arg-type]
            for place, number, _ in members:
                scores[place][number] = made[self.rows[place]]
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
        process=logits_processor,
        stops=lambda text: bool(stopping_criteria(text, None).all()),
        sample=bool(generation_config.do_sample),
        draft_steps=draft_steps,
        draft_tokens=draft_tokens,
        longest=stopping_criteria.max_length,
        mask=torch.ones_like(input_ids) if mask is None else mask,
        cache=DynamicCache() if cache is None else cache,
        kwargs={name: kwargs[name] for name in kwargs if name in CallOptions.names()},
    )
    generation.run()
    pad = generation_config._pad_token_tensor
    sequences: Any = torch.nn.utils.rnn.pad_sequence(
        generation.texts, batch_first=True, padding_value=0 if pad is None else int(pad)
    )
    if not generation_config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(
        sequences=sequences,
        drafted=generation.drafted,
        accepted=generation.accepted,
        verifications=generation.verifications,
    )
