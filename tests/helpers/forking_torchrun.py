"""`torchrun` that imports Megatron once and forks its ranks: they start in a fraction of the time.

Ranks that are forked hand their return value to the launcher, which waits for it. Those of `pretrain_more.py` end
their process themselves and have none: as with ranks that are programs, the exit code says that they are done.
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, RunProcsResult

import tests.helpers.preload  # noqa: F401

_POLL = MultiprocessContext._poll


def _poll(self: MultiprocessContext) -> RunProcsResult | None:
    context = self._pc
    if context is not None and all(process.exitcode == 0 for process in context.processes):
        nothing = dict.fromkeys(range(self.nprocs))
        return RunProcsResult(return_values=nothing, stdouts=self.stdouts, stderrs=self.stderrs)
    return _POLL(self)


if __name__ == "__main__":
    MultiprocessContext._poll = _poll
    run.main(["--run-path", "--start-method", "fork", *sys.argv[1:]])
