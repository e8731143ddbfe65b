"""Checkpoints of every system and layout become Hugging Face models, and come back without losing a bit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from more_megatron.hf.conversion.megatron_reader import MegatronCheckpoint
from more_megatron.hf.mapping import entries
from tests.helpers.ranks import run_ranks
from tests.hf.conversion_runs import (
    IN_MATRIX,
    RUNS,
    WITHOUT_ARGUMENTS,
    Reported,
    command_line,
    convert,
    train_runs,
    write_data,
)

_NAMES = [pytest.param(name, marks=pytest.mark.matrix if name in IN_MATRIX else ()) for name in RUNS]
_CONTINUED = ("moe, tp2, many features", "recurrent_moe, ep2", "recurrent_experts, ep2", "shared_block_ffn, ep2")
_OTHER_LAYOUT = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 1 --tensor-model-parallel-size 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all runs and their data."""
    folder = tmp_path_factory.mktemp("conversion")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, whole_matrix: bool) -> dict[str, Reported]:
    """Return what each run reported; its checkpoint lies in a folder of its name."""
    runs = {name: flags for name, flags in RUNS.items() if whole_matrix or name not in IN_MATRIX}
    lines = []
    for number, (name, flags) in enumerate(runs.items()):
        # Flags are separated by blanks: names with blanks are linked.
        place = folder / f"run{number}"
        lines.append(command_line(folder, f"{flags} --save {place / 'run'}"))
        (folder / name).symlink_to(place)
    return dict(zip(runs, run_ranks(2, train_runs, lines)[-1], strict=True))


@pytest.fixture(scope="module")
def converted(folder: Path, trained: dict[str, Reported]) -> dict[str, list[str]]:
    """Return what was said while each checkpoint was converted there and back."""
    (said,) = run_ranks(1, convert, folder, list(trained))
    return said


@pytest.mark.parametrize("name", _NAMES)
def test_both_sides_agree(
    name: str, folder: Path, trained: dict[str, Reported], converted: dict[str, list[str]]
) -> None:
    there, hashes, logits, back, hashes_back, _, hashes_of_half, logits_of_half, loss = converted[name]
    assert there.startswith(f"{folder / name / 'hf'}: {RUNS[name].split()[1]} of {folder / name / 'run'}")
    assert back.startswith(f"{folder / name / 'back'}: ")
    assert hashes == hashes_back
    assert "have the same hashes on both sides" in hashes
    assert logits.startswith("verified: logits of 16 tokens differ from Megatron's by ")
    assert (hashes_of_half, logits_of_half.split("differ")[0]) == (hashes, logits.split("differ")[0])
    assert float(loss) == pytest.approx(trained[name].validation, abs=1e-4)


@pytest.mark.parametrize("name", _NAMES)
def test_megatron_tensors_come_back_bit_for_bit(name: str, folder: Path, converted: dict[str, list[str]]) -> None:
    before, after = MegatronCheckpoint(folder / name / "run"), MegatronCheckpoint(folder / name / "back")
    assert after.path.name == "release"
    assert after.shapes() == before.shapes()
    config = json.loads((folder / name / "hf" / "config.json").read_text())
    for entry in entries(config):
        assert after.dtype(entry) == before.dtype(entry)
        assert torch.equal(after.read(entry), before.read(entry))
    assert _objects(before) - {"rng_state", "rerun_state_machine_state"} <= _objects(after)


@pytest.mark.parametrize("name", _NAMES)
def test_huggingface_files_come_back_the_same(name: str, folder: Path, converted: dict[str, list[str]]) -> None:
    first, again = folder / name / "hf", folder / name / "again"
    before, after = _weights(first), _weights(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config, config_again = (json.loads((place / "config.json").read_text()) for place in (first, again))
    assert config_again == {key: value for key, value in config.items() if key in config_again}
    missing = config.keys() - config_again.keys()
    assert missing == ({"bos_token_id", "eos_token_id", "pad_token_id"} if name == WITHOUT_ARGUMENTS else set())
    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert len(list(first.glob("*.safetensors"))) > 1


def test_export_says_what_it_is(folder: Path, converted: dict[str, list[str]]) -> None:
    export = folder / "recurrent_experts, ep2" / "hf"
    generation = json.loads((export / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 126, "eos_token_id": 126, "pad_token_id": 126}
    card = (export / "README.md").read_text()
    for row in ("`recurrent_experts`", "| iteration | 2 |", "| tokens seen | 128 |", "| `--lr` | 0.001 |"):
        assert row in card
    arguments = (export / "megatron_args.json").read_text()
    assert str(folder) not in arguments
    assert json.loads(arguments)["recurrence_ffn_hidden_size"] == 40


def test_runs_begin_from_what_came_back(folder: Path, converted: dict[str, list[str]]) -> None:
    lines = []
    for name in _CONTINUED:
        for source in ("run --finetune", "back"):
            place = (folder / name).resolve() / source
            lines.append(
                command_line(folder, f"{RUNS[name]} {_OTHER_LAYOUT} --load {place}").replace("--save-interval 2", "")
            )
    reports = run_ranks(2, train_runs, lines)[-1]
    for number, name in enumerate(_CONTINUED):
        expected, found = reports[2 * number : 2 * number + 2]
        assert len(found.losses) == 2, name
        assert found == expected, name


def _objects(checkpoint: MegatronCheckpoint) -> set[str]:
    """Return the objects of a checkpoint with their places; of those that belong to no module the names."""
    metadata = pickle.loads((checkpoint.path / ".metadata").read_bytes())
    names = {name for name, info in metadata.state_dict_metadata.items() if not hasattr(info, "size")}
    return {name if "_extra_state" in name or "common" in name else name.split("/")[0] for name in names}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
