"""The convolutional networks, looked up by name.

A network takes images as float32 in 0..1, shape (N, 32, 32, 3), and gives one probability a class,
float32, shape (N, classes). Scaling and augmentation belong to the data path, not to the network.
"""

from __future__ import annotations

from collections.abc import Callable

from cifar_lib.backend import keras
from cifar_lib.data import IMAGE_SHAPE, NUM_CLASSES

layers = keras.layers


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


BUILDERS: dict[str, Callable[..., keras.Model]] = {"seed": seed_cnn}


def build(
    name: str, *, num_classes: int = NUM_CLASSES, precision: str = "float32", seed: int = 0
) -> keras.Model:
    """Build an untrained network.

    Args:
        name: one of `BUILDERS`.
        num_classes: outputs of the last layer.
        precision: "float32", or "bfloat16" for bfloat16 arithmetic on float32 weights.
        seed: decides the initial weights; the same seed gives the same weights.

    Raises:
        KeyError: `name` is not in `BUILDERS` (`recipes` refuses it earlier, with a suggestion).
    """
    counter = iter(range(1_000 * seed, 1_000 * (seed + 1)))
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    try:
        return BUILDERS[name](num_classes, counter.__next__)
    finally:
        keras.config.set_dtype_policy(policy)
