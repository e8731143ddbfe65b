"""What the YAML files of our tasks name: problems with short answers, texts for perplexity, HellaSwag's own file.

Files stand in the place of datasets of the hub.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from more_megatron.data.detokenize import Detokenize, detokenize
from more_megatron.evaluation.tasks.problem import is_match, read_problems
from more_megatron.evaluation.texts import read_texts
from more_megatron.json_lines import read_json_lines

_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")


class Answer(str):
    """An answer as it stands behind its prompt, whose tokens are those that training counts, not the harness's."""

    @classmethod
    def of(cls, problem: dict[str, Any]) -> Answer:
        """Return the answer of a problem."""
        return cls(f" {problem['answer']}")


def load_problems(path: str, **_: Any) -> dict[str, Dataset]:
    """Return the problems of a file of `tools/prepare_tasks.py` as the split `test`."""
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


def score_problem(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
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


def load_documents(path: str, detokenization: str = Detokenize.NONE, **_: Any) -> dict[str, Dataset]:
    """Return the documents of a file that the preprocessing tool reads as the split `test`, detokenized as named."""
    # Words and bytes are those of the text as it was, by the harness's convention for WikiText.
    documents = [
        {"text": detokenize(text, Detokenize(detokenization)), "words": len(text.split()), "bytes": len(text.encode())}
        for text in read_texts(path)
        if text
    ]
    return {"test": Dataset.from_list(documents)}


def score_document(document: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Return what each measure adds up."""
    (loglikelihood,) = results
    return {
        "word_perplexity": (loglikelihood, document["words"]),
        "byte_perplexity": (loglikelihood, document["bytes"]),
        "bits_per_byte": (loglikelihood, document["bytes"]),
    }


def load_rows(path: str, **_: Any) -> dict[str, Dataset]:
    """Return the rows of a file of HellaSwag's JSON lines as the split `test`."""
    rows = read_json_lines(path, "give HellaSwag's own file", _HELLASWAG).values()
    return {"test": Dataset.from_list([{name: row[name] for name in _HELLASWAG} for row in rows])}
