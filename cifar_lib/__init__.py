"""CIFAR-100 image recognition with a convolutional network, from the data to the report."""

import os
from collections.abc import Iterable
from pathlib import Path

__version__ = "0.1.0"

#: The repository: the folder that holds `cifar_lib/`, `notebooks/` and `runs/`.
ROOT = Path(__file__).resolve().parent.parent


def started_by_jupyter() -> bool:
    """Whether Jupyter started this kernel, so that somebody may see and operate what it shows."""
    # It gives this name to its kernels; papermill and nbconvert do not.
    return "JPY_SESSION_NAME" in os.environ


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed, by name."""
    from importlib import metadata

    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
