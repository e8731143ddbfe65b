"""Training on answers: what counts in the loss, under every layout, and what is reported of answers."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from more_megatron.data.answers import Exercise, write_answers
from more_megatron.data.tokenizers import TokenizerOptions, load
from tests.helpers.corpus import write_corpus
from tests.helpers.program import finished, pretrain_more, refused
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY_ON_FILES, History, train

_LENGTH = 32
_EOD = 126
# Tokens of answers are of this number on, those of prompts below it.
_ANSWERS = 100
_LAYOUTS = ("", *(f"--{kind}-model-parallel-size 2" for kind in ("tensor", "pipeline", "expert")))
_SYSTEM = "--more-variant recurrent_experts --recurrence-steps 3 --recurrence-backprop-steps 2"
_OTHERS = (
    "--more-variant shared_block --recurrence-sampling uniform --recurrence-steps 2 --moe-router-topk 2",
    "--more-variant shared_block_ffn --recurrence-steps 2",
    "--more-variant recurrent_moe --router-min-entropy 0.9 --recurrence-steps 2",
)
_EVALUATION = "--eval-iters 1 --eval-interval 100 --recurrence-eval-steps 2 --recurrence-eval-depths 1 2 4"


def _exercises(task: str, count: int, seed: int) -> list[Exercise]:
    """Return problems of 4 to 20 tokens, whose answer the prompt ends with."""
    random = np.random.default_rng(seed)
    exercises = []
    for _ in range(count):
        answer = random.integers(_ANSWERS, _EOD, random.integers(1, 4))
        prompt = [*random.integers(0, _ANSWERS, random.integers(2, 14)), *(answer - _ANSWERS)]
        text = " ".join(map(str, [*prompt, *answer]))
        exercises.append(Exercise(text, " ".join(map(str, prompt)), task))
    return exercises


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the flags of a run on two sets of problems and plain text."""
    folder = tmp_path_factory.mktemp("problems")
    tokenizer = load(TokenizerOptions("NullTokenizer", vocab_size=127))
    write_answers(str(folder / "many"), [*_exercises("copy", 40, 1), *_exercises("echo", 40, 2)], tokenizer)
    write_answers(str(folder / "test"), [*_exercises("copy", 10, 3), *_exercises("echo", 10, 4)], tokenizer)
    write_corpus(folder / "text", documents=80)
    blend = f"0.6 {folder / 'many'} 0.4 {folder / 'text'}"
    return (
        f"{TINY_ON_FILES} --train-data-path {blend} --valid-data-path {folder / 'test'} --loss-on-answers "
        f"--num-layers 2 --seq-length {_LENGTH} --train-iters 3"
    )


def _with_validations(lines: list[str]) -> tuple[list[History], list[dict[int, float]]]:
    from more_megatron.training import evaluation

    validations: list[dict[int, float]] = []
    evaluation.record_depth_losses = validations.append
    return train_all(lines), validations


@pytest.mark.parametrize("system", [_SYSTEM, *(pytest.param(other, marks=pytest.mark.matrix) for other in _OTHERS)])
def test_losses_are_equal_under_all_layouts(run: str, system: str, tmp_path: Path) -> None:
    line = f"{run} {system} {_EVALUATION}"
    first = f"{run} {system} --save {tmp_path} --save-interval 1 --exit-interval 1"
    [_, reference], [expected, *none] = run_ranks(1, _with_validations, [first, line])[0]
    assert not none
    histories, validations = run_ranks(
        2, _with_validations, [f"{line} {layout} --load {tmp_path}" for layout in _LAYOUTS]
    )[-1]
    assert list(expected) == [2, 1, 4]
    for layout, history, losses in zip(_LAYOUTS, histories, validations, strict=True):
        assert history.losses == pytest.approx(reference.losses[1:], rel=1e-5), layout
        assert history.grad_norms == pytest.approx(reference.grad_norms[1:], rel=1e-5), layout
        assert losses == pytest.approx(expected, rel=1e-5), layout


def _by_hand(line: str) -> tuple[float, list[float], list[tuple[float, float]]]:
    """Return the loss of a step, that of each micro-batch computed by hand, and what logits' gradients are like."""
    from torch.nn.modules.module import register_module_forward_hook

    from more_megatron.training import forward

    batches: list[Any] = []
    sums: list[tuple[float, float]] = []
    gradients: list[tuple[float, float]] = []
    original = forward.next_batch

    def watched(*args: Any) -> Any:
        batches.append(original(*args))
        return batches[-1]

    def see(module: torch.nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, tuple) or output[0].size(-1) != 128 or not output[0].requires_grad:
            return
        labels, logits = batches[-1].labels, output[0].transpose(0, 1)
        counts = labels >= _ANSWERS
        losses = torch.nn.functional.cross_entropy(logits[counts].double(), labels[counts])
        sums.append((float(losses) * int(counts.sum()), int(counts.sum())))

        def record(gradient: torch.Tensor) -> None:
            sizes = gradient.transpose(0, 1).abs().amax(-1)
            gradients.append((float(sizes[~counts].max()), float(sizes[counts].min())))

        output[0].register_hook(record)

    forward.next_batch = watched
    hook = register_module_forward_hook(see)
    try:
        [loss] = train(line).losses
    finally:
        hook.remove()
        forward.next_batch = original
    total = [sum(part) for part in zip(*sums, strict=True)]
    return loss, total, gradients


def test_the_loss_is_the_cross_entropy_of_answers(run: str) -> None:
    only = run.replace("0.6 ", "").split(" 0.4 ")[0] + f" --loss-on-answers --seq-length {_LENGTH} --train-iters 1"
    loss, (total, count), gradients = run_ranks(
        1, _by_hand, f"{only} {_SYSTEM} --split 1,0,0".replace("--train-data-path", "--data-path")
    )[0]
    assert loss == pytest.approx(total / count, rel=1e-6)
    assert len(gradients) == 2
    assert all(of_prompts == 0.0 and of_answers > 0.0 for of_prompts, of_answers in gradients)


def test_answers_are_reported_by_task(run: str) -> None:
    depths = "--recurrence-eval-depths 1 3 5"
    flags = f"{_SYSTEM} --seq-length 16 --full-validation --eval-iters 1 --eval-interval 3 {depths}"
    output = finished(f"{run} {flags}", prepare=_overflow_at_five_steps)
    assert "problems are longer than --seq-length 16 and left out" in output
    lines = [line for line in output.splitlines() if line.startswith(" evaluation at iteration 3 with")]
    assert len(lines) == 3, output
    # A model that overflows at a depth it was not trained at goes on.
    assert "with 5 recurrence steps | lm loss: NAN" in lines.pop()
    for line, depth in zip(lines, (3, 1), strict=True):
        assert f"with {depth} recurrence steps | lm loss: " in line
        assert "copy loss: " in line
        assert "echo exact match: 0." in line


def _overflow_at_five_steps() -> None:
    from megatron.core.models.gpt import GPTModel

    from more_megatron.training.evaluation import evaluated_steps

    forward = GPTModel.forward
    GPTModel.forward = lambda *args, **kwargs: forward(*args, **kwargs) * (math.nan if evaluated_steps() == 5 else 1.0)


def test_refusals(run: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text", documents=80)
    zero = run.replace("0.4 ", "0 ")
    refused(pretrain_more(1, zero)[0], "the weight 0.0 of a blend of data must be above 0")
    plain = f"{TINY_ON_FILES} --data-path {corpus} --loss-on-answers --split 90,10,0"
    refused(pretrain_more(1, plain)[0], "no dataset has a mask")
    refused(pretrain_more(1, f"{run} --reset-position-ids")[0], "not go together with --reset-position-ids")
    refused(
        pretrain_more(1, run.replace(f"--seq-length {_LENGTH}", "--seq-length 2"))[0], "no problem", "--seq-length 2"
    )
    baseline = f"{run} --more-variant moe --recurrence-eval-depths 2"
    refused(pretrain_more(1, baseline)[0], "--more-variant moe never reads --recurrence-eval-depths")
    refused(pretrain_more(1, f"{run} --recurrence-eval-depths 0")[0], "--recurrence-eval-depths 0 must be at least 1")
