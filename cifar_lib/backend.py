"""What depends on Keras' backend and on the machine: all such choices stand here.

Import Keras from here: TensorFlow writes to the screen when it is imported and looks for devices.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cifar_lib import ROOT, installed


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


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """Look for no garbage, and later not among what was made here.

    An import leaves next to none, yet makes so many objects that looking through them again and
    again takes a quarter of the time that TensorFlow's takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let a package be missing for those who would import it only if it were there."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
# By itself TensorFlow computes with oneDNN only where the processor has AVX-512's instructions for
# networks; with AVX2 alone the recipe `fast` trains six times as fast with it as without.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
with _standard_error_closed(), _garbage_left():
    if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
        # Its converter for phones would import JAX, for most of a second.
        with _hidden("jax"):
            import tensorflow  # noqa: F401
    import keras

    if keras.backend.backend() == "tensorflow":
        keras.distribution.list_devices()  # it tells of a missing GPU as of an error

PACKAGES = ("keras", "tensorflow", "jax", "torch", "numpy", "scipy")


def on_tensorflow() -> bool:
    """Whether Keras computes with TensorFlow."""
    return keras.backend.backend() == "tensorflow"


@functools.cache
def on_tensorflow_cpu() -> bool:
    """Whether Keras computes with TensorFlow on a processor."""
    return on_tensorflow() and device() == "CPU"


def jit_compile() -> bool | str:
    """Give `Model.compile` its argument: XLA makes TensorFlow several times slower on a CPU."""
    return False if on_tensorflow_cpu() else "auto"


# The largest map, in pixels, at which oneDNN's gradient of the filters is slower than products of
# matrices: benchmarks/operations.py.
MOST_PIXELS_FOR_PRODUCTS = 64


def convolution(inputs, kernel, padding: str):
    """A convolution (N, H, W, I) * (height, width, I, O) on TensorFlow, without strides.

    On small maps, oneDNN computes the gradient of the filters in bfloat16, and without AVX-512 in
    float32, too, slower than a product of matrices does (`benchmarks/operations.py`), and computes
    that of the padding, too.
    """
    import tensorflow as tf

    @tf.custom_gradient
    def convolve(inputs, kernel):
        outputs = tf.nn.conv2d(inputs, kernel, 1, padding.upper())

        def gradient(upstream):
            of_inputs = tf.nn.conv2d_transpose(
                upstream, kernel, tf.shape(inputs), 1, padding.upper()
            )
            return of_inputs, _filter_gradient(inputs, kernel.shape, upstream, padding.upper())

        return outputs, gradient

    # Of a variable, outside a traced function, `custom_gradient` would want another signature.
    return convolve(tf.convert_to_tensor(inputs), tf.convert_to_tensor(kernel))


def _filter_gradient(inputs, shape, upstream, padding: str):
    import tensorflow as tf

    _, height, width, _ = upstream.shape
    if not height or not width or height * width > MOST_PIXELS_FOR_PRODUCTS:
        return tf.raw_ops.Conv2DBackpropFilter(
            input=inputs,
            filter_sizes=shape,
            out_backprop=upstream,
            strides=[1, 1, 1, 1],
            padding=padding,
        )
    _, input_height, input_width, _ = inputs.shape

    def overlap(offset: int, outputs: int, pixels: int) -> tuple[slice, slice]:
        first = max(0, -offset)
        last = max(first, min(outputs, pixels - offset))
        return slice(first + offset, last + offset), slice(first, last)

    products = []
    for row in range(shape[0]):
        above = (shape[0] - 1) // 2 if padding == "SAME" else 0
        in_rows, out_rows = overlap(row - above, height, input_height)
        for column in range(shape[1]):
            left = (shape[1] - 1) // 2 if padding == "SAME" else 0
            in_columns, out_columns = overlap(column - left, width, input_width)
            pixels = tf.reshape(inputs[:, in_rows, in_columns], (-1, shape[2]))
            errors = tf.reshape(upstream[:, out_rows, out_columns], (-1, shape[3]))
            products.append(tf.matmul(pixels, errors, transpose_a=True))
    return tf.reshape(tf.stack(products), shape)


def batch_normalization(inputs, gamma, beta, epsilon: float):
    """Normalise a batch (N, H, W, C) on TensorFlow, and give its mean and variance, each (C,)."""
    import tensorflow as tf

    channels = inputs.shape[-1]
    result = tf.raw_ops.FusedBatchNormV3(
        x=inputs,
        scale=tf.ones(channels) if gamma is None else tf.convert_to_tensor(gamma),
        offset=tf.zeros(channels) if beta is None else tf.convert_to_tensor(beta),
        mean=[],
        variance=[],
        epsilon=epsilon,
        is_training=True,
    )
    # The operation divides by n - 1, Keras by n.
    values = tf.cast(tf.size(inputs) // channels, tf.float32)
    return result.y, result.batch_mean, result.batch_variance * ((values - 1) / values)


def silu(inputs):
    """x * sigmoid(x) on TensorFlow, whose own gradient is four times slower in bfloat16."""
    import tensorflow as tf

    @tf.custom_gradient
    def activate(inputs):
        return tf.nn.silu(inputs), lambda upstream: _silu_gradient()(inputs, upstream)

    return activate(inputs)


@functools.cache
def _silu_gradient():
    import tensorflow as tf

    # One pass over memory, in float32: XLA fuses what is not convolution well. A function of one
    # array is compiled once for all layers that have as many values.
    @tf.function(jit_compile=True)
    def gradient(inputs, upstream):
        x = tf.cast(inputs, tf.float32)
        sigmoid = 0.5 * tf.tanh(0.5 * x) + 0.5
        upstream = tf.cast(upstream, tf.float32)
        return tf.cast(upstream * sigmoid * (1 + x * (1 - sigmoid)), inputs.dtype)

    return gradient


def elu(inputs):
    """x above 0, else exp(x) - 1, on TensorFlow, whose own takes twice as long in bfloat16."""
    import tensorflow as tf

    @tf.custom_gradient
    def activate(inputs):
        outputs = _elu()(inputs)
        return outputs, lambda upstream: _elu_gradient()(outputs, upstream)

    return activate(inputs)


@functools.cache
def _elu():
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def activate(inputs):
        x = tf.cast(inputs, tf.float32)
        return tf.cast(tf.where(x > 0, x, tf.exp(tf.minimum(x, 0.0)) - 1.0), inputs.dtype)

    return activate


@functools.cache
def _elu_gradient():
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def gradient(outputs, upstream):
        y = tf.cast(outputs, tf.float32)
        slope = tf.where(y > 0, 1.0, y + 1.0)
        return tf.cast(tf.cast(upstream, tf.float32) * slope, outputs.dtype)

    return gradient


def gradient(function: Callable) -> Callable:
    """Of a function of two tensors one that gives the gradient of its sum by the first of them."""
    if on_tensorflow():
        import tensorflow as tf

        @tf.function
        def by_first(inputs, others):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = function(inputs, others)
            return tape.gradient(outputs, inputs)

        return by_first
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(lambda inputs, others: function(inputs, others).sum())
    import torch

    def by_first(inputs, others):
        inputs = inputs.detach().requires_grad_()
        return torch.autograd.grad(function(inputs, others).sum(), inputs)[0]

    return by_first


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
    return "bfloat16" if _processor_has("avx512_bf16|amx_bf16") else "float32"


@functools.cache
def has_avx512() -> bool:
    """Whether the processor is known to compute with 512 bits at a time."""
    return _processor_has("avx512f")


def _processor_has(flags: str) -> bool:
    return bool(re.search(rf"\b({flags})\b", _cpuinfo()))


def _cpuinfo() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def device() -> str:
    """Where the backend computes: "CPU", "GPU" or "TPU"."""
    if keras.backend.backend() == "torch":  # Keras 3.15 lists no devices there
        import torch

        return "GPU" if torch.cuda.is_available() else "CPU"
    return keras.distribution.list_devices()[0].split(":")[0].upper().replace("CUDA", "GPU")


def describe(precision: str) -> dict:
    """What a result may depend on beside the recipe: versions, backend, device, threads, commit."""
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
        "versions": installed(PACKAGES),
        "commit": _commit(),
    }


def _processor() -> str:
    model = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
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
