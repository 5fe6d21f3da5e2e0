"""The convolutional networks, looked up by name.

A network takes images as float32 in 0..1, shape (N, 32, 32, 3), and gives one probability a class,
float32, shape (N, classes). Those in `RESIZABLE` take squares of other sides, too. Scaling and
augmentation belong to the data path, not to the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cifar_lib.backend import keras
from cifar_lib.data import IMAGE_SHAPE, NUM_CLASSES
from cifar_lib.layers import (
    ACTIVATIONS,
    BatchNormalization,
    Conv2D,
    Dirac,
    InferenceSize,
    Whitening,
    uniform,
)
from cifar_lib.recipes import Recipe

layers = keras.layers

IMAGES_TO_WHITEN = 1_000


#: Mean and standard deviation of the training pixels of CIFAR-100, in 0..1, by colour.
MEAN, DEVIATION = np.array([0.5071, 0.4866, 0.4409]), np.array([0.2673, 0.2564, 0.2762])


@dataclass(frozen=True)
class Parts:
    """Of what a network is made, where a recipe may choose.

    Attributes:
        num_classes: outputs of the last layer.
        seeds: gives a new seed at each call.
        side: of the images in pixels, to which the network resizes what it is to classify.
        activation: one of `ACTIVATIONS`, or None for the network's own.
        whitening: whether the first filters whiten and stay fixed.
        identity_filters: whether filters start as the identity.
    """

    num_classes: int
    seeds: Callable[[], int]
    side: int
    activation: str | None
    whitening: bool
    identity_filters: bool

    def inputs(self) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        """The network's input, and the images that it sees."""
        inputs = keras.Input((None, None, IMAGE_SHAPE[-1]))
        if self.side == IMAGE_SHAPE[0]:
            return inputs, inputs
        return inputs, InferenceSize(self.side, dtype="float32")(inputs)

    def activated(self, x, usual: str = "silu"):
        return layers.Activation(ACTIVATIONS[self.activation or usual])(x)

    def whitened(self, x):
        layer = Whitening() if self.whitening else Whitening(fixed=False, seed=self.seeds())
        return self.activated(layer(x))

    def convolution(self, filters: int, kernel: int):
        initializer = Dirac if self.identity_filters else uniform
        return Conv2D(
            filters,
            kernel,
            padding="same",
            use_bias=False,
            kernel_initializer=initializer(self.seeds()),
        )

    def classified(self, features, scale: float):
        """The softmax of scaled linear logits of `features`."""
        logits = layers.Dense(
            self.num_classes,
            use_bias=False,
            dtype="float32",
            kernel_initializer=uniform(self.seeds()),
        )(features)
        logits = layers.Rescaling(scale, dtype="float32")(logits)
        # float32 whatever the precision: probabilities and their logarithms need its resolution.
        return layers.Softmax(dtype="float32")(logits)


def seed_cnn(parts: Parts) -> keras.Model:
    """The 16-layer network of the 2018 slide deck: 6,777,060 parameters with 100 classes."""
    activation = ACTIVATIONS[parts.activation or "elu"]
    blocks = []
    for filters in (128, 256, 512):
        for padding in ("same", "valid"):
            initializer = keras.initializers.GlorotUniform(seed=parts.seeds())
            blocks.append(
                Conv2D(
                    filters,
                    3,
                    padding=padding,
                    activation=activation,
                    kernel_initializer=initializer,
                )
            )
        blocks += [layers.MaxPooling2D(2), layers.Dropout(0.25, seed=parts.seeds())]
    head = [
        layers.Flatten(),
        layers.Dense(
            1024,
            activation=activation,
            kernel_initializer=keras.initializers.GlorotUniform(parts.seeds()),
        ),
        layers.Dropout(0.5, seed=parts.seeds()),
        layers.Dense(
            parts.num_classes,
            activation="softmax",
            dtype="float32",
            kernel_initializer=keras.initializers.GlorotUniform(parts.seeds()),
        ),
    ]
    return keras.Sequential([keras.Input(IMAGE_SHAPE), *blocks, *head], name="seed")


def airbench(parts: Parts) -> keras.Model:
    """The network of airbench94, with SiLU for GELU and one global max pool: 2.00 M parameters.

    Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, section 3.1.
    """

    def normalised(x):
        return parts.activated(BatchNormalization(epsilon=1e-5, momentum=0.6, scale=False)(x))

    inputs, x = parts.inputs()
    x = parts.whitened(x)
    for width in (64, 256, 256):
        x = normalised(layers.MaxPooling2D(2)(parts.convolution(width, 3)(x)))
        x = normalised(parts.convolution(width, 3)(x))
    outputs = parts.classified(layers.GlobalMaxPooling2D()(x), 1 / 9)
    return keras.Model(inputs, outputs, name="airbench")


def speedrun(parts: Parts) -> keras.Model:
    """Three groups of a convolution and a residual pair: 8.61 M parameters.

    The network of the CIFAR-100 speedrun's submission NAVIER-STOKED, after futurebiohackers
    (github.com/AIDDA-Institute/CIFAR-100-speedrun): the early, large maps get few and small
    filters, the late ones many.
    """

    def normalised(x):
        return parts.activated(BatchNormalization(epsilon=1e-5, momentum=0.9)(x))

    inputs, x = parts.inputs()
    x = parts.whitened(x)
    for width, kernel, middle, pair in (
        (64, 3, 64, (1, 1)),
        (256, 3, 192, (3, 1)),
        (768, 2, 512, (3, 3)),
    ):
        x = y = normalised(layers.MaxPooling2D(2)(parts.convolution(width, kernel)(x)))
        for filters, kernel in zip((middle, width), pair, strict=True):
            y = normalised(parts.convolution(filters, kernel)(y))
        x = layers.Add()([x, y])
    pooled = layers.Add()([layers.GlobalMaxPooling2D()(x), layers.GlobalAveragePooling2D()(x)])
    return keras.Model(inputs, parts.classified(pooled, 1.25 / 9), name="speedrun")


def wide_resnet(parts: Parts) -> keras.Model:
    """WRN-28-10: 36.5 M parameters, 5.2 G multiply-adds an image of 32 x 32 pixels.

    Zagoruyko & Komodakis 2016, "Wide residual networks", arXiv 1605.07146, without dropout; the
    filters start as in He et al. 2015, arXiv 1502.01852, by the fan-out, as in its code.
    """

    def normalised(x):
        return parts.activated(BatchNormalization(epsilon=1e-5, momentum=0.9)(x), "relu")

    def convolved(x, filters: int, kernel: int, stride: int = 1):
        initializer = keras.initializers.VarianceScaling(
            2.0, "fan_out", "untruncated_normal", parts.seeds()
        )
        return Conv2D(
            filters, kernel, stride, "same", use_bias=False, kernel_initializer=initializer
        )(x)

    inputs, x = parts.inputs()
    x = layers.Rescaling(1 / DEVIATION, -MEAN / DEVIATION, dtype="float32")(x)
    x = convolved(x, 16, 3)
    for filters, first_stride in ((160, 1), (320, 2), (640, 2)):
        for block in range(4):
            stride = 1 if block else first_stride
            y = normalised(x)
            if not block:
                x = convolved(y, filters, 1, stride)
            y = normalised(convolved(y, filters, 3, stride))
            x = layers.Add()([x, convolved(y, filters, 3)])
    features = layers.GlobalAveragePooling2D()(normalised(x))
    return keras.Model(inputs, parts.classified(features, 1.0), name="wide_resnet")


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "seed": seed_cnn,
    "airbench": airbench,
    "speedrun": speedrun,
    "wide_resnet": wide_resnet,
}


def build(
    name: str,
    *,
    num_classes: int = NUM_CLASSES,
    precision: str = "float32",
    seed: int = 0,
    side: int = IMAGE_SHAPE[0],
    activation: str | None = None,
    whitening: bool = True,
    identity_filters: bool = True,
) -> keras.Model:
    """Build an untrained network.

    Args:
        name: one of `BUILDERS`.
        num_classes: outputs of the last layer.
        precision: "float32", or "bfloat16" for bfloat16 arithmetic on float32 weights.
        seed: decides the initial weights; the same seed gives the same weights.
        side: of the images in pixels, to which one of `RESIZABLE` resizes what it is to classify.
        activation: one of `ACTIVATIONS`, or None for the network's own.
        whitening: False trains the first filters of one of `WHITENED`.
        identity_filters: False starts all filters of one of `WHITENED` at random.

    Raises:
        KeyError: `name` is not in `BUILDERS` (`recipes` refuses it earlier, with a suggestion).
    """
    counter = itertools.count(1_000 * seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        # JAX refuses larger seeds than these.
        parts = Parts(
            num_classes,
            lambda: next(counter) % 2**32,
            side,
            activation,
            whitening,
            identity_filters,
        )
        return BUILDERS[name](parts)
    finally:
        keras.config.set_dtype_policy(policy)


def build_for(recipe: Recipe, precision: str) -> keras.Model:
    """Build a recipe's untrained network, to compute in "float32" or "bfloat16"."""
    return build(
        recipe.model,
        precision=precision,
        seed=recipe.seed,
        side=recipe.image_size(recipe.epochs - 1),
        activation=recipe.activation,
        whitening=recipe.whitening,
        identity_filters=recipe.identity_filters,
    )


def adapt(model: keras.Model, images: np.ndarray) -> None:
    """Set what a network takes from the training images, uint8 (N, 32, 32, 3), before training."""
    for layer in model.layers:
        if isinstance(layer, Whitening):
            layer.adapt(images[:IMAGES_TO_WHITEN])


def summary(model: keras.Model) -> pd.DataFrame:
    """Describe every layer of a network of square pictures, channels last.

    Columns: `layer` (its name), `kind`, `output_shape` (without the batch), `parameters`,
    `multiply_adds` (for one picture; those of kernels, not of biases and activations) and
    `receptive_field`, the side in input pixels of what one output can depend on, at most the
    picture's: Araujo et al. 2019, "Computing receptive fields of convolutional neural networks".
    """
    if model.input_shape[1] is None:
        # Layers like these on an image of the usual size.
        model = keras.models.clone_model(model, keras.Input(IMAGE_SHAPE))
    side = model.input_shape[1]
    # Of each layer: the receptive field, and by how many input pixels neighbouring outputs differ.
    reach: dict[str, tuple[int, int]] = {}
    rows = []
    for layer in model.layers:
        if isinstance(layer, layers.InputLayer):
            continue
        inputs = [
            reach.get(tensor._keras_history.operation.name, (1, 1))
            for tensor in keras.tree.flatten(layer.input)
        ]
        field, step = max(inputs)
        window, stride = _window(layer)
        field += (window - 1) * step
        reach[layer.name] = field, step * stride
        kernels = sum(math.prod(w.shape) for w in layer.weights if w.name.endswith("kernel"))
        *positions, _ = layer.output.shape[1:]
        rows.append(
            {
                "layer": layer.name,
                "kind": _kind(layer),
                "output_shape": tuple(layer.output.shape[1:]),
                "parameters": layer.count_params(),
                "multiply_adds": kernels * math.prod(positions),
                "receptive_field": min(field, side),
            }
        )
    return pd.DataFrame(rows)


def _window(layer: keras.Layer) -> tuple[int, int]:
    config = layer.get_config()
    if isinstance(layer, Whitening):
        return layer.patch, 1
    if "kernel_size" in config:
        return config["dilation_rate"][0] * (config["kernel_size"][0] - 1) + 1, config["strides"][0]
    if "pool_size" in config:
        return config["pool_size"][0], config["strides"][0]
    if isinstance(
        layer, layers.Flatten | layers.GlobalAveragePooling2D | layers.GlobalMaxPooling2D
    ):
        return layer.input.shape[1], 1
    return 1, 1


def _kind(layer: keras.Layer) -> str:
    config = layer.get_config()
    details = [config.get(key) for key in ("kernel_size", "pool_size", "rate", "padding")]
    details.append(getattr(getattr(layer, "activation", None), "__name__", None))
    words = ["x".join(map(str, d)) if isinstance(d, tuple | list) else d for d in details]
    return " ".join([type(layer).__name__, *(str(w) for w in words if w not in (None, "linear"))])
