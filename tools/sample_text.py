"""Text to try things with: a WikiText file, a download, or the English that ships with every Python.

The last is CPython's own reference (`pydoc_data.topics`) and the docstrings of its standard library, laid out like
WikiText: articles under ` = Title = `, sections under ` = = Section = = `, one line a paragraph.
"""

import ast
import inspect
import itertools
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from more_megatron.data.hub import download
from more_megatron.data.output import writing
from more_megatron.data.sources import expand_inputs, open_source, text_chunks
from more_megatron.errors import MoREError
from more_megatron.unfinished import unfinished_file

_DOWNLOAD = "wikitext-2-raw-v1"
_LEAST_WORDS = 40
_ENOUGH = 1_500_000
_UNDERLINE = re.compile(r"^[=\-*~^\"'#]{3,}\s*$")
_MARKUP = re.compile(r":[\w:]+:`[~!]?([^`<]*?)(?: <[^`>]*>)?`|\*\*([^*\n]+)\*\*|``([^`\n]+)``")


def obtain_text(path: str | os.PathLike[str], wikitext: str | None = None) -> str:
    """Put a text at `path` from the best source there is.

    Args:
        path: the file to write.
        wikitext: a file of the user's, of any kind that the preprocessing tool reads.

    Returns:
        Which source it was, in words.

    Raises:
        MoREError: the user's file is missing or damaged, or `path` cannot be written.
    """
    if wikitext:
        _copy(expand_inputs([wikitext])[0], path)
        return f"your file {wikitext}"
    try:
        files = download(_DOWNLOAD)
        _copy(files[0], path)
    except (MoREError, ImportError):
        return write_sample_text(path)
    return f"{_DOWNLOAD}, downloaded"


def write_sample_text(path: str | os.PathLike[str]) -> str:
    """Write the standard library's English as a WikiText file, the same each time on one version of Python.

    Args:
        path: the file to write.

    Returns:
        What it is, in words.
    """
    text, number = "", 0
    for article in _articles():
        text, number = text + article, number + 1
        if len(text) >= _ENOUGH:
            break
    _write(path, [text.encode()])
    return f"English from Python's own documentation, {number} articles, {len(text) / 1e6:.1f} MB"


def _copy(source_path: str, path: str | os.PathLike[str]) -> None:
    _write(path, text_chunks(open_source(source_path)))


def _write(path: str | os.PathLike[str], chunks: Iterable[bytes]) -> None:
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with unfinished_file(Path(path)) as unfinished, open(unfinished, "wb") as target:
            target.writelines(chunks)


def _articles() -> Iterator[str]:
    from pydoc_data.topics import topics

    parts = [(name, [("", text)]) for name, text in sorted(topics.items())]
    modules = ((module, list(_docstrings(source))) for module, source in _modules())
    yield from filter(None, itertools.starmap(_article, itertools.chain(parts, modules)))


def _article(title: str, sections: list[tuple[str, str]]) -> str | None:
    lines = [f" \n = {title} = \n \n"]
    words = 0
    for section, text in sections:
        paragraphs = list(_paragraphs(text))
        if section and paragraphs:
            lines.append(f" = = {section} = = \n \n")
        for paragraph, is_heading in paragraphs:
            words += len(paragraph.split())
            lines.append(f" = = {paragraph} = = \n \n" if is_heading else f" {paragraph} \n")
        lines.append(" \n")
    return "".join(lines) if words >= _LEAST_WORDS else None


def _paragraphs(text: str) -> Iterator[tuple[str, bool]]:
    """Paragraphs on one line each, and whether they are headings; code and tables are left out."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines = [line.rstrip() for line in block.strip("\n").splitlines()]
        heading = len(lines) == 2 and _UNDERLINE.match(lines[1]) is not None
        lines = [line for line in lines if not _UNDERLINE.match(line)]
        joined = " ".join(" ".join(lines).split())
        if not joined or ">>>" in joined or joined.startswith((".. ", "| ", "+-")):
            continue
        joined = _MARKUP.sub(lambda match: next(group for group in match.groups() if group is not None), joined)
        letters = sum(character.isalpha() or character == " " for character in joined)
        if heading or letters > 0.75 * len(joined):
            yield joined, heading and len(joined) < 80


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "__pycache__", "lib2to3"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not skipped.intersection(relative.parts):
            try:
                yield ".".join(relative.with_suffix("").parts).removesuffix(".__init__"), path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "") if isinstance(node, ast.ClassDef) else "", text
