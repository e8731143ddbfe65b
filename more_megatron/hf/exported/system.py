"""The files of this folder: the system of a name, wherever the folder is, and the modules that an export needs."""

from __future__ import annotations

import importlib
from itertools import chain
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from .interface import System

PUBLIC_MODULES = ("configuration_more", "modeling_more")
"""Modules that `auto_map` in `config.json` names."""

_FOLDER = Path(__file__).parent


def system_names() -> tuple[str, ...]:
    """Return the names of the systems in this folder."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.py") if "\nSYSTEM = " in path.read_text()))


def find_system(name: str) -> System:
    """Return the system of a name.

    Raises:
        ValueError: If there is no such file.
    """
    names = system_names()
    if name not in names:
        raise ValueError(f"variant {name!r} does not exist: choose one of {', '.join(names)}")
    return importlib.import_module(f".{name}", __package__).SYSTEM


def write_code(folder: Path, system: str) -> None:
    """Write the public modules and everything that they and a system import into a folder.

    The system is found by its name when the model is built, while transformers copies the modules that a file imports
    in its text, before version 5 only those of the public modules themselves. So these import all there are. Where this
    code has itself been copied that way, transformers goes on to copy it.
    """
    if not all(_file(name).is_file() for name in PUBLIC_MODULES):
        return
    for name in _modules(*PUBLIC_MODULES, system):
        text = _file(name).read_text()
        if name in PUBLIC_MODULES:
            missing = sorted(_modules(name, system) - {name, *get_relative_imports(_file(name))})
            lines = [f"from .{module} import __name__ as _{module}  # noqa: E402, F401\n" for module in missing]
            text += "".join(["\n# transformers copies the modules that this text names.\n", *lines]) if lines else ""
        (folder / f"{name}.py").write_text(text)


def _file(module: str) -> Path:
    return _FOLDER / f"{module}.py"


def _modules(*names: str) -> set[str]:
    """Return modules and all that they import."""
    return {*names, *(Path(file).stem for file in chain(*map(get_relative_import_files, map(_file, names))))}
