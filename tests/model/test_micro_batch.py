"""What layers are told about a micro-batch."""

import pytest
import torch

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.model.depth import Depth
from more_megatron.model.micro_batch import MicroBatch

_CONFIG = MoREConfig(num_layers=1, hidden_size=8, num_attention_heads=1, recurrence_eval_steps=6)


@pytest.mark.parametrize("sample_ids", [(0,), (7, 9), (2**40, 3, 2**62)])
@pytest.mark.parametrize("training", [True, False])
def test_a_record_arrives_as_it_was_sent(sample_ids: tuple[int, ...], training: bool) -> None:
    sent = MicroBatch(Depth(3, 2), sample_ids)
    assert MicroBatch.of_layer(sent.block_kwargs(), _CONFIG, training) == sent


def test_the_record_stays_in_host_memory() -> None:
    (tensor,) = MicroBatch(Depth(1, 1), (4,)).block_kwargs().values()
    assert tensor.device.type == "cpu"
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [[1, 1, 4]]


def test_evaluation_needs_no_record() -> None:
    assert MicroBatch.of_layer({}, _CONFIG, training=False) == MicroBatch(Depth(6, 0))


def test_training_without_a_record_is_refused() -> None:
    with pytest.raises(MoREError, match="block_kwargs"):
        MicroBatch.of_layer({}, _CONFIG, training=True)
