"""Reasoning tasks: problems with short answers, generated or read, for training and for evaluation alike.

A file of problems is JSONL, one problem a line: `{"prompt": str, "answer": str, "task": str, "difficulty": int}`. The
prompt ends with `Answer:`; the text of a problem is the prompt, a space and the answer. No answer has a newline or a
full stop in it: an answer is read up to the first of them, letter case aside.

A set (`babi`, or a name of `GENERATED`) has problems of one or more tasks (`babi_1` to `babi_20`; `arithmetic` and
`word_problems`) in the splits of `Split`: `P_train.jsonl`, `P_test.jsonl` and, of sets that are generated,
`P_beyond.jsonl`, whose difficulty lies beyond that of training.
"""

from more_megatron.evaluation.tasks.generated import GENERATED, Generator, Split, generate
from more_megatron.evaluation.tasks.problem import Problem, is_match, read_problems, write_problems

__all__ = ["GENERATED", "Generator", "Problem", "Split", "generate", "is_match", "read_problems", "write_problems"]
