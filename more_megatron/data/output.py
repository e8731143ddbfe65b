"""A dataset while it is being written: a folder beside it that one run holds, survives a kill, and is renamed last."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from more_megatron.data.encoding import Counts, Encoded, ResumableError
from more_megatron.data.indexed import bin_path, idx_path, manifest_path, write_index
from more_megatron.data.sources import sha256_of
from more_megatron.errors import MoREError, is_out_of_space
from more_megatron.unfinished import LOCK, empty, hold


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a failure to write into one line that says where and what to do."""
    try:
        yield
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        if is_out_of_space(error):
            remedy = "free space, then run the same command again, with --resume if it has that"
            raise ResumableError(f"{what}; {remedy}") from error
        raise MoREError(f"{what}; choose a place that you can write to") from error


class Output:
    """The folder `<prefix>.partial`, held by one run at a time.

    Tokens and document lengths are appended block by block, and a small file says how much of both is valid.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.folder = Path(f"{prefix}.partial")
        self._open = contextlib.ExitStack()
        self._tokens: IO[bytes]
        self._lengths: IO[bytes]

    def __enter__(self) -> Output:
        taken = f"another run is writing {self.prefix}: wait until it has ended, or choose another --output-prefix"
        with writing(self.folder):
            self._lock = hold(self.folder, taken)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._open.close()
            if os.listdir(self.folder) == [LOCK]:
                shutil.rmtree(self.folder)
        self._lock.close()

    def start(self, plan: dict[str, Any], resume: bool) -> Counts:
        """Start empty, or go on where an interrupted run was, and return the counts of what is written already.

        Raises:
            MoREError: The interrupted run followed another plan, or the folder cannot be written.
        """
        plan = json.loads(json.dumps(plan))
        done = self._finished(plan) if resume else None
        with writing(self.folder):
            if done is None:
                empty(self.folder)
                self._replace("plan.json", plan)
            self._tokens = self._open.enter_context((self.folder / "tokens").open("ab"))
            self._lengths = self._open.enter_context((self.folder / "lengths").open("ab"))
            if done is not None:
                self._tokens.truncate(done.tokens * np.dtype(plan["dtype"]).itemsize)
                self._lengths.truncate(done.documents * 4)
        return done or Counts()

    def _finished(self, plan: dict[str, Any]) -> Counts | None:
        """What an interrupted run has written; None if there is nothing whole."""
        try:
            old = json.loads((self.folder / "plan.json").read_text())
            done = Counts(**json.loads((self.folder / "done.json").read_text()))
            sizes = [(self.folder / name).stat().st_size for name in ("tokens", "lengths")]
        except (OSError, ValueError, TypeError):
            return None
        old, new = ({**facts, **facts.get("options", {})} for facts in (old, plan))
        changed = ", ".join(key for key in new if old.get(key) != new[key])
        if changed:
            raise MoREError(f"cannot resume {self.folder}: changed since then: {changed}; run without --resume")
        whole = sizes[0] >= done.tokens * np.dtype(plan["dtype"]).itemsize and sizes[1] >= done.documents * 4
        return done if whole else None

    def append(self, encoded: Encoded, total: Counts) -> None:
        """Write the tokens of a block, then what is valid with it."""
        with writing(self.folder / "tokens"):
            self._tokens.write(encoded.tokens.data)
            self._lengths.write(encoded.lengths.astype("<i4").data)
            self._tokens.flush()
            self._lengths.flush()
            self._replace("done.json", asdict(total))

    def publish(self, facts: dict[str, Any], total: Counts) -> dict[str, Any]:
        """Write the index and the manifest, which is returned, and give all three files their names, the index last."""
        with writing(self.folder):
            self._open.close()
            lengths = np.memmap(self.folder / "lengths", "<i4", mode="r")
            with open(self.folder / "index", "wb") as stream:
                write_index(stream, np.dtype(facts["dtype"]), lengths)
            counts = {name: count for name, count in asdict(total).items() if name not in ("blocks", "read")}
            hashes = {"bin": sha256_of(self.folder / "tokens"), "idx": sha256_of(self.folder / "index")}
            manifest = {**facts, **counts, "sha256": hashes}
            self._replace("manifest.json", manifest)
            idx_path(self.prefix).unlink(missing_ok=True)
            os.replace(self.folder / "tokens", bin_path(self.prefix))
            os.replace(self.folder / "manifest.json", manifest_path(self.prefix))
            os.replace(self.folder / "index", idx_path(self.prefix))
            shutil.rmtree(self.folder)
        return manifest

    def discard(self) -> None:
        """Remove what has been written."""
        with contextlib.suppress(OSError):
            self._open.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _replace(self, name: str, contents: dict[str, Any]) -> None:
        unfinished = self.folder / f"{name}.tmp"
        unfinished.write_text(json.dumps(contents, indent=2) + "\n")
        os.replace(unfinished, self.folder / name)
