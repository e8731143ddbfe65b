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
    """A document that cannot be encoded: its place among those given, and what is wrong with it."""

    def __str__(self) -> str:
        return "document {} {}".format(*self.args)
