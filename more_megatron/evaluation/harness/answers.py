"""Problems with short answers: each is answered by generation, and its answer's tokens are scored."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from more_megatron.evaluation.tasks.problem import is_match, read_problems

__all__ = ["Answer", "AnswerTask", "load_problems", "process_results"]


class Answer(str):
    """An answer as it stands behind its prompt, whose tokens are those that training counts, not the harness's."""

    @classmethod
    def of(cls, problem: dict[str, Any]) -> Answer:
        """Return the answer of a problem."""
        return cls(f" {problem['answer']}")


def load_problems(path: str, **_: Any) -> dict[str, Any]:
    """Return the problems of a file of `tools/prepare_tasks.py` as the split `test`."""
    from datasets import Dataset

    return {"test": Dataset.from_list([dataclasses.asdict(problem) for problem in read_problems(path)])}


class AnswerTask(ConfigurableTask):
    """A task that asks for every problem twice: what the model says, and how likely it finds the right answer.

    Attributes:
        most_tokens: Tokens that may be generated for each prompt; those of the task's own options for others.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        # The harness leaves the key in by which it found this class.
        super().__init__(config={key: value for key, value in (config or {}).items() if key != "class"})
        self.most_tokens: dict[str, int] = {}

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Return the two requests of a problem."""
        options = dict(self.config.generation_kwargs or {})
        if ctx in self.most_tokens:
            options["max_gen_toks"] = self.most_tokens[ctx]
        common = {"doc": doc, "metadata": kwargs["metadata"]}
        return [
            Instance(request_type="generate_until", arguments=(ctx, options), idx=0, **common),
            Instance(request_type="loglikelihood", arguments=(ctx, Answer.of(doc)), idx=1, **common),
        ]


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """Return the measures of one problem.

    `exact_match` is that of what was generated, up to a newline or full stop, letter case aside; `token_exact_match`
    whether every token of the answer is the likeliest after those before it, which is the accuracy of the training log;
    `answer_loss` is in nats, over all tokens of the answer.
    """
    generated, (loglikelihood, is_likeliest) = results
    return {
        "exact_match": float(is_match(generated, doc["answer"])),
        "token_exact_match": float(is_likeliest),
        "answer_loss": -loglikelihood,
    }
