"""What is evaluated is what the trainer reports, and what a direct computation finds."""

import contextlib
import io
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from more_megatron.data.answers import Exercise, write_answers
from more_megatron.data.tokenizers import TokenizerOptions, TokenizerType, load
from more_megatron.errors import MoREError
from more_megatron.evaluation.tasks import Problem, write_problems
from tests.helpers.corpus import sample_text
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY_ON_FILES
from tests.hf.test_conversion_tokenizers import MODELS, train
from tools.evaluate import parse_arguments

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

_LENGTH, _DEPTHS = 48, (1, 3)
# Windows of the text, the last of which is full.
_WINDOWS = 8


@dataclass(frozen=True)
class _Run:
    """What a run left and said."""

    folder: Path  # its files: `checkpoint`, `text`, `P_test.jsonl`
    text_loss: float  # validation loss on the text, in nats
    answers: dict[int, dict[str, float]]  # validation figures of the problems by depth and name


def _problems(first: int, last: int) -> list[Problem]:
    even = [
        Problem.ask(f"Is {number} even?", "no" if number % 2 else "yes", "even", 1) for number in range(first, last)
    ]
    signs = [Problem.ask(f"What is {n} - {n + 1}?", "-1", "signs", n % 3) for n in range(first, last, 2)]
    return [*even, *signs]


def _write_data(folder: Path) -> None:
    text = sample_text(60_000)
    processor = train(text + " yes no 0 1 2 3 4 5 6 7 8 9", folder / "model", **MODELS["ours"])
    tokenizer = load(TokenizerOptions(TokenizerType.SENTENCEPIECE, tokenizer_model=str(folder / "model")))
    for split, problems in (("train", _problems(100, 300)), ("test", _problems(10, 50))):
        write_problems(folder / f"P_{split}.jsonl", problems)
        write_answers(f"{folder}/P_{split}", [Exercise(p.text, p.prompt, p.task) for p in problems], tokenizer)
    _write_text(folder, text[2_000:4_000], processor)


def _write_text(folder: Path, text: str, processor: Any) -> None:
    """Write a paragraph whose tokens fill windows, and a dataset that begins as the harness's windows do."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    words = " ".join(text.split()).split(" ")
    while len(tokens := processor.encode(" ".join(words))) > _WINDOWS * _LENGTH:
        words.pop()
    while len(tokens := processor.encode(" ".join(words))) < _WINDOWS * _LENGTH:
        words[-1] += "a"
    (folder / "text").write_text(" ".join(words))
    builder = IndexedDatasetBuilder(f"{folder}/text.bin", dtype=np.uint16)
    builder.add_item(torch.tensor([processor.eos_id(), *tokens]))
    builder.end_document()
    builder.finalize(f"{folder}/text.idx")


def _train(folder: str) -> tuple[str, str]:
    """Train on answers and evaluate on answers, then on the text; return what was printed."""
    common = (
        f"{TINY_ON_FILES} --more-variant recurrent_moe --recurrence-steps 3 --seq-length {_LENGTH} "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {folder}/model --data-cache-path {folder}/cache "
        f"--train-data-path {folder}/P_train --init-method-std 0.2 --num-layers 2 --train-iters 48 "
        "--micro-batch-size 4 --lr 5e-3 "
    )
    depths = " ".join(map(str, _DEPTHS))
    answers = (
        f"--valid-data-path {folder}/P_test --loss-on-answers --full-validation "
        f"--recurrence-eval-depths {depths} --eval-iters 1 --save {folder}/checkpoint --save-interval 48"
    )
    text = (
        f"--valid-data-path {folder}/text --load {folder}/checkpoint --skip-train "
        f"--eval-iters {_WINDOWS // 4} --recurrence-eval-steps {_DEPTHS[0]}"
    )
    printed = []
    for flags in (answers, text):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train_all([common + flags])
        printed.append(output.getvalue())
    return printed[0], printed[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> _Run:
    """Train a model on answers."""
    folder = tmp_path_factory.mktemp("answers")
    _write_data(folder)
    answers, text = run_ranks(1, _train, str(folder))[0]
    figures: dict[int, dict[str, float]] = {}
    for line in answers.splitlines():
        if found := re.match(r" evaluation at .* validation set with (\d+) recurrence steps \|", line):
            figures[int(found[1])] = {name: float(value) for name, value in re.findall(r"\| ([\w ]+): (\S+)", line)}
    (loss,) = set(re.findall(r"on validation set \| lm loss value: (\S+)", text))
    return _Run(folder, float(loss), figures)


def _evaluate(run: _Run, output: Path, flags: str, *tasks: str) -> dict[str, Any]:
    """Evaluate the run's checkpoint and return the results by task and depth."""
    from more_megatron.evaluation.harness.evaluation import evaluate

    words = f"--load {run.folder}/checkpoint --output {output} --device cpu {flags}".split()
    evaluate(parse_arguments([*words, "--tasks", *(task.partition("=")[0] for task in tasks), "--data", *tasks]))
    results = json.loads((output / "results.json").read_text())["results"]
    return {(result["name"], result["num_steps"]): result["measures"] for result in results}


def test_accuracy_and_loss_of_answers_are_the_trainers(run: _Run, tmp_path: Path) -> None:
    depths = " ".join(map(str, _DEPTHS))
    found = _evaluate(run, tmp_path, f"--num-steps {depths}", f"arithmetic={run.folder}/P_test.jsonl")
    for depth in _DEPTHS:
        measures, figures = found["arithmetic", depth], run.answers[depth]
        for task in ("even", "signs"):
            measured = measures[f"arithmetic/{task}"]
            assert measured["token_exact_match"] == pytest.approx(figures[f"{task} exact match"], abs=1e-4)
            assert measured["loss"] == pytest.approx(figures[f"{task} loss"], abs=2e-4)
            # One word or number: what is generated is what is likeliest.
            assert measured["exact_match"] == measured["token_exact_match"]
    accuracies = [found["arithmetic", depth]["arithmetic"]["token_exact_match"] for depth in _DEPTHS]
    assert any(0.1 < accuracy < 1.0 for accuracy in accuracies), accuracies
    assert (tmp_path / "depths.png").stat().st_size > 10_000


def test_loss_of_a_text_is_the_trainers_and_that_of_a_direct_computation(run: _Run, tmp_path: Path) -> None:
    flags = f"--num-steps {_DEPTHS[0]} --batch-size 3"
    found = _evaluate(run, tmp_path, flags, f"wikitext={run.folder}/text")["wikitext", _DEPTHS[0]]["wikitext"]
    assert found["loss"] == pytest.approx(run.text_loss, rel=1e-5)
    total, tokens = _direct_loss(run)
    text = (run.folder / "text").read_text()
    assert found["token_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / len(text.split())), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / len(text.encode())), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / len(text.encode()) / math.log(2.0), rel=1e-4)


@torch.no_grad()
def _direct_loss(run: _Run) -> tuple[float, int]:
    """Return the summed loss of the text and its tokens, from an export that transformers loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from more_megatron.hf.conversion.export import to_hf

    folder = run.folder / "exported"
    to_hf(run.folder / "checkpoint", folder, progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens = [tokenizer.eos_token_id, *tokenizer((run.folder / "text").read_text())["input_ids"]]
    inputs = torch.tensor(tokens[:-1]).view(_WINDOWS, _LENGTH)
    labels = torch.tensor(tokens[1:])
    logits = model(inputs, num_steps=_DEPTHS[0]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")), len(labels)


def test_answers_do_not_depend_on_the_batch(run: _Run, tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text((run.folder / "P_test.jsonl").read_text())
    data = f"chains={tmp_path}/mixed.jsonl"
    alone, together = (
        _evaluate(run, tmp_path / size, f"--num-steps 2 --limit 24 --batch-size {size}", data) for size in ("1", "7")
    )
    for entry, measures in alone["chains", 2].items():
        for name, value in measures.items():
            assert together["chains", 2][entry][name] == pytest.approx(value, abs=1e-5), (entry, name)


def test_tokens_that_stop_by_themselves(run: _Run, tmp_path: Path) -> None:
    data = f"wikitext={run.folder}/text"
    exits = "--exit-criterion latent-diff --exit-threshold"
    shallow = _evaluate(run, tmp_path / "1", "--num-steps 1", data)["wikitext", 1]["wikitext"]
    at_once = _evaluate(run, tmp_path / "exits", f"--num-steps 3 {exits} 1e9", data)["wikitext", 3]["wikitext"]
    never = _evaluate(run, tmp_path / "never", f"--num-steps 3 {exits} 0", data)["wikitext", 3]["wikitext"]
    assert at_once["mean_steps"] == 1.0
    assert at_once["loss"] == pytest.approx(shallow["loss"], abs=1e-5)
    assert never["mean_steps"] == 3.0


def test_what_is_finished_is_not_done_again(run: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from more_megatron.evaluation.harness import evaluation

    data, measured = f"paths={run.folder}/P_test.jsonl", []
    original = evaluation._measure

    def measure(model: Any, *args: Any) -> Any:
        measured.append(model.call_options["num_steps"])
        if measured == [1, 2]:
            raise KeyboardInterrupt
        return original(model, *args)

    monkeypatch.setattr(evaluation, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(run, tmp_path, "--num-steps 1 2 --limit 4", data)
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["paths_r1.json"]
    assert set(_evaluate(run, tmp_path, "--num-steps 1 2 --limit 4", data)) == {("paths", 1), ("paths", 2)}
    assert measured == [1, 2, 2]
    with pytest.raises(MoREError, match=r"paths_r1.json was made with limit 4, and this run has 5: name another --out"):
        _evaluate(run, tmp_path, "--num-steps 1 --limit 5", data)
    (tmp_path / "results" / "paths_r1.json").write_text("{")
    with pytest.raises(MoREError, match=r"paths_r1.json is no result of this tool: remove it"):
        _evaluate(run, tmp_path, "--num-steps 1 --limit 4", data)


def test_a_report_of_measures_that_no_figure_is_of(tmp_path: Path) -> None:
    from more_megatron.evaluation.harness.report import write_report

    records = [{"name": "translation", "num_steps": r, "measures": {"translation": {"bleu": 0.1 * r}}} for r in (1, 2)]
    assert "| translation |  | bleu | 0.1000 | 0.2000 |" in write_report(records, {"model": "m"}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md"}


def _hellaswag(path: Path, count: int) -> None:
    rows = [
        {
            "activity_label": "Counting",
            "ctx_a": f"Someone counts to {number}.",
            "ctx_b": "then",
            "endings": ["no", "stops and goes home again", "yes", "is it even"],
            "label": number % 4,
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_hellaswag_from_a_file(run: _Run, tmp_path: Path) -> None:
    _hellaswag(tmp_path / "rows.jsonl", 8)
    found = _evaluate(run, tmp_path / "out", "--num-steps 2", f"hellaswag={tmp_path}/rows.jsonl")
    # Each ending is the right one twice, and every context makes the model prefer one of them.
    assert 0.0 <= found["hellaswag", 2]["hellaswag"]["acc"] <= 1.0
    assert found["hellaswag", 2]["hellaswag"]["count"] == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks babi", "task babi needs its problems: --data babi=FILE, which tools/prepare_tasks.py writes"),
        ("--tasks babi --data babi=absent", "--data babi=absent: there is no such file"),
        (
            "--tasks babi --data chains=FOLDER/broken.jsonl",
            r"is not TASK=FILE with a task of --tasks that reads one \(babi",
        ),
        ("--tasks babi --data babi=FOLDER/broken.jsonl", "broken.jsonl: line 1 is no JSON"),
        ("--tasks babi --data babi=FOLDER/long.jsonl babi=FOLDER/long.jsonl", "and two are long: rename one"),
        ("--tasks hellaswag --data hellaswag=FOLDER/broken.jsonl", "broken.jsonl: line 1 is no JSON object with"),
        ("--tasks wikitext --data wikitext=FOLDER/long.jsonl --num-steps 0", "--num-steps 0 cannot be taken by"),
        ("--tasks wikitext --data wikitext=FOLDER/long.jsonl --num-steps 99999", "--num-steps 99999 must be at most"),
        (
            "--tasks wikitext --data wikitext=FOLDER/long.jsonl --exit-criterion no",
            "--exit-criterion no cannot be taken by .*: criterion 'no' does not exist: choose one of kl,",
        ),
        ("--tasks wikitext --data wikitext=FOLDER/long.jsonl --exit-threshold 1", "needs --exit-criterion: name one"),
        ("--tasks wikitext --data wikitext=FOLDER/empty", "empty is empty"),
        ("--tasks babi --data babi=FOLDER/long.jsonl", "no problem of .*long.jsonl fits into 48 tokens"),
        ("--tasks wikitext --data wikitext=FOLDER/long.jsonl --seq-length 49", "--seq-length 49 must be from 1 to 48"),
        ("--tasks wikitext --data wikitext=FOLDER/long.jsonl --limit 0", "--limit 0 must be at least 1"),
        ("--tasks piqa", "task piqa needs the Hugging Face hub, and there is no network: choose tasks with files"),
        ("--tasks hellaswag", "there is no network: name a file with --data hellaswag=FILE, or set HF_HUB_OFFLINE=1"),
    ],
)
def test_mistakes(run: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str) -> None:
    from more_megatron.data import hub
    from more_megatron.evaluation.harness.evaluation import evaluate

    monkeypatch.setattr(hub, "urlopen", _no_network)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "empty").write_text("")
    write_problems(tmp_path / "long.jsonl", [Problem.ask("word " * 50, "yes", "long", 1)])
    line = f"--load {run.folder}/checkpoint --output {tmp_path}/out --device cpu {flags}"
    with pytest.raises(MoREError, match=message):
        evaluate(parse_arguments(line.replace("FOLDER", str(tmp_path)).split()))


def _no_network(*args: Any, **kwargs: Any) -> None:
    raise OSError("no route to host")


def test_damaged_models(run: _Run, tmp_path: Path) -> None:
    from more_megatron.evaluation.exported_model import open_model

    def opened(flags: str) -> Path:
        words = f"--tasks wikitext --output {tmp_path}/out --device cpu {flags}".split()
        with open_model(parse_arguments(words)) as exported:
            return Path(shutil.copytree(exported.folder, tmp_path / "export"))

    with pytest.raises(MoREError, match="is not a folder of a Hugging Face model: it has no config"):
        opened(f"--model {tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MoREError, match=f"the model {tmp_path} cannot be loaded: ValueError"):
        opened(f"--model {tmp_path}")
    folder = opened(f"--load {run.folder}/checkpoint")
    with pytest.raises(MoREError, match="--ckpt-step is of checkpoints: give --load"):
        opened(f"--model {folder} --ckpt-step 2")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoREError, match=r"lacks 1 of its weights, lm_head\.weight first: export it again"):
        opened(f"--model {folder}")
    with pytest.raises(MoREError, match="--batch-size 0 must be at least 1"):
        opened(f"--load {run.folder}/checkpoint --batch-size 0")
    with pytest.raises(MoREError, match="--device teapot cannot be used"):
        opened(f"--load {run.folder}/checkpoint --device teapot")
