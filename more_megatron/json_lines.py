"""Files of JSON lines: one object a line."""

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from more_megatron.errors import MoREError


def read_json_lines(path: str | os.PathLike[str], remedy: str, fields: Collection[str] = ()) -> dict[int, Any]:
    """Return the objects of a file by the number of their line.

    Raises:
        MoREError: If it cannot be read, is empty, or has a line that is no object with all these fields.
    """
    try:
        # Not `splitlines`: the text in an object may hold other marks of a line's end, such as U+2028.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise MoREError(f"{path} cannot be read ({error}): {remedy}") from error
    found: dict[int, Any] = {number: None for number, line in enumerate(lines, 1) if line.strip()}
    for number in found:
        with contextlib.suppress(ValueError):
            found[number] = json.loads(lines[number - 1])
        if not isinstance(found[number], dict) or not set(fields) <= set(found[number]):
            wanted = f"JSON object with {', '.join(fields)}" if fields else "JSON object"
            raise MoREError(f"{path}: line {number} is no {wanted}: {remedy}")
    if not found:
        raise MoREError(f"{path} is empty: {remedy}")
    return found
