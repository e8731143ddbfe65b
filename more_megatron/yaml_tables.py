"""YAML files that users write: a table of keys, each of which stands there once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from more_megatron.errors import MoREError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader would take the last of several values of a key, and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a table, whose keys are all different."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_table(path: Path, name: str, remedy: str, expand: Callable[[str], str] = str) -> dict[Any, Any]:
    """Return the keys of a file.

    Args:
        path: The file.
        name: What a refusal calls it.
        remedy: What to do about a file that holds something else.
        expand: What the text goes through first.

    Raises:
        MoREError: If it cannot be read, is no table, or has a key twice.
    """
    try:
        content = yaml.load(expand(path.read_text(encoding="utf-8")), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MoREError(f"{name} {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise MoREError(f"{name} {path} is no table of keys: {remedy}")
    return content
