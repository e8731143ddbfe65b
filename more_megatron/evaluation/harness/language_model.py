"""A model as the harness calls it."""

import itertools
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from more_megatron.evaluation.exported_model import ExportedModel
from more_megatron.evaluation.harness.our_tasks import Answer, AnswerTask


class HarnessModel(HFLM):
    """The harness's own model of transformers, with what a recurrent model is told in every call.

    Args:
        exported: The model.
        batch_size: Texts at a time.
        seq_length: Longest text that is read at once; longer ones are read in windows of this length.

    Attributes:
        call_options: Arguments of every call and generation: the number of steps, and when a token stops before.
    """

    def __init__(self, exported: ExportedModel, batch_size: int, seq_length: int) -> None:
        super().__init__(
            pretrained=exported.model,
            tokenizer=exported.tokenizer,
            batch_size=batch_size,
            max_length=seq_length,
            # Log-probabilities of half-precision models are not rounded again.
            softmax_dtype="float32",
        )
        self.begin({})

    def begin(self, call_options: dict[str, Any]) -> None:
        """Make every call from now on with these arguments, and count the steps of its tokens anew."""
        self.call_options = call_options
        self._steps = self._tokens = 0

    @property
    def mean_steps(self) -> float | None:
        """Steps that a token took where tokens stop by themselves, generated ones not counted; else None."""
        return self._steps / self._tokens if self._tokens else None

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Return logits, [b, s, vocabulary]; right padding is behind every token that counts."""
        with torch.no_grad():
            output = self.model(inps, use_cache=False, **self.call_options)
        steps = getattr(output, "exit_steps", None)
        if steps is not None:
            # The harness fills up rows with zeros, and gives no mask.
            taken = steps[:, inps.flip(1).cumsum(1).flip(1) > 0]
            self._steps, self._tokens = self._steps + int(taken.sum()), self._tokens + taken.numel()
        return output.logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        """Return texts with what the model adds to them, [b, up to max_length]."""
        return super()._model_generate(context, max_length, stop, **options, **self.call_options)

    def fit(self, task: AnswerTask) -> list[int]:
        """Return the problems of a task that fit into the length, and let each have an answer as long as the longest.

        A prompt is never cut, however long that is.
        """
        pairs = [self._encode_pair(problem["prompt"], Answer.of(problem)) for problem in task.eval_docs]
        # The last token is predicted and not read.
        fitting = [number for number, pair in enumerate(pairs) if sum(map(len, pair)) <= self.max_length + 1]
        longest = max((len(pairs[number][1]) for number in fitting), default=0)
        for number in fitting:
            room = self.max_length - len(pairs[number][0])
            task.most_tokens[task.eval_docs[number]["prompt"]] = min(longest, room)
        return fitting

    def answer_tokens(self, problem: dict[str, Any]) -> int:
        """Return how many tokens of a problem training counts."""
        return len(self._encode_pair(problem["prompt"], Answer.of(problem))[1])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and of what follows it.

        An answer begins where the text first differs from its prompt, and has the token that ends a document: as in
        `more_megatron/data/answers.py`.
        """
        if not isinstance(continuation, Answer):
            return super()._encode_pair(context, continuation)
        text = [*self.tok_encode(context + continuation), self.eot_token_id]
        pairs = zip(text, self.tok_encode(context), strict=False)
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return text[:start], text[start:]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Of the windows of a text, each batch comes by itself, and would have a bar of its own.
        is_batch = override_bs is not None
        return super()._loglikelihood_tokens(requests, disable_tqdm or is_batch, override_bs)
