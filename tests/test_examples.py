"""The scripts in examples/: each is run by bash, and what it launches is run or parsed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from more_megatron.platform import select_platform
from more_megatron.systems import get_system, systems
from more_megatron.training.arguments import parse_arguments
from more_megatron.training.model import model_config_from_args
from tests.helpers.corpus import sample_text
from tests.helpers.ranks import run_ranks
from tests.helpers.shell import PROJECT, Call, calls_of, linter, parse, train_call
from tests.helpers.systems import in_two_tiers

_SCRIPTS = sorted([*PROJECT.glob("examples/**/*.sh"), *PROJECT.glob("examples/**/*.sbatch"), PROJECT / ".ci" / "run"])
_ON_TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
_TEXT_BYTES = 120_000


@pytest.mark.parametrize("script", _SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_bash_and_shellcheck_accept(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    found = subprocess.run([linter("shellcheck"), "-x", script], cwd=PROJECT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def _debug(variant: str, folder: Path) -> Call:
    (call,) = calls_of(f"bash examples/debug/{variant}.sh --train-iters 2 --log-interval 2", folder)
    assert call.flags[call.flags.index("--more-variant") + 1] == variant
    return call


@pytest.mark.parametrize("variant", systems())
def test_debug_script_parses(variant: str, tmp_path: Path) -> None:
    parse(_debug(variant, tmp_path), tmp_path)


@pytest.mark.parametrize("variant", in_two_tiers(systems()))
def test_debug_script_trains(variant: str, tmp_path: Path) -> None:
    call = _debug(variant, tmp_path)
    for ended in train_call(call, "", tmp_path):
        assert ended.code == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the reference configuration's preprocessing has run, on small texts."""
    folder = tmp_path_factory.mktemp("wikitext103")
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(sample_text(_TEXT_BYTES))
    # From elsewhere, with a folder named from there.
    calls_of("mkdir -p elsewhere && cd elsewhere && bash ../examples/wikitext103/preprocess.sh ..", folder)
    return folder


def test_reference_preprocessing_writes_what_the_runs_read(preprocessed: Path) -> None:
    (call,) = calls_of("bash examples/wikitext103/single_node.sh", preprocessed)
    for flag in ("--train-data-path", "--valid-data-path", "--test-data-path"):
        assert (preprocessed / f"{call.value(flag)}.idx").is_file()


@pytest.mark.parametrize("variant", systems())
def test_reference_parses_on_one_node_and_on_two(variant: str, preprocessed: Path) -> None:
    variables = {"VARIANT": variant}
    (one,) = calls_of("bash examples/wikitext103/single_node.sh", preprocessed, variables)
    (two,) = calls_of("bash examples/wikitext103/multi_node.sh", preprocessed, {**variables, **_ON_TWO_NODES})
    assert (one.world_size, two.world_size) == (8, 16)
    assert one.value("--micro-batch-size") == "6"
    assert two.value("--micro-batch-size") == "3"
    parse(one, preprocessed)
    parse(two, preprocessed)


def test_reasoning_prepares_what_fine_tuning_reads(tmp_path: Path) -> None:
    story = "1 Mary went home.\n2 Where is Mary?\thome\t1\n"
    for split in ("train", "test"):
        for number in (1, 3):
            (tmp_path / f"qa{number}_facts_{split}.txt").write_text(story)
    (tmp_path / "text.txt").write_text(sample_text(_TEXT_BYTES))
    tokenizer = "python tools/preprocess_wikitext.py --input text.txt --output-prefix text --train-tokenizer"
    script = f"""
        {tokenizer} --vocab-size 400 --tokenizer-model quickstart/data/tokenizer.model --no-progress
        bash examples/reasoning/prepare.sh quickstart/data/tokenizer.model reasoning
        bash examples/reasoning/finetune.sh quickstart/checkpoint reasoning --train-iters 7
    """
    (tmp_path / "quickstart" / "data").mkdir(parents=True)
    (call,) = calls_of(script, tmp_path, {"BABI": ".", "TASKS": "1 3"})
    for split in ("train", "valid"):
        at = call.flags.index(f"--{split}-data-path")
        assert call.flags[at + 1 : at + 7 : 2] == ["0.4", "0.3", "0.3"]
        for prefix in call.flags[at + 2 : at + 8 : 2]:
            assert (tmp_path / f"{prefix}_answers.idx").is_file()
    assert call.value("--lr") == "5e-5"
    parse(call, tmp_path)


def _parameters(flags: list[str], world_size: int, folder: str) -> int:
    """Return the number of parameters of a call's model with a vocabulary of 8000; runs in a rank."""
    os.environ["WORLD_SIZE"] = str(world_size)
    os.chdir(folder)
    sys.argv = ["pretrain_more.py", *flags]
    config = model_config_from_args(parse_arguments(select_platform())).transformer
    system = get_system(config.more_variant)
    return system.model_cost(config, 1024, 8000, tied=False).parameters


@pytest.mark.parametrize(("profile", "millions"), [("44m", 44.0), ("244m", 244.0), ("1b", 1040.0)])
def test_models_of_the_paper_have_their_size(profile: str, millions: float, preprocessed: Path) -> None:
    (call,) = calls_of(f"bash examples/moeut/{profile}.sh", preprocessed, {"DATA": "data/wikitext103"})
    (parameters,) = run_ranks(1, _parameters, call.flags, call.world_size, str(preprocessed))
    # With the 8000 pieces of the paper's tokenizer.
    assert parameters == pytest.approx(millions * 1e6, rel=0.01)
