"""Find, verify and load CIFAR-100; split it; draw a synthetic stand-in for it."""

import contextlib
import difflib
import hashlib
import http.client
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
from PIL import Image, ImageOps, UnidentifiedImageError

from cifar_lib import ROOT
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

SYNTHETIC_TITLE = "synthetic stand-in, not CIFAR-100"
# To raise when the drawing changes, so that an old cache is not read.
SYNTHETIC_VERSION = 1

# The official class names, in their order, so that a name can be checked before the data is there.
_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

# Where the deck's words are not simply the official name with spaces for underscores.
_DECK_WORDS = {
    "apple": "apples",
    "bottle": "bottles",
    "bowl": "bowls",
    "can": "cans",
    "cup": "cups",
    "keyboard": "computer keyboard",
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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
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
        return SYNTHETIC_TITLE if self.synthetic else "CIFAR-100"


@dataclass(frozen=True, eq=False)
class Splits:
    """What a run trains on, chooses by (if it chooses) and is tested on."""

    train: Split
    validation: Split | None
    test: Split


def class_names(dataset: str) -> tuple[str, ...]:
    """The 100 class names of "cifar100" or "synthetic", in order, without loading anything."""
    if dataset == "synthetic":
        return tuple(f"{pattern}_{colours}" for pattern in _PATTERNS for colours in _COLOURS)
    return tuple(_CLASSES.split())


def display_name(name: str) -> str:
    """The words the slide deck uses for a class or superclass: `orchid` becomes "orchids"."""
    return _DECK_WORDS.get(name, name.replace("_", " "))


def cache_folder() -> Path:
    """The folder of the plain arrays: `CIFAR_LIB_CACHE`, else the user's cache folder."""
    named = os.environ.get("CIFAR_LIB_CACHE") or platformdirs.user_cache_dir("cifar_lib")
    return Path(named).expanduser()


def _usual_folders() -> list[Path]:
    keras_home = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    return [
        keras_home / "datasets" / "cifar-100-python-target" / "cifar-100-python",
        ROOT / "data" / "cifar-100-python",  # not of the working directory, a notebook's is another
    ]


def find() -> Path | None:
    """The first folder that holds the official `train`, `test` and `meta`, or None.

    Looks in `CIFAR100_DIR`, else in the Keras cache and in the repository's
    `data/cifar-100-python`, as torchvision would call it. Raises DataError when `CIFAR100_DIR` is
    set but lacks a file: other data is never taken in its place.
    """
    named = os.environ.get("CIFAR100_DIR")
    if named:
        folder = Path(named).expanduser()
        missing = [file for file in SHA256 if not os.access(folder / file, os.R_OK)]
        if missing:
            raise DataError(
                f"CIFAR100_DIR is {named!r}, but it holds no readable {' and no '.join(missing)}. "
                "Let it name the folder with the official files train, test and meta, or unset it."
            )
        return folder
    for folder in _usual_folders():
        if all(os.access(folder / file, os.R_OK) for file in SHA256):
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
    except (OSError, http.client.HTTPException) as error:
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
    if cached is None and folder is None:
        if not download:
            looked = ", ".join(str(folder) for folder in _usual_folders())
            raise DataError(
                f"CIFAR-100 is not in {looked}. Set CIFAR100_DIR to the folder with train, test "
                "and meta, or allow the download."
            )
        folder = _download()
    if folder is not None:
        passed = _passed(folder)
        if cached is None:
            cached = _write_cache(key, *_read_official(folder))
        elif not passed.exists():
            verify(folder)
        with contextlib.suppress(OSError):  # a read-only cache: verified again next time
            passed.touch()
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


def _passed(folder: Path) -> Path:
    """The mark in the cache that says that these very files, by size and time, were verified."""
    files = [str(folder.resolve()), *(_stamp(folder / file) for file in SHA256)]
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return cache_folder() / f"verified-{digest[:32]}"


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
    except (OSError, ValueError, KeyError, TypeError):
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
            with contextlib.suppress(FileNotFoundError):  # renamed by now
                if time.time() - left_over.stat().st_mtime > 3600:  # its process died
                    shutil.rmtree(left_over, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=target.parent))
        stamps = {}
        for name, array in arrays.items():
            path = building / f"{name}.npy"
            with path.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
                stream.flush()
                os.fsync(stream.fileno())  # or a crash could leave a file of zeros with this stamp
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
    leaves the images of other classes out; labels keep their official numbers. A `test_size` of 0
    gives a test split without images, but not by "deck", which validates on them. Each class gets
    the same number of images, give or take one. Splits are nested: with the same seed and
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
        chosen, order = _take("validation_size", validation_size, order, spare=1)
        validation = _select(dataset.train, "validation", chosen)
    chosen, _ = _take("train_size", train_size, order)
    train = _select(dataset.train, "train", chosen)
    order = _stratified_order(dataset.test.fine_labels, ids, split_seed)
    chosen, _ = _take("test_size", test_size, order, least=0 if protocol != "deck" else 1)
    if protocol == "deck":
        validation = _select(dataset.test, "validation", chosen)
    return Splits(train, validation, _select(dataset.test, "test", chosen))


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
        raise DataError(f"Unknown {what} {name!r}: did you mean {near[0]!r}?")


def _take(
    what: str, size: int | None, order: np.ndarray, *, spare: int = 0, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    if size is None:
        size = len(order)
    if not least <= size <= len(order) - spare:
        raise DataError(
            f"{what} is {size}, but {len(order)} images are left to take from: "
            f"let it be from {least} to {len(order) - spare}."
        )
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
    """Pairs of images that are equal in every pixel, found by hashing; (K, 2) int64 positions.

    With `images` (N, 32, 32, 3) uint8 alone: for every further copy, the positions of the first
    copy and of this one. With `others` (M, 32, 32, 3) uint8: for every one of them that `images`
    holds, the positions of its first copy there and of itself.
    """
    first: dict[bytes, int] = {}
    pairs = []
    for position, image in enumerate(images):
        original = first.setdefault(hashlib.sha256(image.tobytes()).digest(), position)
        if others is None and original != position:
            pairs.append((original, position))
    for position, image in enumerate(() if others is None else others):
        original = first.get(hashlib.sha256(image.tobytes()).digest())
        if original is not None:
            pairs.append((original, position))
    return np.array(pairs, np.int64).reshape(-1, 2)


def near_duplicates(
    images: np.ndarray, others: np.ndarray | None = None, *, threshold: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images that look the same, the most alike first, exact copies among them.

    Images are reduced to 8x8 pixels in colour and whitened by their principal components, so that
    what most pictures share (blue above, dark below) counts little; alike is a cosine of at least
    `threshold`. On CIFAR-100, 0.8 finds another scale, crop or tint of a photograph, with few
    strangers among them; much lower finds pictures that only resemble each other.

    `images` is (N, 32, 32, 3) uint8. Returns positions (K, 2) int64, of two images, or of one
    and one of `others` (M, 32, 32, 3) uint8, and the cosines (K,) float32. Takes N x M x 400
    operations: seconds for all training images with all test images.
    """
    from sklearn.decomposition import PCA

    def reduce(pictures: np.ndarray) -> np.ndarray:
        # In whole numbers, one axis after the other: the mean of both, in a third of its time.
        rows = pictures.reshape(-1, 8, 4, 32 * 3).sum(2, dtype=np.uint16)
        sums = rows.reshape(-1, 8 * 8, 4, 3).sum(2, dtype=np.uint16)
        return sums.reshape(-1, 8 * 8 * 3) / 16

    # In double precision, as the least components are divided by next to nothing: else cosines
    # differ by 1e-4 from processor to processor, and with them the order of the pairs.
    def normalize(whitened: np.ndarray) -> np.ndarray:
        unit = whitened / np.linalg.norm(whitened, axis=1, keepdims=True).clip(1e-6)
        return unit.astype(np.float32)

    reduced = reduce(images)
    whitening = PCA(whiten=True).fit(reduced)
    ours = normalize(whitening.transform(reduced))
    theirs = ours if others is None else normalize(whitening.transform(reduce(others)))
    pairs, cosines = [], []
    for start in range(0, len(theirs), 1000):
        stop = start + 1000
        # Without others, each pair is looked at once, from its later image.
        alike = (ours[:stop] if others is None else ours) @ theirs[start:stop].T
        first, second = np.divmod(np.flatnonzero(alike >= threshold), alike.shape[1])
        cosine = alike[first, second]
        if others is None:
            earlier = first < second + start
            first, second, cosine = first[earlier], second[earlier], cosine[earlier]
        pairs.append(np.stack([first, second + start], 1))
        cosines.append(cosine)
    order = np.argsort(-np.concatenate(cosines), kind="stable")
    return np.concatenate(pairs)[order], np.concatenate(cosines)[order]


def _wave(
    random: np.random.Generator, distance: np.ndarray, period: float, jitter: float = 0.1
) -> np.ndarray:
    """Sines in -1..1 along `distance` (n, 32, 32), in any phase and of slightly varied period."""
    frequency = 2 * np.pi / period * random.uniform(1 - jitter, 1 + jitter, (len(distance), 1, 1))
    phase = random.uniform(0, 2 * np.pi, (len(distance), 1, 1))
    return np.sin(distance * frequency.astype(np.float32) + phase.astype(np.float32))


def _grid(random: np.random.Generator, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    return np.sign(_wave(random, x, period) * _wave(random, y, period))


def _dots(random: np.random.Generator, x: np.ndarray, y: np.ndarray, period: float) -> np.ndarray:
    return np.where(_wave(random, x, period) + _wave(random, y, period) > 1, 1, -1)


def _rays(random: np.random.Generator, x: np.ndarray, y: np.ndarray, number: int) -> np.ndarray:
    return _wave(random, np.arctan2(y, x), 2 * np.pi / number, jitter=0)


def _slanted(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, period: float
) -> np.ndarray:
    # To either side, so that a flip makes no other class of it.
    return _wave(random, x + y * random.choice([-1, 1], (len(x), 1, 1)), period * np.sqrt(2))


def _blobs(random: np.random.Generator, x: np.ndarray, size: int) -> np.ndarray:
    values = random.uniform(-1.5, 1.5, (len(x), 32 // size, 32 // size))
    return values.clip(-1, 1).repeat(size, 1).repeat(size, 2)


# The superclasses of the stand-in: how each is drawn in -1..1 at the places x and y (n, 32, 32), in
# pixels from a centre. No pattern is another one's mirror image, left to right or upside down.
_PATTERNS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], np.ndarray]] = {
    "wide_level_stripes": lambda random, x, y: _wave(random, y, 8),
    "narrow_level_stripes": lambda random, x, y: _wave(random, y, 4),
    "wide_upright_stripes": lambda random, x, y: _wave(random, x, 8),
    "narrow_upright_stripes": lambda random, x, y: _wave(random, x, 4),
    "wide_slanted_stripes": lambda random, x, y: _slanted(random, x, y, 8),
    "narrow_slanted_stripes": lambda random, x, y: _slanted(random, x, y, 4),
    "wide_checks": lambda random, x, y: _grid(random, x, y, 10),
    "narrow_checks": lambda random, x, y: _grid(random, x, y, 5),
    "wide_diamonds": lambda random, x, y: _grid(random, x + y, x - y, 14),
    "narrow_diamonds": lambda random, x, y: _grid(random, x + y, x - y, 7),
    "wide_rings": lambda random, x, y: _wave(random, np.hypot(x, y), 8),
    "narrow_rings": lambda random, x, y: _wave(random, np.hypot(x, y), 4),
    "few_rays": lambda random, x, y: _rays(random, x, y, 5),
    "many_rays": lambda random, x, y: _rays(random, x, y, 12),
    "wide_dots": lambda random, x, y: _dots(random, x, y, 9),
    "narrow_dots": lambda random, x, y: _dots(random, x, y, 5),
    "level_zigzags": lambda random, x, y: _wave(random, y + 2 * np.abs(x % 8 - 4), 8),
    "upright_zigzags": lambda random, x, y: _wave(random, x + 2 * np.abs(y % 8 - 4), 8),
    "wide_blobs": lambda random, x, y: _blobs(random, x, 4),
    "narrow_blobs": lambda random, x, y: _blobs(random, x, 2),
}
# The classes of each: a pattern in two opposite colours (red, green, blue, relative to the ground).
_COLOURS = {
    "black_white": (1.0, 1.0, 1.0),
    "red_cyan": (1.0, -0.6, -0.6),
    "green_magenta": (-0.6, 1.0, -0.6),
    "blue_yellow": (-0.6, -0.6, 1.0),
    "orange_azure": (1.0, 0.0, -1.0),
}


def _draw(random: np.random.Generator, pattern: str, colours: str, number: int) -> np.ndarray:
    """Pictures (number, 32, 32, 3) uint8 of one class: a patch of its pattern on plain ground.

    Place, size, tilt, phase, contrast and ground are random, and the two colours are swapped as
    often as not: all classes have the same mean picture, so a linear model finds little.
    """

    def uniform(low: float, high: float, channels: tuple[int, ...] = ()) -> np.ndarray:
        return random.uniform(low, high, (number, 1, 1, *channels)).astype(np.float32)

    places = np.arange(32, dtype=np.float32) - 15.5
    across, down = places - uniform(-8, 8), places[:, None] - uniform(-8, 8)
    # A soft-edged ellipse.
    distance = (across / uniform(9, 20)) ** 2 + (down / uniform(9, 20)) ** 2
    patch = 1 / (1 + np.exp(np.minimum(8 * (distance - 1), 40)))
    tilt = uniform(-0.12, 0.12)
    x = across * np.cos(tilt) + down * np.sin(tilt)
    y = down * np.cos(tilt) - across * np.sin(tilt)
    contrast = uniform(0.2, 0.5) * random.choice(np.array([-1, 1], np.float32), (number, 1, 1))
    shade = _PATTERNS[pattern](random, x, y).astype(np.float32) * patch * contrast
    pictures = uniform(0.25, 0.75, (3,)) + uniform(-0.01, 0.01, (3,)) * across[..., None]
    pictures = pictures + shade[..., None] * np.array(_COLOURS[colours], np.float32)
    pictures += random.standard_normal(pictures.shape, np.float32) * np.float32(0.08)
    return (np.clip(pictures, 0, 1) * 255).astype(np.uint8)


def _draw_synthetic() -> tuple[dict[str, np.ndarray], dict]:
    """The stand-in's arrays, as many and of the same kind as CIFAR-100's, and its names."""
    random = np.random.default_rng(SYNTHETIC_VERSION)
    fine_names = class_names("synthetic")
    superclass_of = np.repeat(np.arange(len(_PATTERNS)), len(_COLOURS))
    pictures = np.stack(
        [_draw(random, pattern, colours, 600) for pattern in _PATTERNS for colours in _COLOURS]
    )
    arrays = {}
    for split, of_class in ("train", pictures[:, :500]), ("test", pictures[:, 500:]):
        number = of_class.shape[1]
        fine_labels, position = np.divmod(random.permutation(NUM_CLASSES * number), number)
        arrays[f"{split}_images"] = of_class[fine_labels, position]
        arrays[f"{split}_fine_labels"] = fine_labels
        arrays[f"{split}_coarse_labels"] = superclass_of[fine_labels]
    names = {
        "fine_names": list(fine_names),
        "coarse_names": list(_PATTERNS),
        "digests": {name: hashlib.sha256(array).hexdigest() for name, array in arrays.items()},
    }
    return arrays, names


def read_image(
    source: Path | str | bytes, *, name: str | None = None, side: int = IMAGE_SHAPE[0]
) -> np.ndarray:
    """Read a picture of any format, size, colour mode and orientation as a CIFAR-sized image.

    The largest square in its middle is scaled to 32 x 32, or `side` x `side`; what is transparent
    becomes white. `source` is a file or its content, which errors then call `name`.
    Returns (side, side, 3) uint8. Raises DataError if the file is not there or is no picture.
    """
    content = isinstance(source, bytes)
    name = name or ("The picture" if content else str(source))
    try:
        with Image.open(io.BytesIO(source) if content else source) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                # 16 bits a pixel, which Pillow would cut off at 255.
                picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGBA")
    except UnidentifiedImageError as error:
        raise DataError(f"{name} cannot be read as a picture: its format is unknown.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as a picture: {error}") from error
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(ImageOps.fit(opaque.convert("RGB"), (side, side), Image.Resampling.LANCZOS))
