"""The wrong `apex`, the right one, and none where there is no CUDA."""

import importlib
import sys
from pathlib import Path

import pytest

from more_megatron.errors import MoREError
from more_megatron.platform.packages import check_apex, has_package, hide_cuda_packages


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that modules are imported from."""
    # Where this process has set up the CPU platform, the package is hidden.
    monkeypatch.delitem(sys.modules, "apex", raising=False)
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


def test_packages_of_cuda_kernels_are_absent_once_they_are_hidden(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("")
    assert has_package("apex")
    # A copy, so that nothing is hidden when this test is over.
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    hide_cuda_packages()
    assert not has_package("apex")
    assert sys.modules["apex"] is None


def test_a_package_that_was_imported_on_purpose_is_not_hidden(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (site / "apex.py").write_text("KERNELS = 1")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    sys.modules["apex"] = importlib.import_module("apex")
    hide_cuda_packages()
    assert sys.modules["apex"].KERNELS == 1
