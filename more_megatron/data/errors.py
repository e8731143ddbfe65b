"""What a data tool says when it cannot go on: one line with what, where and how to mend it."""

from more_megatron.errors import MoREError

__all__ = ["DataError", "DatasetError", "DocumentError", "ResumableError"]


class DataError(MoREError):
    """A wrong option, input or tokenizer."""


class DatasetError(DataError):
    """An indexed dataset on disk that cannot be trained on: missing, damaged or made for another tokenizer."""


class ResumableError(DataError):
    """A run that ended for reasons outside its inputs and can go on later from what it has written."""


class DocumentError(DataError):
    """A document that cannot be encoded.

    Args:
        index: Its place among the documents that were given.
        reason: What is wrong, to stand behind "document 7".
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"document {self.index} {self.reason}"
