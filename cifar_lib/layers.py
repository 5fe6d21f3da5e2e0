"""Layers of the fast networks, on any backend.

On a CPU, TensorFlow spends as long on what is not convolution as on the convolutions. Where that
is so, these compute the same in another way (`backend`); elsewhere they are Keras' own.
"""

from __future__ import annotations

import numpy as np

from cifar_lib import backend
from cifar_lib.backend import keras

ops = keras.ops


def _slow_in_keras(inputs, in_float32: bool = False) -> bool:
    """Whether TensorFlow on a CPU is, in bfloat16 or also `in_float32` (benchmarks/)."""
    bfloat16 = keras.backend.standardize_dtype(inputs.dtype) == "bfloat16"
    return backend.on_tensorflow_cpu() and (bfloat16 or in_float32)


@keras.saving.register_keras_serializable("cifar_lib")
class Conv2D(keras.layers.Conv2D):
    """Keras' convolution, with a faster gradient of the filters where TensorFlow's CPU is slow."""

    def convolution_op(self, inputs, kernel):
        plain = (self.strides, self.dilation_rate, self.groups) == ((1, 1), (1, 1), 1)
        slow = _slow_in_keras(inputs, in_float32=not backend.has_avx512())
        if plain and self.data_format == "channels_last" and slow:
            return backend.convolution(inputs, kernel, self.padding)
        return super().convolution_op(inputs, kernel)


@keras.saving.register_keras_serializable("cifar_lib")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch normalisation, in one operation where TensorFlow uses a CPU.

    Keras converts to float32 and computes moments and normalisation in several passes over memory.
    For inputs (N, H, W, C).
    """

    def call(self, inputs, training=None, mask=None):
        if not (training and self.trainable and backend.on_tensorflow_cpu()):
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = backend.batch_normalization(
            inputs, self.gamma, self.beta, self.epsilon
        )
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1 - self.momentum))
        return outputs


@keras.saving.register_keras_serializable("cifar_lib")
def silu(inputs):
    """x * sigmoid(x): Elfwing, Uchibe & Doya 2017, arXiv 1702.03118."""
    return backend.silu(inputs) if backend.on_tensorflow_cpu() else ops.silu(inputs)


@keras.saving.register_keras_serializable("cifar_lib")
def elu(inputs):
    """x above 0, else exp(x) - 1: Clevert, Unterthiner & Hochreiter 2015, arXiv 1511.07289."""
    return backend.elu(inputs) if _slow_in_keras(inputs) else ops.elu(inputs)


#: Activations by name: those of `recipes.ACTIVATIONS`.
ACTIVATIONS = {"elu": elu, "gelu": ops.gelu, "relu": ops.relu, "silu": silu}


@keras.saving.register_keras_serializable("cifar_lib")
class Whitening(keras.layers.Layer):
    """A fixed convolution that decorrelates the 2x2 patches of the training images.

    Inputs are images in 0..1, (N, H, W, 3) float32; outputs (N, H-1, W-1, 24): the patch's
    coordinates along the 12 eigenvectors of the patches' covariance, largest eigenvalue first, each
    divided by the root of its eigenvalue, and their negatives. The bias alone is trained.

    Unless `fixed`, the filters start at random and are trained, too: the layer without whitening.

    Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, section 3.2,
    after Page 2019, "How to train your ResNet 8: bag of tricks".

    Args:
        patch: the side of a patch, in pixels.
        epsilon: added to every eigenvalue, so that noise is not blown up.
        fixed: whether the filters whiten and stay as they are.
        seed: of random filters.
    """

    def __init__(
        self,
        patch: int = 2,
        epsilon: float = 5e-4,
        *,
        fixed: bool = True,
        seed: int = 0,
        **arguments: object,
    ) -> None:
        # The pixels are normalised in float32 before they are rounded to the compute type.
        super().__init__(autocast=False, **arguments)
        self.patch, self.epsilon, self.fixed, self.seed = patch, epsilon, fixed, seed

    def build(self, input_shape: tuple) -> None:
        self.channels = input_shape[-1]
        directions = self.patch**2 * self.channels
        self.mean = self.add_weight(
            shape=(self.channels,), initializer="zeros", trainable=False, name="mean"
        )
        self.deviation = self.add_weight(
            shape=(self.channels,), initializer="ones", trainable=False, name="deviation"
        )
        self.kernel = self.add_weight(
            shape=(self.patch, self.patch, self.channels, 2 * directions),
            initializer="zeros" if self.fixed else uniform(self.seed),
            trainable=not self.fixed,
            name="kernel",
        )
        self.bias = self.add_weight(shape=(2 * directions,), initializer="zeros", name="bias")

    def adapt(self, images: np.ndarray) -> None:
        """Set the normalisation, and fixed filters, from images, uint8 (N, H, W, C)."""
        pixels = images / np.float32(255)
        mean, deviation = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
        self.mean.assign(mean)
        self.deviation.assign(deviation)
        if not self.fixed:
            return
        windows = np.lib.stride_tricks.sliding_window_view(
            (pixels - mean) / deviation, (self.patch, self.patch), axis=(1, 2)
        )
        # Rows in the order of the kernel: row of the patch, column, channel.
        patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, self.patch**2 * self.channels)
        values, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
        filters = (vectors / np.sqrt(values + self.epsilon))[:, ::-1]
        filters = filters.reshape(self.patch, self.patch, self.channels, -1)
        self.kernel.assign(np.concatenate([filters, -filters], axis=-1))

    def call(self, inputs):
        normalised = (ops.cast(inputs, "float32") - self.mean) / self.deviation
        kernel, bias = (ops.cast(w, self.compute_dtype) for w in (self.kernel, self.bias))
        return ops.conv(ops.cast(normalised, self.compute_dtype), kernel) + bias

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        batch, height, width, channels = input_shape
        sides = [side and side - self.patch + 1 for side in (height, width)]
        return (batch, *sides, 2 * self.patch**2 * channels)

    def get_config(self) -> dict:
        names = ("patch", "epsilon", "fixed", "seed")
        return super().get_config() | {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable("cifar_lib")
class InferenceSize(keras.layers.Layer):
    """Resizes images to a side in pixels, except in training, where the data path chooses the side.

    A network is most accurate on images of the size that it was last trained on: Touvron et al.
    2019, "Fixing the train-test resolution discrepancy", arXiv 1906.06423.
    """

    def __init__(self, side: int, **arguments: object) -> None:
        super().__init__(**arguments)
        self.side = side

    def call(self, inputs, training=False):
        if training:
            return inputs
        size = (self.side, self.side)
        return ops.image.resize(inputs, size, antialias=True, data_format="channels_last")

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """That of inference; of unknown sides nothing is said, since training leaves them alone."""
        batch, *sides, channels = input_shape
        return (batch, *(side and self.side for side in sides), channels)

    def get_config(self) -> dict:
        return super().get_config() | {"side": self.side}


def uniform(seed: int) -> keras.initializers.Initializer:
    """PyTorch's default filters: uniform within one over the root of the fan-in."""
    return keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seed)


@keras.saving.register_keras_serializable("cifar_lib")
class Dirac(keras.initializers.Initializer):
    """Identity filters for the first outputs, as many as there are inputs; the rest at random.

    Zagoruyko & Komodakis 2017, "DiracNets", arXiv 1706.00388; partial as in airbench (arXiv
    2404.00498, section 3.3). The random filters are `uniform`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, shape: tuple, dtype: str | None = None):
        height, width, inputs, outputs = shape
        kernel = np.array(ops.convert_to_numpy(uniform(self.seed)(shape, "float32")))
        same = min(inputs, outputs)
        kernel[..., :same] = 0
        # An even kernel's "same" padding is on its far side, so its own pixel is the first.
        kernel[(height - 1) // 2, (width - 1) // 2, range(same), range(same)] = 1
        return ops.convert_to_tensor(kernel, dtype)

    def get_config(self) -> dict:
        return {"seed": self.seed}
