"""Parts of a dataset that is being written: finished ones survive a kill, and are joined in the order of the input."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from more_megatron.data.encoding import Encoded
from more_megatron.data.errors import DataError, ResumableError
from more_megatron.data.indexed import bin_path, idx_path, write_index

__all__ = ["PartStats", "PartWriter", "Workspace", "writing"]

_SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class PartStats:
    """Counts of one part, or of several added up.

    Args:
        documents: documents, empty ones included.
        tokens: tokens, those that end documents included.
        text_bytes: bytes of the documents' text as UTF-8.
        words: runs of bytes between ASCII white space in that text.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    words: int = 0

    def __add__(self, other: "PartStats") -> "PartStats":
        return PartStats(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            text_bytes=self.text_bytes + other.text_bytes,
            words=self.words + other.words,
        )


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to write into one line that says where and what to do.

    Raises:
        ResumableError: the disk is full or a quota is used up.
        DataError: the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        if error.errno in _SPACE_ERRORS:
            raise ResumableError(f"{what}; free space, then run the same command with --resume") from error
        raise DataError(f"{what}; choose a place that you can write to") from error


class PartWriter:
    """Writes one part: tokens as they come, then the document lengths, then the counts that mark it as finished.

    Args:
        workspace: where parts are kept.
        number: the part's place in the output.
    """

    def __init__(self, workspace: "Workspace", number: int) -> None:
        self._paths = workspace.part(number)
        self._stats = PartStats()
        self._lengths: list[NDArray[np.int32]] = []
        with writing(self._paths.tokens):
            self._stream = self._paths.tokens.open("wb")

    def write(self, documents: list[bytes], encoded: Encoded) -> PartStats:
        """Append documents.

        Args:
            documents: their text.
            encoded: their tokens.

        Returns:
            Their counts.
        """
        with writing(self._paths.tokens):
            self._stream.write(encoded.tokens.data)
        self._lengths.append(encoded.lengths)
        stats = PartStats(
            documents=len(documents),
            tokens=len(encoded.tokens),
            text_bytes=sum(map(len, documents)),
            words=_count_words(documents),
        )
        self._stats += stats
        return stats

    def finish(self) -> PartStats:
        """Close the part and mark it as finished."""
        paths = self._paths
        with writing(paths.tokens):
            self._stream.close()
            lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
            lengths.astype("<i4").tofile(paths.lengths)
            unfinished = paths.stats.with_suffix(".tmp")
            unfinished.write_text(json.dumps(asdict(self._stats)))
            os.replace(unfinished, paths.stats)
        return self._stats

    def abandon(self) -> None:
        """Remove what was written of an unfinished part."""
        with contextlib.suppress(OSError):
            self._stream.close()
        for path in (self._paths.tokens, self._paths.lengths):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _count_words(documents: list[bytes]) -> int:
    text = np.frombuffer(b" ".join([b"", *documents]), dtype=np.uint8)
    # Space, and the five bytes from tab to carriage return.
    white = text == 0x20
    white |= text - 0x09 < 5
    return int(np.count_nonzero(white[:-1] > white[1:]))


@dataclass(frozen=True)
class PartPaths:
    """The files of one part."""

    tokens: Path
    lengths: Path
    stats: Path


class Workspace:
    """The folder beside the output in which parts are collected.

    Args:
        prefix: output prefix; the folder is `<prefix>.partial`.
        dtype: dtype of the token ids.
    """

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.folder = Path(f"{prefix}.partial")

    def open(self, plan: dict[str, object], resume: bool) -> dict[str, object]:
        """Start with an empty folder, or go on with the parts of an interrupted run.

        Args:
            plan: everything that decides the output.
            resume: whether finished parts may be used.

        Returns:
            The plan to follow: that of the interrupted run, or the one given.

        Raises:
            DataError: the interrupted run was about something else, or the folder cannot be written.
        """
        path = self.folder / "plan.json"
        if resume and path.exists():
            old: dict[str, object] = json.loads(path.read_text())
            changed = [key for key in plan if key != "task_bytes" and old.get(key) != plan[key]]
            if changed:
                names = ", ".join(changed)
                raise DataError(f"cannot resume {self.folder}: changed since then: {names}; run without --resume")
            return old
        with writing(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(plan))
            os.replace(unfinished, path)
        return plan

    def part(self, number: int) -> PartPaths:
        """Files of a part."""
        stem = self.folder / f"part-{number:06d}"
        return PartPaths(stem.with_suffix(".bin"), stem.with_suffix(".len"), stem.with_suffix(".json"))

    def finished(self, number: int) -> PartStats | None:
        """Counts of a part if it is complete."""
        paths = self.part(number)
        try:
            stats = PartStats(**json.loads(paths.stats.read_text()))
            complete = paths.tokens.stat().st_size == stats.tokens * self.dtype.itemsize
            complete &= paths.lengths.stat().st_size == stats.documents * 4
        except (OSError, ValueError, TypeError):
            return None
        return stats if complete else None

    def append_tokens(self, number: int) -> None:
        """Copy a part's tokens to the end of the joined file; the parts must come in order."""
        joined = self.folder / "joined.bin"
        source = self.part(number).tokens
        with writing(joined), open(joined, "ab" if number else "wb") as target, open(source, "rb") as part:
            shutil.copyfileobj(part, target, 1 << 22)

    def publish(self, parts: int, manifest: dict[str, object]) -> None:
        """Write the index and the manifest, and give all three files their names, the index last."""
        index, tokens, facts = (self.folder / f"joined{suffix}" for suffix in (".idx", ".bin", ".json"))
        with writing(index):
            with open(index, "wb") as stream:
                write_index(stream, self.dtype, lambda: self._document_lengths(parts))
            facts.write_text(json.dumps(manifest, indent=2) + "\n")
            idx_path(self.prefix).unlink(missing_ok=True)
            os.replace(tokens, bin_path(self.prefix))
            os.replace(facts, f"{self.prefix}.json")
            os.replace(index, idx_path(self.prefix))
            shutil.rmtree(self.folder)

    def discard(self) -> None:
        """Remove the folder and all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _document_lengths(self, parts: int) -> Iterator[NDArray[np.int32]]:
        for number in range(parts):
            yield np.fromfile(self.part(number).lengths, dtype="<i4")
