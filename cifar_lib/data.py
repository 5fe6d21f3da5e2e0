"""Find, verify and load CIFAR-100; split it; draw a synthetic stand-in for it."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs

from cifar_lib.recipes import PROTOCOLS

IMAGE_SHAPE = (32, 32, 3)
NUM_CLASSES = 100

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
SHA256 = {
    "train": "735e79b04f092ca3d2e6d07f368c0a7d70d48c48d28865950cc24454cf45129b",
    "test": "4b67687d9933c4db8f0831104447f15b93774f4f464bd0516f0f0f2ac83b7864",
    "meta": "a5d4786345c961390f865e93b434dbd5c6904ce880667e0cb888c97d449f28b9",
}

# Raise it when the layout of the cache changes, so that an old cache is left alone.
CACHE_VERSION = 1
# Raise it when the drawing changes, so that an old cache is not read.
SYNTHETIC_VERSION = 1

# Where the deck's words are not simply the official name with spaces for underscores.
_DECK_WORDS = {
    "apple": "apples",
    "bottle": "bottles",
    "bowl": "bowls",
    "can": "cans",
    "cup": "cups",
    "keyboard": "computer keyboard",
    "large_man-made_outdoor_things": "large man-made outdoor things",
    "lawn_mower": "lawn-mower",
    "maple_tree": "maple",
    "medium_mammals": "medium-sized mammals",
    "mushroom": "mushrooms",
    "oak_tree": "oak",
    "orange": "oranges",
    "orchid": "orchids",
    "palm_tree": "palm",
    "pear": "pears",
    "pine_tree": "pine",
    "plate": "plates",
    "poppy": "poppies",
    "rose": "roses",
    "sunflower": "sunflowers",
    "sweet_pepper": "sweet peppers",
    "tulip": "tulips",
    "willow_tree": "willow",
}


class DataError(Exception):
    """The data is missing, is not what it should be, or cannot be split as asked."""


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    `name` is "train", "validation" or "test"; `images` (N, 32, 32, 3) uint8, read-only;
    `fine_labels` (N,) int64 in 0..99; `coarse_labels` (N,) int64 in 0..19; `indices` (N,) int64,
    ascending, the positions in the official file.
    """

    name: str
    images: np.ndarray
    fine_labels: np.ndarray
    coarse_labels: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Dataset:
    """A whole data set: 50,000 training and 10,000 test images in 100 classes.

    `fine_names` are the 100 class names and `coarse_names` the 20 superclass names, in the
    official spelling; `superclass_of` (100,) int64 is the superclass of each class; `digests` maps
    each file to its SHA-256.
    """

    name: str
    train: Split
    test: Split
    fine_names: tuple[str, ...]
    coarse_names: tuple[str, ...]
    superclass_of: np.ndarray
    digests: dict[str, str]

    @property
    def synthetic(self) -> bool:
        """Whether the pictures are drawn and not CIFAR-100's."""
        return self.name == "synthetic"

    @property
    def title(self) -> str:
        """What a figure's title calls the data set."""
        return "synthetic stand-in, not CIFAR-100" if self.synthetic else "CIFAR-100"


@dataclass(frozen=True)
class Splits:
    """What a run trains on, chooses by (if it chooses) and is tested on."""

    train: Split
    validation: Split | None
    test: Split


def display_name(name: str) -> str:
    """The words the slide deck uses for a class or superclass: `orchid` becomes "orchids"."""
    return _DECK_WORDS.get(name, name.replace("_", " "))


def cache_folder() -> Path:
    """The folder of the plain arrays: `CIFAR_LIB_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("CIFAR_LIB_CACHE") or platformdirs.user_cache_dir("cifar_lib"))


def _usual_folders() -> list[Path]:
    keras_home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    return [
        keras_home / "datasets" / "cifar-100-python-target" / "cifar-100-python",
        Path("data", "cifar-100-python").absolute(),
    ]


def find() -> Path | None:
    """The first folder that holds the official `train`, `test` and `meta`, or None.

    Looks in `CIFAR100_DIR`, else in the Keras cache and in torchvision's usual
    `data/cifar-100-python`. Raises DataError when `CIFAR100_DIR` is set but lacks a file: other
    data is never taken in its place.
    """
    named = os.environ.get("CIFAR100_DIR")
    if named:
        folder = Path(named).expanduser()
        missing = [file for file in SHA256 if not (folder / file).is_file()]
        if missing:
            raise DataError(
                f"CIFAR100_DIR is {named!r}, but there is no {' and no '.join(missing)} in it. "
                "Let it name the folder with the official files train, test and meta, or unset it."
            )
        return folder
    for folder in _usual_folders():
        if all((folder / file).is_file() for file in SHA256):
            return folder
    return None


def verify(folder: Path) -> dict[str, str]:
    """The SHA-256 of each official file in `folder`, all read in full.

    Raises DataError when a file cannot be read or is not the official one.
    """
    digests = {}
    for file in SHA256:
        try:
            with (folder / file).open("rb") as stream:
                digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"Cannot read {folder / file}: {error.strerror}.") from error
        _compare(folder / file, digests[file])
    return digests


def _compare(path: Path, found: str) -> None:
    expected = SHA256[path.name]
    if found != expected:
        raise DataError(
            f"{path} is not CIFAR-100's official {path.name!r} file: its SHA-256 should be "
            f"{expected} but is {found}. Nothing in it was used. Delete the folder to have it "
            f"downloaded again, or set CIFAR100_DIR to a folder with the files of {ARCHIVE_URL}."
        )


# The files name numpy's modules of 2009; looking those up would warn in numpy 2.
_UNPICKLED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, bytes and numpy arrays, which is all that the official files hold."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _UNPICKLED[module, name]
        except KeyError:
            raise DataError(
                f"A CIFAR-100 file asks for {module}.{name}, which the official files never do. "
                f"It was not run. Replace the file by the one in {ARCHIVE_URL}."
            ) from None


def _unpickle(content: bytes) -> dict:
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


def _read_official(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    arrays, names = {}, {}
    for file in SHA256:
        try:
            content = (folder / file).read_bytes()
        except OSError as error:
            raise DataError(f"Cannot read {folder / file}: {error.strerror}.") from error
        # Hashes what is unpickled, not the file: that could change in between.
        _compare(folder / file, hashlib.sha256(content).hexdigest())
        record = _unpickle(content)
        if file == "meta":
            names["fine_names"] = [name.decode() for name in record[b"fine_label_names"]]
            names["coarse_names"] = [name.decode() for name in record[b"coarse_label_names"]]
            continue
        planes = record[b"data"].reshape(-1, 3, 32, 32)
        arrays[f"{file}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{file}_fine_labels"] = np.array(record[b"fine_labels"], np.int64)
        arrays[f"{file}_coarse_labels"] = np.array(record[b"coarse_labels"], np.int64)
    return arrays, names | {"digests": SHA256}


def _download() -> Path:
    remedy = (
        f"Connect to the internet, or get {ARCHIVE_URL} on another machine, unpack it, and set "
        "CIFAR100_DIR to the folder with train, test and meta. To try things out without it, "
        'use the data set "synthetic".'
    )
    try:
        request = urllib.request.Request(ARCHIVE_URL, method="HEAD")
        urllib.request.urlopen(request, timeout=5).close()
    except OSError as error:
        raise DataError(
            f"CIFAR-100 is not on this machine and {ARCHIVE_URL} cannot be reached: {error}. "
            f"{remedy}"
        ) from error
    import keras

    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # Keras' download sets none, and would wait for ever
    try:
        extracted = keras.utils.get_file(
            "cifar-100-python-target", ARCHIVE_URL, file_hash=ARCHIVE_SHA256, extract=True
        )
    except Exception as error:  # Keras raises a plain Exception when a download fails
        raise DataError(f"CIFAR-100 could not be downloaded: {error}. {remedy}") from error
    finally:
        socket.setdefaulttimeout(previous)
    return Path(extracted) / "cifar-100-python"


def load(name: str = "cifar100", *, download: bool = True) -> Dataset:
    """The data set "cifar100", or "synthetic", a drawn stand-in of the same shape.

    The first load leaves plain arrays in `cache_folder()`; later ones map them into memory. Files
    are compared with the official SHA-256 before they are read, and again when their size or time
    of change is new. CIFAR-100 that `find` does not find is downloaded to the Keras cache, unless
    `download` is False. An unwritable cache folder costs a warning, not the data.

    Raises DataError when the data cannot be had, is not the official one, or `name` is unknown.
    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    if name == "synthetic":
        key = f"synthetic-{SYNTHETIC_VERSION}"
        return _dataset(name, *(_read_cache(key) or _write_cache(key, *_draw_synthetic())))
    if name != "cifar100":
        raise DataError(f'Unknown data set {name!r}: use "cifar100" or "synthetic".')

    key = f"cifar100-{hashlib.sha256(''.join(SHA256.values()).encode()).hexdigest()[:16]}"
    folder = find()
    cached = _read_cache(key)
    if cached and folder:
        _verify_once(folder)
    elif not cached:
        if folder is None and not download:
            looked = ", ".join(str(folder) for folder in _usual_folders())
            raise DataError(
                f"CIFAR-100 is not in {looked}. Set CIFAR100_DIR to the folder with train, test "
                "and meta, or allow the download."
            )
        cached = _write_cache(key, *_read_official(folder or _download()))
    return _dataset(name, *cached)


def _dataset(name: str, arrays: dict[str, np.ndarray], names: dict) -> Dataset:
    splits = {}
    for split in ("train", "test"):
        images, fine, coarse = (
            arrays[f"{split}_{what}"] for what in ("images", "fine_labels", "coarse_labels")
        )
        splits[split] = Split(split, images, fine, coarse, np.arange(len(images)))
    superclass_of = np.zeros(NUM_CLASSES, np.int64)
    superclass_of[splits["test"].fine_labels] = splits["test"].coarse_labels
    return Dataset(
        name=name,
        fine_names=tuple(names["fine_names"]),
        coarse_names=tuple(names["coarse_names"]),
        superclass_of=superclass_of,
        digests=dict(names["digests"]),
        **splits,
    )


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _verify_once(folder: Path) -> None:
    """Verify `folder` unless these very files (by size and time of change) have passed before."""
    files = [str(folder.resolve()), *(_stamp(folder / file) for file in SHA256)]
    stamp = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]
    passed = cache_folder() / f"verified-{stamp}"
    if not passed.exists():
        verify(folder)
        with contextlib.suppress(OSError):  # a read-only cache: verified again next time
            passed.touch()


def _read_cache(key: str) -> tuple[dict[str, np.ndarray], dict] | None:
    """The arrays of a whole and untouched cache, mapped into memory; None if there is none."""
    folder = cache_folder() / key
    try:
        contents = json.loads((folder / "contents.json").read_text())
        arrays = {}
        for name, stamp in contents["stamps"].items():
            path = folder / f"{name}.npy"
            if _stamp(path) != stamp:
                return None
            arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        return arrays, contents["names"]
    except (OSError, ValueError, KeyError):
        return None


def _write_cache(
    key: str, arrays: dict[str, np.ndarray], names: dict
) -> tuple[dict[str, np.ndarray], dict]:
    """Leave the arrays in the cache for the next load, and return them, read-only.

    The cache appears whole or not at all: it is written beside its place and renamed. A process
    that comes second leaves the first one's in place.
    """
    for array in arrays.values():
        array.flags.writeable = False
    target = cache_folder() / key
    building = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob("building-*"):
            if time.time() - left_over.stat().st_mtime > 3600:  # its process died
                shutil.rmtree(left_over, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
        stamps = {}
        for name, array in arrays.items():
            path = building / f"{name}.npy"
            np.save(path, array, allow_pickle=False)
            stamps[name] = _stamp(path)
        contents = {"stamps": stamps, "names": names}
        (building / "contents.json").write_text(json.dumps(contents, indent=1))
        if target.exists() and _read_cache(key) is None:
            shutil.rmtree(target)
        if not target.exists():
            building.rename(target)
    except OSError as error:
        if _read_cache(key) is None:
            warnings.warn(
                f"The cache in {target} could not be written ({error}): every load will take as "
                "long as this one. Set CIFAR_LIB_CACHE to a folder that can be written.",
                stacklevel=3,
            )
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)
    return arrays, names


def make_splits(
    dataset: Dataset,
    protocol: str = "holdout",
    *,
    train_size: int | None = None,
    validation_size: int = 5000,
    test_size: int | None = None,
    classes: Sequence[str] | None = None,
    split_seed: int = 0,
) -> Splits:
    """Divide a data set by protocol, stratified and seeded.

    "holdout": `validation_size` of the 50,000 training images validate, the rest trains. "final":
    all 50,000 train and nothing validates. "deck": all 50,000 train and the test images validate,
    as in the slide deck; what such a run reports of the test images is optimistic.

    `train_size` and `test_size` limit the images (None: all there are), `classes` (official names)
    leaves the images of other classes out; labels keep their official numbers. Each class gets the
    same number of images, give or take one. Splits are nested: with the same seed and
    `validation_size`, a smaller `train_size` takes a subset of a larger one's images.

    Raises DataError for an unknown protocol or class and for a size that cannot be had.
    """
    _known("protocol", protocol, PROTOCOLS)
    for name in classes or ():
        _known("class", name, dataset.fine_names)
    ids = [dataset.fine_names.index(name) for name in dataset.fine_names if name in (classes or ())]
    if classes is not None and len(ids) < 1:
        raise DataError("classes is empty: name at least one class, or leave it out for all.")

    order = _stratified_order(dataset.train.fine_labels, ids, split_seed)
    validation = None
    if protocol == "holdout":
        chosen, order = _take("validation_size", validation_size, order)
        validation = _select(dataset.train, "validation", chosen)
    chosen, _ = _take("train_size", train_size, order)
    train = _select(dataset.train, "train", chosen)
    order = _stratified_order(dataset.test.fine_labels, ids, split_seed)
    chosen, _ = _take("test_size", test_size, order)
    if protocol == "deck":
        validation = _select(dataset.test, "validation", chosen)
    return Splits(train, validation, _select(dataset.test, "test", chosen))


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
        raise DataError(f"Unknown {what} {name!r}: did you mean {near[0]!r}?")


def _take(what: str, size: int | None, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if size is None:
        size = len(order)
    if not 1 <= size <= len(order):
        raise DataError(f"{what} is {size}, but must be from 1 to {len(order)}, the images left.")
    return order[:size], order[size:]


def _stratified_order(labels: np.ndarray, ids: Sequence[int], seed: int) -> np.ndarray:
    """Positions such that any stretch of them holds every class equally often, within one."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(labels))
    turn = generator.permutation(NUM_CLASSES)[labels[shuffled]]
    by_class = np.argsort(turn, kind="stable")
    counts = np.bincount(turn, minlength=NUM_CLASSES)
    rank = np.empty_like(shuffled)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = shuffled[np.lexsort((turn, rank))]
    return order[np.isin(labels[order], ids)] if ids else order


def _select(split: Split, name: str, positions: np.ndarray) -> Split:
    positions = np.sort(positions)
    # All of them: no copy of 150 MB.
    rows = slice(None) if len(positions) == len(split) else positions
    return Split(
        name,
        split.images[rows],
        split.fine_labels[rows],
        split.coarse_labels[rows],
        split.indices[rows],
    )


def exact_duplicates(images: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """Pairs of images that are equal in every pixel, (K, 2) int64, found by hashing.

    With `images` alone, (N, 32, 32, 3) uint8: one row for every further copy, with the positions
    of the first copy and of this one. With `others`, (M, 32, 32, 3) uint8: one row for each of
    them that is also in `images`, with the positions of the first copy there and of this one.
    """
    first: dict[bytes, int] = {}
    pairs = []
    for position, image in enumerate(images):
        original = first.setdefault(image.tobytes(), position)
        if others is None and original != position:
            pairs.append((original, position))
    for position, image in enumerate(others if others is not None else ()):
        if image.tobytes() in first:
            pairs.append((first[image.tobytes()], position))
    return np.array(pairs, np.int64).reshape(-1, 2)


# The stand-in's superclasses are patterns and its classes are a pattern in a pair of colours. Each
# is as likely with its two colours swapped, so no pixel's mean tells anything to a linear model.
_COLOUR_PAIRS = {
    "black_white": (1.0, 1.0, 1.0),
    "red_cyan": (1.0, -0.6, -0.6),
    "green_magenta": (-0.6, 1.0, -0.6),
    "blue_yellow": (-0.6, -0.6, 1.0),
    "orange_azure": (1.0, 0.0, -1.0),
}


def _patterns(
    x: np.ndarray, y: np.ndarray, random: np.random.Generator
) -> dict[str, Callable[[], np.ndarray]]:
    """How each superclass is drawn at (n, 32, 32) places in pixels from a random centre.

    Values are in -1..1. None is the mirror image of another, left to right or upside down.
    """
    n = len(x)

    def wave(distance: np.ndarray, period: float) -> np.ndarray:
        jitter = random.uniform(0.9, 1.1, (n, 1, 1)).astype(np.float32)
        phase = random.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
        return np.sin(distance * (2 * np.pi / period * jitter).astype(np.float32) + phase)

    def diagonal() -> np.ndarray:
        sign = random.choice(np.array([-1, 1], np.float32), (n, 1, 1))
        return (x + sign * y) * np.float32(np.sqrt(0.5))

    def turn() -> np.ndarray:
        return np.arctan2(y, x)

    def whole(turns: int) -> np.ndarray:
        phase = random.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
        return np.sin(turns * turn() + phase)

    def blobs(size: int) -> np.ndarray:
        coarse = random.standard_normal((n, 32 // size + 2, 32 // size + 2), np.float32)
        fine = coarse.repeat(size, 1).repeat(size, 2)
        return np.clip(fine[:, :32, :32], -1, 1)

    radius = np.hypot(x, y)
    a, b = (x + y) * np.float32(np.sqrt(0.5)), (x - y) * np.float32(np.sqrt(0.5))
    return {
        "wide_level_stripes": lambda: wave(y, 8),
        "narrow_level_stripes": lambda: wave(y, 4),
        "wide_upright_stripes": lambda: wave(x, 8),
        "narrow_upright_stripes": lambda: wave(x, 4),
        "wide_slanted_stripes": lambda: wave(diagonal(), 8),
        "narrow_slanted_stripes": lambda: wave(diagonal(), 4),
        "wide_checks": lambda: np.sign(wave(x, 10) * wave(y, 10)),
        "narrow_checks": lambda: np.sign(wave(x, 5) * wave(y, 5)),
        "wide_diamonds": lambda: np.sign(wave(a, 10) * wave(b, 10)),
        "narrow_diamonds": lambda: np.sign(wave(a, 5) * wave(b, 5)),
        "wide_rings": lambda: wave(radius, 8),
        "narrow_rings": lambda: wave(radius, 4),
        "few_rays": lambda: whole(5),
        "many_rays": lambda: whole(12),
        "wide_dots": lambda: 2.0 * (wave(x, 9) + wave(y, 9) > 1) - 1,
        "narrow_dots": lambda: 2.0 * (wave(x, 5) + wave(y, 5) > 1) - 1,
        "level_zigzags": lambda: wave(y + 2 * np.abs(x % 8 - 4), 8),
        "upright_zigzags": lambda: wave(x + 2 * np.abs(y % 8 - 4), 8),
        "wide_blobs": lambda: blobs(4),
        "narrow_blobs": lambda: blobs(2),
    }


def _draw_synthetic(count_train: int = 500, count_test: int = 100) -> tuple[dict, dict]:
    """50,000 and 10,000 pictures, with their labels in a random order, and their names."""
    random = np.random.default_rng(20180607)
    grid = np.arange(32, dtype=np.float32) - 15.5
    n = count_train + count_test
    pictures, fine_labels, coarse_labels, fine_names, coarse_names = [], [], [], [], []

    def uniform(low: float, high: float, shape: tuple[int, ...] = (n, 1, 1)) -> np.ndarray:
        return random.uniform(low, high, shape).astype(np.float32)

    for coarse in range(20):
        for pair, axis in _COLOUR_PAIRS.items():
            x, y = grid - uniform(-8, 8), grid[:, None] - uniform(-8, 8)
            x, y = np.broadcast_arrays(x, y)
            patterns = _patterns(x, y, random)
            superclass = list(patterns)[coarse]
            # A soft-edged ellipse around the centre, of another size each time.
            reach = (x / uniform(9, 20)) ** 2 + (y / uniform(9, 20)) ** 2
            mask = 1 / (1 + np.exp(np.minimum(8 * (reach - 1), 40)))
            swapped = random.choice(np.array([-1, 1], np.float32), (n, 1, 1))
            shade = patterns[superclass]().astype(np.float32) * mask * swapped * uniform(0.2, 0.5)
            slope = uniform(-0.01, 0.01, (n, 1, 1, 3)) * x[..., None]
            picture = uniform(0.25, 0.75, (n, 1, 1, 3)) + slope
            picture += shade[..., None] * np.array(axis, np.float32)
            picture += random.standard_normal(picture.shape, np.float32) * np.float32(0.06)
            pictures.append((np.clip(picture, 0, 1) * 255).astype(np.uint8))
            fine_labels.append(np.full(n, len(fine_names), np.int64))
            coarse_labels.append(np.full(n, coarse, np.int64))
            fine_names.append(f"{superclass}_{pair}")
        coarse_names.append(superclass)

    arrays = {}
    for split, rows in ("train", slice(count_train)), ("test", slice(count_train, None)):
        parts = [
            np.concatenate([part[rows] for part in whole])
            for whole in (pictures, fine_labels, coarse_labels)
        ]
        order = random.permutation(len(parts[0]))
        for what, part in zip(("images", "fine_labels", "coarse_labels"), parts, strict=True):
            arrays[f"{split}_{what}"] = part[order]
    digests = {name: hashlib.sha256(array).hexdigest() for name, array in arrays.items()}
    return arrays, {"fine_names": fine_names, "coarse_names": coarse_names, "digests": digests}
