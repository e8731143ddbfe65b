"""Shorter rows at first: the same under every layout, and after a resume."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from more_megatron.training.batch import Batch
from more_megatron.training.flag_table import row_faults
from tests.helpers.ranks import run_ranks
from tests.helpers.reuse import train_all
from tests.helpers.training import TINY

_SYSTEM = "--more-variant recurrent_experts --recurrence-steps 2 --recurrence-backprop-steps 1"
_CURRICULUM = "--seq-length-curriculum 0:4,2:8,4:16"
_LAYOUTS = (
    "--tensor-model-parallel-size 2",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
)


def test_a_batch_is_cut() -> None:
    tokens = torch.arange(16).view(2, 8)
    batch = Batch(tokens=tokens, position_ids=torch.arange(8).expand(2, 8), labels=tokens + 1).cut(4)
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    assert batch.labels is not None
    assert batch.labels.equal(batch.tokens + 1)
    assert batch.loss_mask is None


def test_losses_are_equal_under_all_layouts_and_after_a_resume(tmp_path: Path) -> None:
    line = f"{TINY} {_SYSTEM} {_CURRICULUM}"
    save = f"--save {tmp_path} --save-interval 1 --exit-interval 1"
    _, reference, whole = run_ranks(1, train_all, [f"{line} {save}", line, f"{TINY} {_SYSTEM}"])[0]
    # A row that is cut sees less of what came before.
    differs = [abs(cut - full) > 1e-6 for cut, full in zip(reference.losses, whole.losses, strict=True)]
    assert differs[:2] == [True, True]
    for layout, history in zip(
        _LAYOUTS, run_ranks(2, train_all, [f"{line} {x} --load {tmp_path}" for x in _LAYOUTS])[-1], strict=True
    ):
        assert history.losses == pytest.approx(reference.losses[1:], rel=1e-5), layout
        assert history.grad_norms == pytest.approx(reference.grad_norms[1:], rel=1e-5), layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length_curriculum": "0:5"}, "rows of 5 tokens: their length must divide --seq-length 16"),
        (
            {"seq_length_curriculum": "0:4", "tensor_model_parallel_size": 8},
            "divisible by --tensor-model-parallel-size 8",
        ),
        ({"seq_length_curriculum": "0:4", "loss_on_answers": True}, "--loss-on-answers divides rows by itself"),
        ({"seq_length_curriculum": "0:4", "reset_attention_mask": True}, "together with --reset-attention-mask"),
        ({"loss_on_answers": True, "context_parallel_size": 2}, "together with --context-parallel-size"),
        ({"loss_on_answers": True, "mock_data": True}, "together with --mock-data"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    off = (
        "loss_on_answers",
        "reset_position_ids",
        "reset_attention_mask",
        "dataloader_inter_document_masking",
        "mock_data",
    )
    args = Namespace(
        **dict.fromkeys(off, False), seq_length=16, seq_length_curriculum=None, mtp_num_layers=None,
        tensor_model_parallel_size=1, context_parallel_size=1,
    )  # fmt: skip
    assert not list(row_faults(args))
    vars(args).update(changes)
    assert message in " ".join(row_faults(args))
