"""The queue over which the writers of checkpoints report."""

import queue

import pytest

from more_megatron.platform.repairs.checkpoint_writer import PickledQueue


def test_the_keeper_of_the_queue_need_import_nothing_to_hold_what_is_in_it() -> None:
    kept: queue.Queue = queue.Queue()
    results = PickledQueue(kept)
    results.put({0: [RuntimeError("disk full")]})
    assert [type(item) for item in kept.queue] == [bytes]
    [error] = results.get_nowait()[0]
    assert (type(error), str(error)) == (RuntimeError, "disk full")
    with pytest.raises(queue.Empty):
        results.get_nowait()
