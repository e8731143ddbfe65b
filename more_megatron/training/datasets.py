"""Training, validation and test data, as Megatron's flags describe them."""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.argument_utils import _default_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split

from more_megatron.config import MoREConfig
from more_megatron.data.answers import answer_density, has_answers
from more_megatron.data.indexed import idx_path, read_index
from more_megatron.errors import MoREError
from more_megatron.platform.memory import check_fits_host
from more_megatron.training.batch import reads_boundaries, stage_needs_data
from more_megatron.training.data_checks import data_blends, data_prefixes
from more_megatron.training.index_cache import cache_folder, only_writer, remove_unusable_indices
from more_megatron.training.problem_datasets import AnswerDataset
from more_megatron.training.problems import Tasks

# Where a sample begins, and its place in the order.
_INDEX_BYTES = 12


def datasets_provider(config: MoREConfig) -> Any:
    """Return what builds the training, validation and test data sets, which `pretrain` calls on every rank.

    It is given how many samples are wanted of each, None for one epoch, and the stage under interleaving. It returns
    None for each where the rank reads no data.
    """
    provider: Any = functools.partial(_datasets, config)
    # Tells `pretrain` that the builder distributes the work over the ranks itself.
    provider.is_distributed = True
    return provider


def _datasets(config: MoREConfig, num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> Any:
    args = get_args()
    most = max(samples or 0 for samples in num_samples)
    remedy = "lower --train-iters, --eval-iters or --global-batch-size"
    check_fits_host(_INDEX_BYTES * most, f"an index of {most:,} samples", remedy)
    print_rank_0("> building train, validation, and test datasets for GPT ...")

    def is_built_here() -> bool:
        reads_data = reads_boundaries() or stage_needs_data(config, vp_stage)
        return reads_data and mpu.get_tensor_model_parallel_rank() == 0

    # The builder lets rank 0 go first.
    writes = args.rank == 0 and not args.dataloader_fast_cache_load
    folders = _cache_folders(args) if writes else []
    with only_writer(folders):
        remove_unusable_indices(folders)
        datasets = _build(BlendedMegatronDatasetBuilder(_kind(args), num_samples, is_built_here, _dataset_config()))
    print_rank_0("> finished creating GPT datasets ...")
    return datasets


def _kind(args: argparse.Namespace) -> Any:
    if args.loss_on_answers:
        # Megatron's builder makes datasets of a class, and gives it nothing else of the run.
        return type("AnswerDataset", (AnswerDataset,), {"tasks": run_tasks(args)})
    return MockGPTDataset if args.mock_data else GPTDataset


def run_tasks(args: argparse.Namespace) -> Tasks:
    """Return the tasks of a run that trains on answers."""
    return Tasks.of(data_prefixes(args))


def _build(builder: BlendedMegatronDatasetBuilder) -> Any:
    try:
        # Megatron takes no data set without samples, which it makes of blends where none are asked for.
        return [None if dataset is None or len(dataset) == 0 else dataset for dataset in builder.build()]
    except Exception as error:
        # Megatron's builder turns an OSError into an exception without a class of its own.
        if isinstance(error.__cause__, OSError):
            raise MoREError(
                f"the dataset index cannot be written beside the data ({error.__cause__.strerror}): "
                "give --data-cache-path a folder that can be written to"
            ) from error
        raise


def _cache_folders(args: argparse.Namespace) -> list[Path]:
    if args.data_cache_path is not None:
        return [Path(args.data_cache_path)]
    return [cache_folder(prefix) for prefix in data_prefixes(args)]


def counted_share(args: argparse.Namespace) -> float:
    """Return the share of the training tokens that count in the loss of a run that trains on answers."""
    prefixes, weights = data_blends(args)[0]
    weights = weights or [read_index(idx_path(prefix)).bin_bytes for prefix in prefixes]
    shares = [answer_density(prefix) if has_answers(prefix) else 1.0 for prefix in prefixes]
    return sum(weight * share for weight, share in zip(weights, shares, strict=True)) / sum(weights)


def _dataset_config() -> GPTDatasetConfig:
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    fields = _default_config_from_args(GPTDatasetConfig, args, return_instance=False)
    # What the flags call otherwise.
    fields |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": None if sequences is None else json.loads(Path(sequences).read_text()),
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    return GPTDatasetConfig(**fields)
