"""What a kill leaves in the cache of dataset indices is removed, and nothing else."""

import json
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from more_megatron.training.index_cache import cache_folder, only_writer, remove_unusable_indices

_ARRAYS = ("document_index", "sample_index", "shuffle_index")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Return a cache with the whole indices of two splits of one dataset."""
    prefix = tmp_path / "text"
    Path(f"{prefix}.idx").write_bytes(b"index")
    os.utime(f"{prefix}.idx", (0, 0))
    folder = cache_folder(str(prefix))
    folder.mkdir(parents=True)
    for split in ("train", "valid"):
        for number, name in enumerate(_ARRAYS):
            np.save(folder / f"abc-GPTDataset-{split}-{name}.npy", np.arange(100 + number))
        description = {"class": "GPTDataset", "dataset_path": str(prefix), "index_split": split}
        (folder / f"abc-GPTDataset-{split}-description.txt").write_text(json.dumps(description))
    return folder


def _splits(folder: Path) -> dict[str, int]:
    return {split: len(list(folder.glob(f"*-{split}-*"))) for split in ("train", "valid")}


def test_whole_indices_stay(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove_unusable_indices([cache, cache / "no such folder"])
    assert _splits(cache) == {"train": 4, "valid": 4}
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", _ARRAYS)
@pytest.mark.parametrize("size", [0, 5, 60, 300])
def test_truncated_index_is_removed_with_its_split(cache: Path, name: str, size: int) -> None:
    os.truncate(cache / f"abc-GPTDataset-train-{name}.npy", size)
    remove_unusable_indices([cache])
    assert _splits(cache) == {"train": 0, "valid": 4}


def test_truncated_description_is_removed_with_its_split(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(cache / "abc-GPTDataset-valid-description.txt", 10)
    remove_unusable_indices([cache])
    assert _splits(cache) == {"train": 4, "valid": 0}
    assert "abc-GPTDataset-valid" in capsys.readouterr().out


def test_index_of_former_data_is_removed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "text.idx").write_bytes(b"preprocessed again")
    later = 2 * max(path.stat().st_mtime for path in cache.iterdir())
    os.utime(tmp_path / "text.idx", (later, later))
    remove_unusable_indices([cache])
    assert _splits(cache) == {"train": 0, "valid": 0}


def test_blend_is_as_old_as_its_newest_part(cache: Path, tmp_path: Path) -> None:
    description = {"class": "BlendedDataset", "datasets": [{"dataset_path": str(tmp_path / "text")}], "weights": [1.0]}
    np.save(cache / "def-BlendedDataset-train-dataset_index.npy", np.arange(5))
    (cache / "def-BlendedDataset-train-description.txt").write_text(json.dumps(description))
    remove_unusable_indices([cache])
    assert len(list(cache.glob("def-*"))) == 2
    os.utime(tmp_path / "text.idx", (2**32, 2**32))
    remove_unusable_indices([cache])
    assert list(cache.iterdir()) == []


def _write_slowly(folder: Path, started: Event) -> None:
    with only_writer([folder]):
        array = folder / "abc-GPTDataset-train-document_index.npy"
        os.truncate(array, 60)
        started.set()
        time.sleep(1.0)
        np.save(array, np.arange(100))


def test_what_another_run_is_writing_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    other = context.Process(target=_write_slowly, args=(cache, started))
    other.start()
    assert started.wait(60)
    with only_writer([cache]):
        remove_unusable_indices([cache])
        assert _splits(cache) == {"train": 4, "valid": 4}
    other.join()
    assert other.exitcode == 0
    assert "waiting for another run" in capsys.readouterr().out


def test_folder_that_cannot_be_written_to_is_left_to_megatron(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with only_writer([tmp_path / "file" / "cache"]):
        pass
