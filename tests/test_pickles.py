"""Nothing that a checkpoint names is run, and nothing outside of its folder is read."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from more_megatron.checkpoint_files import fault, newest_clean_iteration, newest_complete_iteration
from more_megatron.errors import MoREError
from more_megatron.pickles import load_strictly, read_metadata
from tests.helpers.program import finished, pretrain_more, refused
from tests.helpers.training import TINY

_RUN = f"{TINY} --num-layers 2 --train-iters 4"


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple:
        return (exec, (f"open({str(self._trace)!r}, 'w')",))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    finished(f"{_RUN} --save {folder} --save-interval 2")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of those checkpoints."""
    return shutil.copytree(saved, tmp_path / "copy")


def _change_index(checkpoint: Path, change: Any) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _put_in_object(checkpoint: Path, key: str, value: Any) -> None:
    """Replace an object of the checkpoint, at the end of its data file."""

    def change(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        index = next(index for index in metadata.storage_data if index.fqn.startswith(key))
        info = metadata.storage_data[index]
        content = io.BytesIO()
        torch.save(value, content)
        with open(checkpoint / info.relative_path, "ab") as file:
            info.offset, info.length = file.tell(), len(content.getvalue())
            file.write(content.getvalue())

    _change_index(checkpoint, change)


@pytest.mark.parametrize("key", ["common_state/", "rng_state/", "decoder.layers.self_attention"])
def test_code_in_an_object_is_not_run(folder: Path, tmp_path: Path, key: str) -> None:
    trace = tmp_path / "trace"
    _put_in_object(folder / "iter_0000004", key, [_Code(trace)])
    assert fault(folder / "iter_0000004") is None
    refused(pretrain_more(1, f"{_RUN} --load {folder}")[0], "could run code")
    assert not trace.exists()


def test_code_in_the_index_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    _change_index(folder / "iter_0000004", lambda metadata: setattr(metadata, "planner_data", _Code(trace)))
    refused(pretrain_more(1, f"{_RUN} --load {folder}")[0], "could run code", "--ckpt-step 2")
    assert newest_complete_iteration(folder) == 2
    assert not trace.exists()


def test_an_index_without_tensors_is_damaged(folder: Path) -> None:
    _change_index(folder / "iter_0000004", lambda metadata: setattr(metadata, "state_dict_metadata", None))
    assert fault(folder / "iter_0000004") == "its .metadata does not say what is in it"
    assert newest_clean_iteration(folder) == 2


def test_code_beside_a_tensor_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    _put_in_object(folder / "iter_0000004", "output_layer.weight", {"tensor": torch.zeros(1), "code": _Code(trace)})
    [ended] = pretrain_more(1, f"{_RUN} --load {folder}")
    assert ended.code == 1
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["absolute", "relative", "link"])
def test_file_outside_is_not_read(folder: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = folder / "iter_0000004"
    [data] = checkpoint.glob("*.distcp")
    outside = shutil.move(data, tmp_path / "outside.distcp")
    name = {"absolute": str(outside), "relative": "../../outside.distcp", "link": "link.distcp"}[kind]
    (checkpoint / "link.distcp").symlink_to(outside)

    def change(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        for info in metadata.storage_data.values():
            info.relative_path = name

    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(MoREError, match="not in its folder"):
        read_metadata(checkpoint)
    refused(pretrain_more(1, f"{_RUN} --load {folder}")[0], name, "not in its folder")


def test_checkpoint_behind_a_link_is_read(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "iter_0000004", tmp_path / "elsewhere")
    (folder / "iter_0000004").symlink_to(tmp_path / "elsewhere")
    assert fault(folder / "iter_0000004") is None


def test_objects_keep_their_types() -> None:
    content = io.BytesIO()
    torch.save({"dtype": torch.bfloat16, "tensor": torch.ones(2)}, content)
    content.seek(0)
    assert load_strictly(content)["dtype"] is torch.bfloat16
    with pytest.raises((pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile)):
        load_strictly(io.BytesIO(b"garbage" * 10))
