"""What depends on Keras' backend and on the machine: all such choices stand here.

Import Keras from here: TensorFlow writes to the screen when it is imported and looks for devices.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from cifar_lib import ROOT


@contextlib.contextmanager
def _standard_error_closed() -> Iterator[None]:
    """Drop what C++ code writes to file descriptor 2; exceptions still come through."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
with _standard_error_closed():
    import keras

    keras.distribution.list_devices()  # TensorFlow tells of a missing GPU as of an error

PACKAGES = ("keras", "tensorflow", "jax", "torch", "numpy", "scipy")


def on_tensorflow() -> bool:
    """Whether Keras computes with TensorFlow."""
    return keras.backend.backend() == "tensorflow"


def jit_compile() -> bool | str:
    """Give `Model.compile` its argument: XLA makes TensorFlow several times slower on a CPU."""
    return False if on_tensorflow() and device() == "CPU" else "auto"


def resolve_precision(precision: str) -> str:
    """Choose "float32" or "bfloat16": "auto" takes bfloat16 where the processor computes in it."""
    if precision != "auto":
        return precision
    if device() == "GPU":
        # bfloat16 came with NVIDIA's compute capability 8.0; JAX and PyTorch emulate it before.
        if on_tensorflow():
            import tensorflow as tf

            gpu = tf.config.list_physical_devices("GPU")[0]
            capability = tf.config.experimental.get_device_details(gpu).get("compute_capability")
            return "bfloat16" if capability and capability >= (8, 0) else "float32"
        return "bfloat16"
    flags = Path("/proc/cpuinfo")
    native = flags.exists() and re.search(r"avx512_bf16|amx_bf16", flags.read_text())
    return "bfloat16" if native else "float32"


def device() -> str:
    """Where the backend computes: "CPU", "GPU" or "TPU"."""
    return keras.distribution.list_devices()[0].split(":")[0].upper().replace("CUDA", "GPU")


def describe(precision: str) -> dict:
    """What a result may depend on beside the recipe: versions, backend, device, threads, commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "backend": keras.backend.backend(),
        "device": device(),
        "processor": _processor(),
        "threads": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "precision": precision,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = cpuinfo.exists() and re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    return model.group(1) if model else platform.processor()


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
