"""README.md cannot rot: its commands run, and its tables name what there is.

All its ```bash blocks are one script, run by bash in a folder of the test's (see `helpers/shell.py`). Preprocessing is
real, on a small text with a small vocabulary. What `torchrun` would launch on two ranks is trained, `_SMALLER` appended
to its flags, and converted; what needs more ranks is parsed in a world of that size. `make` targets must exist.
"""

import contextlib
import dataclasses
import io
import os
import re
import subprocess
from pathlib import Path

import pytest

from more_megatron.flags import MoREFlags, flag
from more_megatron.systems import systems
from more_megatron.training.arguments import _PLATFORM_DEFAULTS, _SHARED_DEFAULTS, _WAYS_BACK, TrainingFlags
from tests.helpers.corpus import sample_text
from tests.helpers.ranks import run_ranks
from tests.helpers.shell import PROJECT, Call, calls_of, parse, train_call, use

_README = (PROJECT / "README.md").read_text()
_SMALLER = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 --lr-warmup-iters 0 --lr-decay-iters 100 "
    "--eval-iters 1 --eval-interval 2 --log-interval 1 --save-interval 2"
)
_MOST_RANKS = 2
_SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts that README.md assumes to be there."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").mkdir()
    (folder / "quickstart").mkdir()
    for path in (folder / "quickstart" / "text.txt", *(folder / "data" / f"wiki.{x}.tokens" for x in _SPLITS)):
        path.write_text(sample_text(200_000))
    return folder


@pytest.fixture(scope="module")
def calls(folder: Path) -> list[Call]:
    """What the blocks of README.md call."""
    blocks = re.findall(r"^```bash\n(.*?)^```", _README, flags=re.MULTILINE | re.DOTALL)
    script = "\n".join(blocks).replace("wikitext103/preprocess.sh\n", "wikitext103/preprocess.sh data\n")
    return calls_of(script, folder, {"NODE_RANK": "0", "MASTER_ADDR": "node0"})


def test_make_targets_exist(calls: list[Call]) -> None:
    made = [call for call in calls if call.program == "make"]
    assert [call.arguments for call in made] == [["quickstart"], ["test"]]
    for call in made:
        subprocess.run(["make", "--dry-run", *call.arguments], cwd=PROJECT, check=True, capture_output=True)


def test_runs_of_many_ranks_parse(calls: list[Call], folder: Path) -> None:
    large = [call for call in calls if call.program == "torchrun" and call.world_size > _MOST_RANKS]
    assert [call.world_size for call in large] == [16, 8, 16]
    for call in large:
        parse(call, folder)


def test_runs_of_two_ranks_train_resume_convert_and_are_evaluated(calls: list[Call], folder: Path) -> None:
    """Each run but the last trains two steps more than the one before: it continues from its checkpoint."""
    small = [call for call in calls if call.program == "torchrun" and call.world_size <= _MOST_RANKS]
    assert len(small) == 3
    for index, call in enumerate(small):
        steps = 2 * min(index + 1, len(small) - 1)
        ranks = train_call(call, f"{_SMALLER} --train-iters {steps}", folder)
        output = "".join(ended.stdout + ended.stderr for ended in ranks)
        assert all(ended.code == 0 for ended in ranks), output[-4000:]
        assert f"validation loss at iteration {steps}" in output
        assert (f"at iteration {2 * index}" in output) == (index > 0), "did not continue where the run before ended"
    conversions = [call for call in calls if call.program == "convert_checkpoint"]
    assert [call.arguments[0] for call in conversions] == ["to-hf", "from-hf"]
    for call in conversions:
        use(call, "--no-progress", folder)
    for program, smaller in (("evaluate", "--limit 1 --num-steps 1 2"), ("analyze", "--max-tokens 500")):
        pytest.importorskip("lm_eval", reason="lm_eval is not installed")
        [call] = [call for call in calls if call.program == program]
        use(call, f"--device cpu {smaller}", folder)
    assert run_ranks(1, _run_python_block, str(folder))[0].startswith("The history of")


def _run_python_block(folder: str) -> str:
    """Run the ```python block and return what it prints."""
    [block] = re.findall(r"^```python\n(.*?)^```", _README, flags=re.MULTILINE | re.DOTALL)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(block, {})
    return output.getvalue()


def test_jobs_are_scripts_that_exist(calls: list[Call]) -> None:
    scripts = [call.arguments[-1] for call in calls if call.program == "sbatch"]
    assert len(scripts) == 2
    assert all((PROJECT / script).is_file() for script in scripts)


def test_systems_table_names_all() -> None:
    _, _, section = _README.partition("\n## Systems\n")
    named = re.findall(r"^\| `(\w+)` \|", section.partition("\n## ")[0], flags=re.MULTILINE)
    assert sorted(named) == list(systems())


def test_every_flag_of_ours_is_named() -> None:
    fields = [field.name for flags in (MoREFlags, TrainingFlags) for field in dataclasses.fields(flags)]
    own = [name for system in systems().values() for name in system.own_flags()]
    names = {flag(name) for name in (*fields, *own)} | set(_WAYS_BACK)
    assert not [name for name in sorted(names) if f"`{name}" not in _README]


def test_every_default_of_ours_is_named() -> None:
    spelled = {"add_bias_linear": "--disable-bias-linear"}
    names = [*_SHARED_DEFAULTS, *_PLATFORM_DEFAULTS["cuda"]]
    assert not [name for name in names if f"`{spelled.get(name, flag(name))}" not in _README]


def test_files_of_the_tour_exist() -> None:
    tour = _README.split("## Tour of the files")[1].split("## Systems")[0]
    paths = re.findall(r"`((?:more_megatron|tools|examples|docs)/[\w./]*|\w+\.py)`", tour)
    missing = [path for path in paths if not any((base / path).exists() for base in (PROJECT, PROJECT / "tools"))]
    assert len(paths) > 10
    assert not missing
