"""CIFAR-100 image recognition with a convolutional network, from the data to the report."""

from pathlib import Path

__version__ = "0.1.0"

#: The repository: the folder that holds `cifar_lib/`, `notebooks/` and `runs/`.
ROOT = Path(__file__).resolve().parent.parent
