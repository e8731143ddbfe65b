"""Text to Megatron's indexed datasets: reading, encoding, writing, checking."""

from more_megatron.data.check import check_dataset, check_datasets
from more_megatron.data.errors import DataError, DatasetError

__all__ = ["DataError", "DatasetError", "check_dataset", "check_datasets"]
