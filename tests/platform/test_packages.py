"""The wrong `apex`, and the right one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from more_megatron.errors import MoREError
from more_megatron.platform.packages import check_apex, has_package


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that modules are imported from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_no_apex_is_fine(site: Path) -> None:
    assert not has_package("apex")
    check_apex()


def test_unrelated_apex_is_refused(site: Path) -> None:
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("")
    with pytest.raises(MoREError, match=r"is not NVIDIA apex.*pip uninstall apex"):
        check_apex()


def test_unrelated_module_is_refused(site: Path) -> None:
    (site / "apex.py").write_text("")
    with pytest.raises(MoREError, match=r"apex\.py is not NVIDIA apex"):
        check_apex()


def test_nvidia_apex_is_accepted(site: Path) -> None:
    (site / "apex" / "multi_tensor_apply").mkdir(parents=True)
    (site / "apex" / "__init__.py").write_text("")
    check_apex()
