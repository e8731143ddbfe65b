"""Optional packages: which are really there, and which warnings about absent ones are noise on a laptop."""

import functools
import importlib
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

from more_megatron.errors import MoREError

# Megatron says these at import on every rank. On a machine without a GPU nothing can be done about them.
_ABSENT_PACKAGES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0",
)

# Packages whose kernels take tensors of CUDA only.
_CUDA_PACKAGES = ("transformer_engine", "apex")


def has_package(name: str) -> bool:
    """Return whether `name` can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


@functools.cache
def imports(name: str) -> bool:
    """Return whether importing `name` succeeds: a compiled package can be there and not fit the PyTorch beside it."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True


def check_apex() -> None:
    """Refuse the unrelated package `apex` of PyPI.

    Megatron takes any module of that name for NVIDIA's and selects kernels that are then missing.

    Raises:
        MoREError: If `apex` can be imported and is not NVIDIA apex.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        where = spec.origin or (folders[0] if folders else "apex")
        raise MoREError(
            f"the package apex at {where} is not NVIDIA apex (it has no multi_tensor_apply): "
            "run `pip uninstall apex`; NVIDIA apex is built from source or comes with NGC images"
        )


def hide_cuda_packages() -> None:
    """Make packages of CUDA kernels absent where there is no CUDA.

    Megatron asks whether they can be imported, not whether they can compute: on a GPU node a run on the CPU would give
    its tensors to their kernels. What has been imported already is left, for it was meant.
    """
    for name in _CUDA_PACKAGES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def silence_absent_package_warnings() -> None:
    """Silence Megatron's import-time warnings that Transformer Engine and apex are absent, and nothing else."""
    for message in _ABSENT_PACKAGES:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that a CUDA toolkit is here and no GPU
