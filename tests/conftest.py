"""What the tests share: the data sets, read once, with caches of their own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_lib import data

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# As `cifar_lib.backend` does; some tests import TensorFlow before it, which then would not see it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# A shell starts what runs in the background with Ctrl-C ignored, and processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_sweeps.py", "test_training.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: files are shared out among processes in this order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder for this test run alone: the user's own is neither read nor written."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all processes of the run
        folder = tmp_path_factory.getbasetemp().parent / "cache"
    else:
        folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR_LIB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def cifar100(cache: Path) -> data.Dataset:
    """The real CIFAR-100; tests that need it are skipped where it is not found."""
    if data.find() is None:
        pytest.skip("CIFAR-100 is not on this machine: set CIFAR100_DIR to its folder")
    return data.load("cifar100", download=False)


@pytest.fixture(scope="session")
def synthetic(cache: Path) -> data.Dataset:
    """The stand-in."""
    return data.load("synthetic")
