"""Code beside weights: exactly the modules that a system needs, and none that needs another system."""

import json
import re
import sys
from pathlib import Path

import pytest

from more_megatron.hf.exported import system
from more_megatron.hf.exported.system import PUBLIC_MODULES, find_system, system_names, write_code
from tests.hf.reference_models import SYSTEMS, random_model

_FOLDER = Path(system.__file__).parent
_IMPORT = re.compile(r"^\s*(?:from|import)\s+(\.*\w*)", re.MULTILINE)
_ALLOWED = {"torch", "transformers"} | set(sys.stdlib_module_names)


def _imports(path: Path) -> set[str]:
    return set(_IMPORT.findall(path.read_text()))


@pytest.mark.parametrize("path", sorted(_FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_torch_transformers_and_each_other(path: Path) -> None:
    for name in _imports(path):
        module = name.lstrip(".")
        assert (_FOLDER / f"{module}.py").is_file() if name.startswith(".") else module in _ALLOWED, name
        # Without any one system everything else works.
        assert not name.startswith(".") or module not in system_names()


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_export_has_the_modules_that_it_needs(name: str, tmp_path: Path) -> None:
    write_code(tmp_path, name)
    written = {path.stem for path in tmp_path.glob("*.py")}
    assert written & set(SYSTEMS) == {name}
    needed = {*PUBLIC_MODULES, name}
    for module in written:
        needed |= {found.lstrip(".") for found in _imports(tmp_path / f"{module}.py") if found.startswith(".")}
    assert written == needed
    # transformers before version 5 copies what the public modules name, and no further.
    for public in PUBLIC_MODULES:
        direct = {found.lstrip(".") for found in _imports(tmp_path / f"{public}.py") if found.startswith(".")}
        behind = {
            found.lstrip(".")
            for module in direct
            for found in _imports(tmp_path / f"{module}.py")
            if found.startswith(".")
        }
        assert behind <= direct


def test_a_configuration_says_all_of_its_fields(tmp_path: Path) -> None:
    for name in SYSTEMS:
        config = random_model(name).config
        config.save_pretrained(tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["variant"] == name
        assert {*find_system(name).fields, "tie_word_embeddings", "mean_recurrence"} <= written.keys()


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(ValueError, match="variant 'interface' does not exist: choose one of"):
        find_system("interface")
