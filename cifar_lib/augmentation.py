"""Augmentation policies, looked up by name, mixing, and the batches that feed a network.

A policy turns uint8 images into float32 images in 0..1 and draws a picture's changes from
(seed, epoch, index of the picture) alone. So neither the batch size, nor the order of the pictures,
nor a resumed run changes what a picture looks like in an epoch, and no random state need be stored.
Where Keras' layers draw for a whole batch from a state of their own, they only apply what is drawn
here.

Mixing blends the pictures of a batch after that, by (seed, epoch, number of the batch) alone.
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

#: images float32 (N, H, W, 3), labels float32 (N, classes), a generator -> the same, mixed.
Mixer = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]

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
        images = scale(images)
        for image, transform in zip(images, self.draw(seed, epoch, indices), strict=True):
            image[...] = self.generator.apply_transform(image, transform)
        return images

    def draw(self, seed: int, epoch: int, indices: np.ndarray) -> list[dict[str, float]]:
        """The transform of each image."""
        seeds = (_uniform(seed, epoch, indices, 1)[:, 0] * 2**32).astype(np.uint32)
        return self.transforms(seeds)

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
        return scale(self.views(images, seed, epoch, indices))

    def views(self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        """The same in uint8, as it goes in."""
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
        return out


class ErasingPolicy:
    """The views of `CropFlipPolicy`, one in two of which loses a rectangle to noise.

    Zhong et al. 2020, "Random erasing data augmentation", arXiv 1708.04896, with its noise, uniform
    in 0..1 for every pixel and channel: Keras' own would be normal, and its negative half black.
    The rectangle is drawn as by Keras' `RandomErasing`: the square of each side's share of the
    image's is uniform in 0.02..0.33, and all of it lies within the image.

    Args:
        pixels: the largest shift.
        probability: of losing a rectangle.
    """

    def __init__(self, pixels: int, probability: float = 0.5) -> None:
        self.crop_flip, self.probability = CropFlipPolicy(pixels), probability
        self.layer = keras.layers.RandomErasing(
            (probability, probability), (0.02, 0.33), value_range=(0, 1), dtype="float32"
        )

    def __call__(
        self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        images = self.crop_flip(images, seed, epoch, indices)
        uniform = _uniform(seed, epoch, indices, 5, use="erasing")
        erased = uniform[:, 0] < self.probability
        least, most = self.layer.scale
        sides = np.sqrt(least + (most - least) * uniform[:, 1:3])
        noise = np.zeros_like(images)
        for row in np.flatnonzero(erased):
            stream = random_stream("erasing noise", seed, epoch, int(indices[row]))
            noise[row] = stream.random(images.shape[1:], np.float32)
        transformation = {
            "apply_erasing": erased,
            "batch_masks": _rectangles(images, sides, uniform[:, 3:]),
            "fill_value": noise,
        }
        return _applied(self.layer.transform_images, images, transformation)


def _column(strengths: np.ndarray) -> np.ndarray:
    return strengths[:, 0, None, None, None]


def _rotations(degrees: np.ndarray) -> np.ndarray:
    """The matrices (N, 8) by which Keras turns square images about their middle."""
    sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
    middle = (IMAGE_SHAPE[0] - 1) / 2
    right, down = middle * (1 - cosine + sine), middle * (1 - sine - cosine)
    none = np.zeros_like(degrees)
    return np.stack([cosine, -sine, right, sine, cosine, down, none, none], axis=1)


#: Operations of Keras' `RandAugment`: strengths float32 (N, 2) in -1..1 -> what its layers take.
#: A strength of 1 is the largest in the list of Cubuk et al. 2018, "AutoAugment", arXiv 1805.09501.
#: Keras adds brightness where they multiply: it is as much to a middle grey.
OPERATIONS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "random_shear": lambda strengths: {"shear_factor": 0.3 * strengths},
    "random_translation": lambda strengths: {
        "translations": 150 / 331 * IMAGE_SHAPE[0] * strengths
    },
    "random_rotation": lambda strengths: {"rotation_matrix": _rotations(30 * strengths[:, 0])},
    "random_brightness": lambda strengths: {"rgb_delta": 0.45 * 255 * _column(strengths)},
    "random_color_degeneration": lambda strengths: {"factor": -0.9 * _column(strengths)},
    "random_contrast": lambda strengths: {"contrast_factor": 1 + 0.9 * _column(strengths)},
    "random_sharpness": lambda strengths: {"factor": (1 + 0.9 * strengths[:, 0]) / 2},
    "random_posterization": lambda strengths: {
        "shift_factor": np.rint(4 * np.abs(strengths[:, 0])).astype(np.uint8)
    },
    "solarization": lambda strengths: {
        "additions": 0 * _column(strengths),
        "thresholds": 256 * (1 - np.abs(_column(strengths))),
    },
    "auto_contrast": lambda strengths: {},
    "equalization": lambda strengths: {},
}


class RandAugmentPolicy:
    """The views of `CropFlipPolicy`, each changed by some random operations, one after the other.

    Cubuk et al. 2020, "RandAugment", arXiv 1909.13719: each is any of `OPERATIONS`, equally likely.
    Keras' `RandAugment` draws the same operations for all of a batch, most in one direction alone,
    and turns pictures by up to 180 degrees. So only its parts are used, on the pictures that drew
    them; except equalisation, for which it counts the grey levels of a whole batch.

    Args:
        pixels: the largest shift.
        operations: how many change a picture.
        strength: the largest, 0..1; strengths are uniform in +-`strength`.
    """

    def __init__(self, pixels: int, operations: int = 2, strength: float = 0.5) -> None:
        self.crop_flip = CropFlipPolicy(pixels)
        self.operations, self.strength = operations, strength
        self.layer = keras.layers.RandAugment(value_range=(0, 255), dtype="float32")

    def __call__(
        self, images: np.ndarray, seed: int, epoch: int, indices: np.ndarray
    ) -> np.ndarray:
        images = self.crop_flip.views(images, seed, epoch, indices).astype(np.float32)
        for chosen, strengths in self.draw(seed, epoch, indices):
            for number, name in enumerate(OPERATIONS):
                rows = np.flatnonzero(chosen == number)
                if len(rows):
                    images[rows] = self.apply(name, images[rows], strengths[rows])
        return images * np.float32(1 / 255)

    def draw(
        self, seed: int, epoch: int, indices: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each operation its numbers in `OPERATIONS`, (N,), and strengths, float32 (N, 2)."""
        uniform = _uniform(seed, epoch, indices, 3 * self.operations, use="operations")
        uniform = uniform.reshape(len(indices), self.operations, 3).swapaxes(0, 1)
        return [
            (
                (drawn[:, 0] * len(OPERATIONS)).astype(int),
                (self.strength * (2 * drawn[:, 1:] - 1)).astype(np.float32),
            )
            for drawn in uniform
        ]

    def apply(self, name: str, images: np.ndarray, strengths: np.ndarray) -> np.ndarray:
        """Change images, float32 (N, 32, 32, 3) in 0..255, by one of `OPERATIONS`."""
        if name == "equalization":
            return equalize(images)
        layer = getattr(self.layer, name)
        return _applied(layer.transform_images, images, OPERATIONS[name](strengths))


def equalize(images: np.ndarray) -> np.ndarray:
    """Spread the grey levels of every channel of every image evenly over 0..255.

    As Keras' `Equalization` does to an image alone, in a hundredth of the time: it takes several
    milliseconds for each, and equalises the images of a batch together.

    Args:
        images: float32 (N, H, W, C) in 0..255.
    """
    count, height, width, channels = images.shape
    levels = np.moveaxis(images.astype(np.uint8), 3, 1).reshape(count * channels, height * width)
    cells = levels + 256 * np.arange(len(levels))[:, None]
    histogram = np.bincount(cells.ravel(), minlength=256 * len(levels)).reshape(-1, 256)
    below = histogram.cumsum(axis=1)
    least = np.take_along_axis(histogram, levels.min(axis=1, keepdims=True), axis=1)
    more = below[:, -1:] - least
    table = np.rint((below - least) * 255 / np.maximum(more, 1)).astype(np.float32)
    table = np.where(more > 0, table, np.arange(256, dtype=np.float32))  # one level alone stays
    out = np.take_along_axis(table, levels, axis=1)
    return np.moveaxis(out.reshape(count, channels, height, width), 1, 3)


def _rectangles(images: np.ndarray, sides: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Masks (N, H, W, 1) of rectangles within images, drawn as Keras does.

    Args:
        images: (N, H, W, C).
        sides: (N, 2), height and width as shares of the image's.
        places: (N, 2) in 0..1: at 0 the rectangle touches the image's top or left, at 1 the other.
    """
    inside = []
    for axis, pixels in enumerate(images.shape[1:3]):
        length = sides[:, axis, None] * pixels
        start = places[:, axis, None] * (pixels - length)
        grid = np.arange(pixels)
        inside.append((grid >= start) & (grid < start + length))
    rows, columns = inside
    return rows[:, :, None, None] & columns[:, None, :, None]


def _applied(transform: Callable, values: np.ndarray, transformation: dict) -> np.ndarray:
    """What a Keras layer's `transform` makes of `values` by what was drawn for it."""
    tensors = {name: keras.ops.convert_to_tensor(value) for name, value in transformation.items()}
    return keras.ops.convert_to_numpy(transform(keras.ops.convert_to_tensor(values), tensors))


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
    "crop_flip_erase": lambda: ErasingPolicy(2),
    "rand_augment": lambda: RandAugmentPolicy(2),
}


def make(name: str) -> Policy:
    """Make a policy: a callable of (images, seed, epoch, indices).

    Raises:
        KeyError: `name` is not in `BUILDERS` (`recipes` refuses it earlier, with a suggestion).
    """
    return BUILDERS[name]()


class MixUp:
    """Each image and its label become a mean of themselves and another of the batch.

    Zhang et al. 2018, "mixup: beyond empirical risk minimization", arXiv 1710.09412, with its
    Beta(1, 1) for CIFAR: what an image keeps is uniform in 0..1. Each image has its own share, as
    in Keras' `MixUp`, where the paper's code has one a batch.
    """

    def __init__(self) -> None:
        self.layer = keras.layers.MixUp(dtype="float32")

    def __call__(
        self, images: np.ndarray, targets: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        transformation = {
            "permutation_order": random.permutation(len(images)),
            "mix_weight": random.random(len(images), np.float32),
        }
        return _mixed(self.layer, images, targets, transformation)


class CutMix:
    """A rectangle of each image becomes that of another of the batch, and so much of its label.

    Yun et al. 2019, "CutMix: regularization strategy to train strong classifiers with localizable
    features", arXiv 1905.04899: the rectangle has the image's shape, and its area is uniform in
    0..1 of the image's. It lies within the image, as in Keras' `CutMix`, which also lets each image
    have its own; labels are mixed by the number of pixels.
    """

    def __init__(self) -> None:
        self.layer = keras.layers.CutMix(dtype="float32")

    def __call__(
        self, images: np.ndarray, targets: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        partners = random.permutation(len(images))
        sides = np.sqrt(random.random((len(images), 1))).repeat(2, axis=1)
        masks = _rectangles(images, sides, random.random((len(images), 2)))
        transformation = {
            "permutation_order": partners,
            "batch_masks": masks,
            "mix_weight": 1 - masks.mean(axis=(1, 2, 3), dtype=np.float32),
        }
        return _mixed(self.layer, images, targets, transformation)


def _mixed(
    layer: keras.layers.Layer, images: np.ndarray, targets: np.ndarray, transformation: dict
) -> tuple[np.ndarray, np.ndarray]:
    return (
        _applied(layer.transform_images, images, transformation),
        _applied(layer.transform_labels, targets, transformation),
    )


MIXERS: dict[str, Callable[[], Mixer]] = {"mixup": MixUp, "cutmix": CutMix}


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
        mixing: one of `MIXERS`: the resized images are mixed, and with them their labels, which
            are then probabilities in any case; None mixes none.
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
        mixing: str | None = None,
    ) -> None:
        # With one worker, Keras on TensorFlow prefetches through tf.data with autotune, and
        # destroying that iterator can wait up to a minute for the autotune thread. With more, Keras
        # on other backends takes a batch to build the model by and leaves those prefetched after
        # it in the queue, to be trained on out of their order and epoch (Keras 3.15).
        super().__init__(workers=2 if on_tensorflow() else 1)
        self.split, self.policy = split, policy
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.size, self.label_smoothing = size, label_smoothing
        self.mixer = MIXERS[mixing]() if mixing else None
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
        if self.label_smoothing is None and self.mixer is None:
            return images, labels
        smoothing = self.label_smoothing or 0.0
        targets = np.full((len(labels), NUM_CLASSES), smoothing / NUM_CLASSES, "float32")
        targets[np.arange(len(labels)), labels] += 1 - smoothing
        if self.mixer is None:
            return images, targets
        random = random_stream("mixing", self.seed, self.epoch, number)
        return self.mixer(images, targets, random)


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
