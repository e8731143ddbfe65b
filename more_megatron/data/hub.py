"""Datasets by name, from the Hugging Face hub."""

import contextlib
import os
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from more_megatron.errors import MoREError

_WIKITEXT_NAMES = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
_CONNECT_SECONDS = 3.0


def download(name: str, split: str = "train") -> list[str]:
    """Fetch the Parquet files of `_WIKITEXT_NAMES`, or of `OWNER/REPOSITORY/FOLDER`, whose names begin with the split.

    Raises:
        MoREError: The name is unknown, or the hub cannot be reached.
    """
    owner, _, place = (f"Salesforce/wikitext/{name}" if name in _WIKITEXT_NAMES else name).partition("/")
    repository, _, folder = place.partition("/")
    if not folder:
        known = ", ".join(_WIKITEXT_NAMES)
        raise MoREError(f"--dataset {name} is not known; choose one of {known}, or OWNER/REPOSITORY/FOLDER")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "15")
    from huggingface_hub import HfApi, hf_hub_download

    with fetching(name):
        wanted = f"{folder.rstrip('/')}/{split}"
        files = sorted(HfApi().list_repo_files(f"{owner}/{repository}", repo_type="dataset"))
        files = [file for file in files if file.startswith(wanted) and file.endswith(".parquet")]
        paths = [hf_hub_download(f"{owner}/{repository}", file, repo_type="dataset") for file in files]
    if not paths:
        raise MoREError(f"dataset {name} has no Parquet files {wanted}*; see --dataset-split")
    return paths


@contextlib.contextmanager
def fetching(name: str) -> Iterator[None]:
    """Say in one line why the dataset of a name does not come, within seconds where there is no network.

    Raises:
        MoREError: The block fails, or there is no network.
    """
    try:
        if not is_reachable():
            raise ConnectionError("no network")
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MoREError(f"dataset {name} cannot be downloaded: {reason}; give local files with --input") from error


def is_reachable() -> bool:
    """Return whether the hub answers within seconds; its own client would try again for a minute."""
    from huggingface_hub import constants

    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_CONNECT_SECONDS):
            return True
    except HTTPError:
        return True
    except (OSError, ValueError):
        return False
