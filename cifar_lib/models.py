"""The convolutional networks, looked up by name.

A network takes images as float32 in 0..1, shape (N, 32, 32, 3), and gives one probability a class,
float32, shape (N, classes). Those in `RESIZABLE` take squares of other sides, too. Scaling and
augmentation belong to the data path, not to the network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from cifar_lib.backend import keras
from cifar_lib.data import IMAGE_SHAPE, NUM_CLASSES
from cifar_lib.layers import BatchNormalization, Conv2D, Dirac, InferenceSize, SiLU, Whitening
from cifar_lib.recipes import RESIZABLE, Recipe

layers = keras.layers

ANY_SIDE = (None, None, IMAGE_SHAPE[-1])

IMAGES_TO_WHITEN = 1_000


def seed_cnn(num_classes: int, seeds: Callable[[], int]) -> keras.Model:
    """The 16-layer network of the 2018 slide deck: 6,777,060 parameters with 100 classes."""
    blocks = []
    for filters in (128, 256, 512):
        for padding in ("same", "valid"):
            initializer = keras.initializers.GlorotUniform(seed=seeds())
            blocks.append(
                layers.Conv2D(
                    filters, 3, padding=padding, activation="elu", kernel_initializer=initializer
                )
            )
        blocks += [layers.MaxPooling2D(2), layers.Dropout(0.25, seed=seeds())]
    head = [
        layers.Flatten(),
        layers.Dense(
            1024, activation="elu", kernel_initializer=keras.initializers.GlorotUniform(seeds())
        ),
        layers.Dropout(0.5, seed=seeds()),
        # float32 whatever the precision: probabilities and their logarithms need its resolution.
        layers.Dense(
            num_classes,
            activation="softmax",
            dtype="float32",
            kernel_initializer=keras.initializers.GlorotUniform(seeds()),
        ),
    ]
    return keras.Sequential([keras.Input(IMAGE_SHAPE), *blocks, *head], name="seed")


def airbench(num_classes: int, seeds: Callable[[], int], side: int) -> keras.Model:
    """The network of airbench94, with SiLU for GELU and one global max pool: 2.00 M parameters.

    Jordan 2024, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498, section 3.1.
    """
    inputs, x = _whitened(side)
    for width in (64, 256, 256):
        x = _convolution(width, 3, seeds)(x)
        x = layers.MaxPooling2D(2)(x)
        x = SiLU()(BatchNormalization(epsilon=1e-5, momentum=0.6, scale=False)(x))
        x = _convolution(width, 3, seeds)(x)
        x = SiLU()(BatchNormalization(epsilon=1e-5, momentum=0.6, scale=False)(x))
    return _classified(
        inputs, layers.GlobalMaxPooling2D()(x), num_classes, 1 / 9, seeds, "airbench"
    )


def speedrun(num_classes: int, seeds: Callable[[], int], side: int) -> keras.Model:
    """Three groups of a convolution and a residual pair: 8.61 M parameters.

    The network of the CIFAR-100 speedrun's submission NAVIER-STOKED, after futurebiohackers
    (github.com/AIDDA-Institute/CIFAR-100-speedrun): the early, large maps get few and small
    filters, the late ones many.
    """
    inputs, x = _whitened(side)
    for width, kernel, middle, pair in (
        (64, 3, 64, (1, 1)),
        (256, 3, 192, (3, 1)),
        (768, 2, 512, (3, 3)),
    ):
        x = layers.MaxPooling2D(2)(_convolution(width, kernel, seeds)(x))
        x = y = SiLU()(BatchNormalization(epsilon=1e-5, momentum=0.9)(x))
        for filters, kernel in zip((middle, width), pair, strict=True):
            y = _convolution(filters, kernel, seeds)(y)
            y = SiLU()(BatchNormalization(epsilon=1e-5, momentum=0.9)(y))
        x = layers.Add()([x, y])
    pooled = layers.Add()([layers.GlobalMaxPooling2D()(x), layers.GlobalAveragePooling2D()(x)])
    return _classified(inputs, pooled, num_classes, 1.25 / 9, seeds, "speedrun")


def _whitened(side: int) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    inputs = x = keras.Input(ANY_SIDE)
    if side != IMAGE_SHAPE[0]:
        x = InferenceSize(side, dtype="float32")(x)
    return inputs, SiLU()(Whitening()(x))


def _convolution(filters: int, kernel: int, seeds: Callable[[], int]) -> keras.Layer:
    initializer = Dirac(seeds())
    return Conv2D(filters, kernel, padding="same", use_bias=False, kernel_initializer=initializer)


def _classified(inputs, features, num_classes, scale, seeds, name) -> keras.Model:
    """The network that gives the softmax of scaled linear logits of `features`."""
    initializer = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform", seeds())
    logits = layers.Dense(
        num_classes, use_bias=False, dtype="float32", kernel_initializer=initializer
    )(features)
    logits = layers.Rescaling(scale, dtype="float32")(logits)
    return keras.Model(inputs, layers.Softmax(dtype="float32")(logits), name=name)


BUILDERS: dict[str, Callable[..., keras.Model]] = {
    "seed": seed_cnn,
    "airbench": airbench,
    "speedrun": speedrun,
}


def build(
    name: str,
    *,
    num_classes: int = NUM_CLASSES,
    precision: str = "float32",
    seed: int = 0,
    side: int = IMAGE_SHAPE[0],
) -> keras.Model:
    """Build an untrained network.

    Args:
        name: one of `BUILDERS`.
        num_classes: outputs of the last layer.
        precision: "float32", or "bfloat16" for bfloat16 arithmetic on float32 weights.
        seed: decides the initial weights; the same seed gives the same weights.
        side: of the images in pixels, to which one of `RESIZABLE` resizes what it is to classify.

    Raises:
        KeyError: `name` is not in `BUILDERS` (`recipes` refuses it earlier, with a suggestion).
    """
    counter = itertools.count(1_000 * seed)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        # JAX refuses larger seeds than these.
        arguments = num_classes, lambda: next(counter) % 2**32
        return BUILDERS[name](*arguments, *([side] if name in RESIZABLE else []))
    finally:
        keras.config.set_dtype_policy(policy)


def build_for(recipe: Recipe, precision: str) -> keras.Model:
    """Build a recipe's untrained network, to compute in "float32" or "bfloat16"."""
    side = recipe.image_size(recipe.epochs - 1)
    return build(recipe.model, precision=precision, seed=recipe.seed, side=side)


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
    details.append(config.get("activation"))
    words = ["x".join(map(str, d)) if isinstance(d, tuple | list) else d for d in details]
    return " ".join([type(layer).__name__, *(str(w) for w in words if w not in (None, "linear"))])
