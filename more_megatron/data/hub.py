"""Datasets by name, from the Hugging Face hub."""

from __future__ import annotations

import os
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from more_megatron.errors import MoREError

__all__ = ["WIKITEXT_NAMES", "check_reachable", "download"]

WIKITEXT_NAMES = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
_CONNECT_SECONDS = 3.0


def download(name: str, split: str = "train") -> list[str]:
    """Fetch the Parquet files of `WIKITEXT_NAMES`, or of `OWNER/REPOSITORY/FOLDER`, whose names begin with the split.

    Raises:
        MoREError: The name is unknown, or the hub cannot be reached.
    """
    owner, _, place = (f"Salesforce/wikitext/{name}" if name in WIKITEXT_NAMES else name).partition("/")
    repository, _, folder = place.partition("/")
    if not folder:
        known = ", ".join(WIKITEXT_NAMES)
        raise MoREError(f"--dataset {name} is not known; choose one of {known}, or OWNER/REPOSITORY/FOLDER")
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "15")
    from huggingface_hub import HfApi, hf_hub_download

    check_reachable(name)
    try:
        wanted = f"{folder.rstrip('/')}/{split}"
        files = sorted(HfApi().list_repo_files(f"{owner}/{repository}", repo_type="dataset"))
        files = [file for file in files if file.startswith(wanted) and file.endswith(".parquet")]
        paths = [hf_hub_download(f"{owner}/{repository}", file, repo_type="dataset") for file in files]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MoREError(f"dataset {name} cannot be downloaded: {reason}; give local files with --input") from error
    if not paths:
        raise MoREError(f"dataset {name} has no Parquet files {wanted}*; see --dataset-split")
    return paths


def check_reachable(name: str) -> None:
    """Fail within seconds where there is no network; the hub's client would try again for a minute.

    Raises:
        MoREError: There is none.
    """
    from huggingface_hub import constants

    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_CONNECT_SECONDS):
            pass
    except HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        reason = "no network; give local files with --input"
        raise MoREError(f"dataset {name} cannot be downloaded: {reason}") from error
