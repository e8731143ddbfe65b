"""From input files to an indexed dataset: plan, workers, joining, manifest."""

import contextlib
import ctypes
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any

from more_megatron import __version__
from more_megatron.data.detokenize import Detokenize
from more_megatron.data.documents import PLAIN_GRID_BYTES
from more_megatron.data.encoding import Encoder
from more_megatron.data.errors import DataError, ResumableError
from more_megatron.data.manifest import MANIFEST_VERSION
from more_megatron.data.parts import PartStats, PartWriter, Workspace
from more_megatron.data.progress import Progress
from more_megatron.data.sources import Source, sha256_of
from more_megatron.data.tasks import Task, plan_tasks, read_batches, task_bytes
from more_megatron.data.tokenizers import Tokenizer, build_encoder

__all__ = ["Job", "preprocess"]

# Workers inherit them: numerical libraries would start a thread for each core in each worker.
_THREAD_COUNTS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Names of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Job:
    """One run of the tool.

    Args:
        prefix: output prefix, without `.bin` and `.idx`.
        sources: the inputs, in order.
        tokenizer: the tokenizer.
        append_eod: whether documents end with the end-of-document token.
        detokenize: how WikiText's spelling is undone.
        workers: processes to use.
        resume: whether to go on with the parts of an interrupted run.
    """

    prefix: str
    sources: Sequence[Source]
    tokenizer: Tokenizer
    append_eod: bool = True
    detokenize: Detokenize = Detokenize.NONE
    workers: int = 1
    resume: bool = False


def preprocess(job: Job, progress: Progress) -> dict[str, Any]:
    """Write `<prefix>.bin`, `<prefix>.idx` and the manifest `<prefix>.json`.

    Args:
        job: what to do.
        progress: told of every block.

    Returns:
        The manifest.

    Raises:
        DataError: an input, the tokenizer or the place to write to is at fault; nothing is left under a final name.
    """
    if job.append_eod and job.tokenizer.eod is None:
        raise DataError(
            f"{job.tokenizer.options.tokenizer_type} has no end-of-document token; pass --no-append-eod to do without"
        )
    workspace = Workspace(job.prefix, job.tokenizer.dtype)
    plan = workspace.open(_plan(job), job.resume)
    size = plan["task_bytes"]
    assert isinstance(size, int)
    try:
        return _write(workspace, job, size, progress)
    except ResumableError:
        raise
    except DataError:
        # Mending an input changes it, so its finished parts are of no use.
        workspace.discard()
        raise


def _write(workspace: Workspace, job: Job, size: int, progress: Progress) -> dict[str, object]:
    hashes = _Hashes(job.sources)
    parts = 0
    total = PartStats()
    for stats in _in_order(workspace, job, size, progress):
        workspace.append_tokens(parts)
        total += stats
        parts += 1
    if total.tokens == 0:
        names = ", ".join(source.path for source in job.sources[:3])
        raise DataError(f"there is no text to write in {names}")
    manifest = _manifest(job, total, hashes.result())
    workspace.publish(parts, manifest)
    return manifest


def _plan(job: Job) -> dict[str, object]:
    """Everything that decides the output, in a form that survives a round trip through JSON."""
    options = job.tokenizer.options
    plan = {
        "inputs": [[source.path, source.size, os.stat(source.path).st_mtime_ns] for source in job.sources],
        "layouts": [source.layout for source in job.sources],
        "json_key": [source.key for source in job.sources],
        "tokenizer": [asdict(options), job.tokenizer.sha256],
        "append_eod": job.append_eod,
        "detokenize": job.detokenize,
        "plain_grid_bytes": PLAIN_GRID_BYTES,
        "task_bytes": task_bytes(job.sources, job.workers),
    }
    result: dict[str, object] = json.loads(json.dumps(plan))
    return result


def _in_order(workspace: Workspace, job: Job, size: int, progress: Progress) -> Iterator[PartStats]:
    """Counts of all parts in the order of the input, made now or by an interrupted run."""
    tasks = plan_tasks(job.sources, size)
    first = list(islice(tasks, job.workers))
    if len(first) < 2 or job.workers < 2:
        encoder = build_encoder(job.tokenizer, job.append_eod)
        for task in (*first, *tasks):
            yield _finished(workspace, task, progress) or _run(workspace, encoder, job.detokenize, task, progress.add)
        return
    with _Pool(workspace, job, len(first), progress) as pool:
        yield from pool.run(_chain(first, tasks))


def _chain(first: Sequence[Task], rest: Iterator[Task]) -> Iterator[Task]:
    yield from first
    yield from rest


def _finished(workspace: Workspace, task: Task, progress: Progress) -> PartStats | None:
    stats = workspace.finished(task.number)
    if stats is not None:
        progress.skip(task.stop - task.start, stats.tokens)
    return stats


def _run(workspace: Workspace, encoder: Encoder, mode: Detokenize, task: Task, add: Any) -> PartStats:
    writer = PartWriter(workspace, task.number)
    try:
        for batch in read_batches(task, mode):
            stats = writer.write(batch.documents, encoder.encode(batch.documents))
            add(batch.size, stats.tokens)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


class _Pool:
    """Worker processes that each turn tasks into parts, and the counters through which they report."""

    def __init__(self, workspace: Workspace, job: Job, workers: int, progress: Progress) -> None:
        # Fresh interpreters: forking a process that may run threads can lock up.
        context = get_context("spawn")
        for name in _THREAD_COUNTS:
            os.environ.setdefault(name, "1")
        self._counters = context.Array("Q", 2)
        self._seen = (0, 0)
        self._workspace = workspace
        self._progress = progress
        self._window = 2 * workers
        arguments = (workspace, job.tokenizer, job.append_eod, job.detokenize, self._counters)
        self._executor = ProcessPoolExecutor(workers, context, _start_worker, arguments)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
        # An error line ends the process without more ado, and Python would warn of a lock that still exists then.
        del self._executor, self._counters

    def run(self, tasks: Iterator[Task]) -> Iterator[PartStats]:
        """Work on tasks, a bounded number ahead, and give their counts in order."""
        pending: dict[int, Future[PartStats] | PartStats] = {}
        following = 0
        for task in tasks:
            done = _finished(self._workspace, task, self._progress)
            pending[task.number] = done or self._executor.submit(_work, task)
            while len(pending) >= self._window:
                yield self._take(pending, following)
                following += 1
        while pending:
            yield self._take(pending, following)
            following += 1

    def _take(self, pending: dict[int, "Future[PartStats] | PartStats"], number: int) -> PartStats:
        part = pending[number]
        if isinstance(part, PartStats):
            return pending.pop(number)  # type: ignore[return-value]
        try:
            while not part.done():
                running = [future for future in pending.values() if isinstance(future, Future) and not future.done()]
                wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                self._report()
                for future in pending.values():
                    if isinstance(future, Future) and future.done():
                        future.result()
            del pending[number]
            return part.result()
        except BrokenProcessPool as error:
            raise ResumableError(
                "a worker process died, most likely for want of memory; run again with --resume and fewer --workers"
            ) from error

    def _report(self) -> None:
        now = (self._counters[0], self._counters[1])
        self._progress.add(now[0] - self._seen[0], now[1] - self._seen[1])
        self._seen = now


_worker: tuple[Workspace, Encoder, Detokenize, Any] | None = None


def _start_worker(
    workspace: Workspace, tokenizer: Tokenizer, append_eod: bool, mode: Detokenize, counters: Any
) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker alone would wait for ever: its queue stays open as long as any other worker lives.
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _keep_freed_memory()
    _worker = (workspace, build_encoder(tokenizer, append_eod), mode, counters)


def _keep_freed_memory() -> None:
    """Tell glibc not to give the arrays of a window back: those of the next would be faulted in again page by page."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 1 << 26)
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task) -> PartStats:
    assert _worker is not None
    workspace, encoder, mode, counters = _worker

    def add(size: int, tokens: int) -> None:
        with counters.get_lock():
            counters[0] += size
            counters[1] += tokens

    return _run(workspace, encoder, mode, task, add)


class _Hashes:
    """Hashes the inputs while the workers are busy."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._hashes: list[str] = []
        self._thread = threading.Thread(target=self._compute, args=(sources,), daemon=True)
        self._thread.start()

    def _compute(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._hashes.append(sha256_of(source.path))

    def result(self) -> list[str]:
        """SHA-256 of each input."""
        self._thread.join()
        return self._hashes


def _manifest(job: Job, total: PartStats, hashes: Sequence[str]) -> dict[str, object]:
    tokenizer = job.tokenizer
    return {
        "version": MANIFEST_VERSION,
        "written_by": f"more-megatron {__version__}",
        "inputs": [
            {
                "path": os.path.abspath(source.path),
                "bytes": source.size,
                "sha256": sha256,
                "layout": source.layout or "rows",
            }
            for source, sha256 in zip(job.sources, hashes, strict=True)
        ],
        "tokenizer": {
            "type": tokenizer.options.tokenizer_type,
            "model": tokenizer.options.tokenizer_model,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
        },
        "dtype": tokenizer.dtype.name,
        **asdict(total),
        "options": {
            "append_eod": job.append_eod,
            "detokenize": job.detokenize,
            "tokenizer": {key: value for key, value in asdict(tokenizer.options).items() if value},
        },
    }
