"""Fixtures and rules of the whole test suite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from more_megatron.platform import initialize_platform
from tests.helpers.ranks import alone

# One thread, here and in all that the tests start: these processes share the cores, and threads that wait for each
# other slow all of them down.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Before any test module imports Megatron.
initialize_platform()

_WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch to the whole matrix of systems and layouts."""
    parser.addoption("--all", action="store_true", help="also the tests that `make test-all` adds")


def _is_whole(config: pytest.Config) -> bool:
    return config.getoption("--all") or any("::" in argument for argument in config.args)


@pytest.fixture(scope="session")
def whole_matrix(request: pytest.FixtureRequest) -> bool:
    """Return whether tests marked `matrix` are run, too: for fixtures that prepare several tests at once."""
    return _is_whole(request.config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `matrix`, unless all is asked for or it is named."""
    if _is_whole(config):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is no GPU."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def several_ranks() -> Iterator[None]:
    """For tests that start several ranks by other means than the helpers."""
    with alone(2):
        yield


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Folder with WikiText-2's validation and test files; skips where it is not."""
    if not _WIKITEXT.is_dir():
        pytest.skip(f"{_WIKITEXT} is not here")
    return _WIKITEXT
