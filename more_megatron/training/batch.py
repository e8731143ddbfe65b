"""One micro-batch on the ranks that need it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage

from more_megatron.config import MoREConfig
from more_megatron.errors import MoREError
from more_megatron.training.problems import Problems


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Pipeline stages in the middle hold None everywhere but in `packed_seq_params`."""

    tokens: torch.Tensor | None = None  # [b, s], on the first stage
    position_ids: torch.Tensor | None = None  # [b, s], on the first stage
    # True where attention is forbidden, [b, 1, s, s]; None for plain causal attention
    attention_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None  # [b, s], on the last stage
    loss_mask: torch.Tensor | None = None  # [b, s], on the last stage
    packed_seq_params: PackedSeqParams | None = None  # document boundaries, with `--dataloader-inter-document-masking`
    problems: Problems | None = None  # the problems of the rows, on every stage, with `--loss-on-answers`

    def cut(self, length: int) -> Batch:
        """Return the batch with rows of this length, which divides that of its rows."""
        parts = {name: getattr(self, name) for name in ("tokens", "position_ids", "labels", "loss_mask")}
        cut: dict[str, Any] = {name: x.reshape(-1, length) for name, x in parts.items() if x is not None}
        if "position_ids" in cut:
            cut["position_ids"] = cut["position_ids"] % length
        return dataclasses.replace(self, **cut)


def stage_needs_data(config: MoREConfig, vp_stage: int | None) -> bool:
    """Return whether this pipeline stage reads tokens or labels."""
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp(config, vp_stage)


def next_batch(data_iterator: Iterator, config: MoREConfig, vp_stage: int | None) -> Batch:
    """Read the next micro-batch and share it within the tensor- and context-parallel groups.

    The iterator yields dictionaries of tensors; it is read on tensor-parallel rank 0 only.

    Raises:
        MoREError: If a token id is not in the vocabulary.
    """
    args = get_args()
    needs_data = stage_needs_data(config, vp_stage)
    if not needs_data and not reads_boundaries():
        return Batch()
    sample = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else {}
    _check_ids(sample)
    problems, packed_seq_params = None, None
    if args.loss_on_answers:
        problems = Problems.share(sample.get("problems"), args.micro_batch_size, args.seq_length)
    fields = _share(sample, config, vp_stage)
    if args.dataloader_inter_document_masking:
        packed_seq_params = _packed_seq_params(fields)
    if not needs_data:
        return Batch(packed_seq_params=packed_seq_params, problems=problems)
    fields = get_batch_on_this_cp_rank(
        fields,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=args.dataloader_inter_document_masking,
    )
    names = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
    return Batch(**{name: fields[name] for name in names}, packed_seq_params=packed_seq_params, problems=problems)


def reads_boundaries() -> bool:
    """Return whether stages in the middle of a pipeline read data as well: they must know where sequences end."""
    return get_args().dataloader_inter_document_masking or get_args().loss_on_answers


def _check_ids(sample: dict[str, torch.Tensor]) -> None:
    """Check ids, still on the host: embedding and loss divided over ranks would take others for 0, without a word."""
    size = get_tokenizer().vocab_size
    for name in ("tokens", "labels"):
        for found in sample[name].aminmax() if name in sample else ():
            if not 0 <= found < size:
                raise MoREError(
                    f"a sample holds the token id {int(found)}, and the vocabulary has {size}: the data are damaged or "
                    "of another tokenizer; tools/inspect_dataset.py PREFIX --check compares them with what was written"
                )


def _share(sample: dict[str, torch.Tensor], config: MoREConfig, vp_stage: int | None) -> dict[str, Any]:
    """Return what all tensor-parallel ranks have of a sample then, None for what there is not."""
    args = get_args()
    on_device: dict[str, Any] = {name: x.cuda(non_blocking=True) for name, x in sample.items() if name != "problems"}
    shared = get_batch_on_this_tp_rank(
        # Megatron asks for what a sample may have.
        defaultdict(lambda: None, on_device),
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=args.dataloader_inter_document_masking,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp(config, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    return flatten_batch_for_packed_sequences(shared)


def _has_mtp(config: MoREConfig, vp_stage: int | None) -> bool:
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _packed_seq_params(fields: dict[str, Any]) -> PackedSeqParams:
    names = ("cu_seqlens", "cu_seqlens_padded")
    boundaries, padded = (None if fields[name] is None else fields[name].squeeze(0) for name in names)
    update_seqlen_stats_from_cu_seqlens(boundaries)
    longest = int(fields["max_seqlen"].item())
    cu_seqlens = boundaries if padded is None else padded
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )
