"""Augmentation policies, looked up by name, and the batches that feed a network.

A policy turns uint8 images into float32 images in 0..1 and draws a picture's changes from
(seed, epoch, index of the picture) alone. So neither the batch size, nor the order of the pictures,
nor a resumed run changes what a picture looks like in an epoch, and no random state need be stored.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np

from cifar_lib.backend import keras, on_tensorflow
from cifar_lib.data import IMAGE_SHAPE, NUM_CLASSES, Split

#: The ten arguments that the deck gives to Keras' `ImageDataGenerator`, exactly.
SEED_ARGUMENTS = {
    "featurewise_center": False,
    "samplewise_center": False,
    "featurewise_std_normalization": False,
    "samplewise_std_normalization": False,
    "zca_whitening": False,
    "rotation_range": 0,
    "width_shift_range": 0.1,
    "height_shift_range": 0.1,
    "horizontal_flip": True,
    "vertical_flip": True,
}

#: uint8 (N, 32, 32, 3), seed, epoch, indices (N,) -> float32 (N, 32, 32, 3) in 0..1.
Policy = Callable[[np.ndarray, int, int, np.ndarray], np.ndarray]

# ImageDataGenerator draws from numpy's global generator, which all threads share.
_numpy_global_generator = threading.Lock()


def scale(
    images: np.ndarray, seed: int = 0, epoch: int = 0, indices: np.ndarray | None = None
) -> np.ndarray:
    """Divide by 255 and change nothing else: the policy "none"."""
    return np.multiply(images, np.float32(1 / 255), dtype=np.float32)


class GeneratorPolicy:
    """An `ImageDataGenerator` that is asked for one picture's transform at a time.

    Its own iterator sets numpy's global seed and cannot be resumed. Needs TensorFlow.
    """

    def __init__(self, **arguments: object) -> None:
        from tensorflow.keras.preprocessing.image import ImageDataGenerator

        self.generator = ImageDataGenerator(**arguments)

    def __call__(
        self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        seeds = (_uniform(seed, epoch, indices, 1)[:, 0] * 2**32).astype(np.uint32)
        images = scale(images)
        for image, transform in zip(images, self.transforms(seeds), strict=True):
            image[...] = self.generator.apply_transform(image, transform)
        return images

    def transforms(self, seeds: np.ndarray) -> list[dict[str, float]]:
        """Draw a transform for each seed, and leave numpy's global generator as it was."""
        with _numpy_global_generator:
            state = np.random.get_state()
            try:
                return [
                    self.generator.get_random_transform(IMAGE_SHAPE, seed=int(seed))
                    for seed in seeds
                ]
            finally:
                np.random.set_state(state)


class LayersPolicy:
    """Shifts and flips by Keras preprocessing layers, on any backend.

    The distribution is that of `ImageDataGenerator` with the same arguments: independent shifts,
    uniform in +-shift of the side, bilinear, edges repeated; independent flips, each for one
    picture in two. The layers only apply what is drawn here, since Keras'
    `RandomFlip("horizontal_and_vertical")` flips both ways or not at all (3.15).

    Args:
        shift: largest shift as a fraction of the side.
        flips: any of "horizontal" and "vertical".
    """

    def __init__(self, shift: float, flips: tuple[str, ...]) -> None:
        self.shift = shift
        self.translation = keras.layers.RandomTranslation(
            shift, shift, fill_mode="nearest", interpolation="bilinear", dtype="float32"
        )
        self.flips = [keras.layers.RandomFlip(direction, dtype="float32") for direction in flips]

    def __call__(
        self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        uniform = _uniform(seed, epoch, indices, 2 + len(self.flips))
        height, width, _ = IMAGE_SHAPE
        translations = (2 * uniform[:, :2] - 1) * self.shift * (width, height)
        return self.apply(images, translations, uniform[:, 2:] < 0.5)

    def apply(self, images: np.ndarray, translations: np.ndarray, flips: np.ndarray) -> np.ndarray:
        """Shift and flip.

        Args:
            images: uint8 (N, 32, 32, 3).
            translations: (N, 2), pixels to the right and down.
            flips: bool (N, flips of this policy).
        """
        out = keras.ops.convert_to_tensor(scale(images))
        translations = keras.ops.convert_to_tensor(translations.astype(np.float32))
        out = self.translation.transform_images(out, {"translations": translations})
        for layer, flip in zip(self.flips, flips.T, strict=True):
            out = layer.transform_images(out, {"flips": flip[:, None, None, None]})
        return keras.ops.convert_to_numpy(out)


class CropFlipPolicy:
    """Shifts by whole pixels, the border mirrored; and every image seen both ways in turn.

    A shift is uniform among -pixels..pixels in each direction. Which way an image looks in the
    first epoch is random; then it alternates, so that two epochs in a row never show the same view:
    Jordan 2024, arXiv 2404.00498, section 3.6. On any backend.

    Args:
        pixels: the largest shift.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(
        self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        margin = self.pixels
        shifts = (_uniform(seed, epoch, indices, 2) * (2 * margin + 1)).astype(int)
        around = ((0, 0), (margin, margin), (margin, margin), (0, 0))
        padded = np.pad(images, around, mode="reflect")
        _, height, width, _ = images.shape
        out = np.empty_like(images)
        for image, source, (down, right) in zip(out, padded, shifts, strict=True):
            image[...] = source[down : down + height, right : right + width]
        first = _uniform(seed, 0, indices, 1, use="first flip")[:, 0] < 0.5
        flipped = first ^ bool(epoch % 2)
        out[flipped] = out[flipped, :, ::-1]
        return scale(out)


def _seed() -> Policy:
    if on_tensorflow():
        return GeneratorPolicy(**SEED_ARGUMENTS)
    return _seed_layers()


def _seed_layers() -> Policy:
    return LayersPolicy(SEED_ARGUMENTS["width_shift_range"], ("horizontal", "vertical"))


BUILDERS: dict[str, Callable[[], Policy]] = {
    "none": lambda: scale,
    # The deck's: the ImageDataGenerator on TensorFlow, elsewhere the layers.
    "seed": _seed,
    "seed_layers": _seed_layers,
    # The deck's without its vertical flip, which is unusual for photographs.
    "shift_flip": lambda: LayersPolicy(SEED_ARGUMENTS["width_shift_range"], ("horizontal",)),
    "crop_flip": lambda: CropFlipPolicy(2),
}


def make(name: str) -> Policy:
    """Make a policy: a callable of (images, seed, epoch, indices).

    Raises:
        KeyError: `name` is not in `BUILDERS` (`recipes` refuses it earlier, with a suggestion).
    """
    return BUILDERS[name]()


class Batches(keras.utils.PyDataset):
    """The batches of a split, in the order and with the changes that (seed, epoch) decide.

    `epoch` is set before an epoch begins; a batch depends on nothing but `epoch` and its number.

    Args:
        split: images and labels.
        batch_size: images a batch; the last batch may be smaller.
        policy: what happens to the images.
        seed: decides the order and the changes.
        shuffle: False keeps the split's order.
        size: the images are resized to this side, in pixels.
        label_smoothing: None gives labels as integers; a number in 0..1 gives rows of class
            probabilities, float32 (N, 100), of which this share is spread over all classes
            alike: Szegedy et al. 2016, arXiv 1512.00567, section 7.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        policy: Policy = scale,
        *,
        seed: int = 0,
        shuffle: bool = False,
        size: int = IMAGE_SHAPE[0],
        label_smoothing: float | None = None,
    ) -> None:
        # With one worker, Keras on TensorFlow prefetches through tf.data with autotune, and
        # destroying that iterator can wait up to a minute for the autotune thread. With more, Keras
        # on other backends takes a batch to build the model by and leaves those prefetched after
        # it in the queue, to be trained on out of their order and epoch (Keras 3.15).
        super().__init__(workers=2 if on_tensorflow() else 1)
        self.split, self.policy = split, policy
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.size, self.label_smoothing = size, label_smoothing
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self.shuffle:
            order = _order(self.seed, self.epoch, len(self.split))
        else:
            order = np.arange(len(self.split))
        rows = order[number * self.batch_size : (number + 1) * self.batch_size]
        images, indices = self.split.images[rows], self.split.indices[rows]
        images = resize(self.policy(images, self.seed, self.epoch, indices), self.size)
        labels = self.split.fine_labels[rows]
        if self.label_smoothing is None:
            return images, labels
        targets = np.full((len(labels), NUM_CLASSES), self.label_smoothing / NUM_CLASSES, "float32")
        targets[np.arange(len(labels)), labels] += 1 - self.label_smoothing
        return images, targets


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize square images, float32 (N, side, side, C), as Keras does: bilinear, antialiased."""
    count, side, _, channels = images.shape
    if size == side:
        return images
    # Two products of matrices: Keras' own is six times slower, 4 % of a training step.
    matrix = _resizing(side, size)
    images = matrix @ images.reshape(count, side, side * channels)
    return (matrix @ images.reshape(-1, side, channels)).reshape(count, size, size, channels)


@functools.lru_cache
def _resizing(side: int, size: int) -> np.ndarray:
    """The matrix (size, side) by which Keras resizes a column of pixels."""
    columns = np.eye(side, dtype=np.float32)[:, :, None, None]
    resized = keras.ops.image.resize(
        np.repeat(columns, 2, 2), (size, 2), antialias=True, data_format="channels_last"
    )
    return np.ascontiguousarray(keras.ops.convert_to_numpy(resized)[:, :, 0, 0].T)


def random_stream(use: str, *key: int) -> np.random.Generator:
    """The random numbers of one use of chance, told apart from others by its name and `key`."""
    return np.random.default_rng((*use.encode(), *key))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, images: int) -> np.ndarray:
    return random_stream("shuffle", seed, epoch).permutation(images)


def _uniform(
    seed: int, epoch: int, indices: np.ndarray, columns: int, use: str = "augmentation"
) -> np.ndarray:
    rows = 1 << int(indices.max()).bit_length()
    return _uniform_table(use, seed, epoch, rows, columns)[indices]


@functools.lru_cache(maxsize=8)
def _uniform_table(use: str, seed: int, epoch: int, rows: int, columns: int) -> np.ndarray:
    # A row does not depend on how many follow it, so `rows` does not change what a picture gets.
    return random_stream(use, seed, epoch).random((rows, columns))
