"""The data: found, verified, cached, split; and the stand-in."""

import hashlib
import http.server
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cifar_lib import ROOT, data

# The slide deck's words, in its order of superclasses and classes.
DECK = """
aquatic mammals: beaver, dolphin, otter, seal, whale
fish: aquarium fish, flatfish, ray, shark, trout
flowers: orchids, poppies, roses, sunflowers, tulips
food containers: bottles, bowls, cans, cups, plates
fruit and vegetables: apples, mushrooms, oranges, pears, sweet peppers
household electrical devices: clock, computer keyboard, lamp, telephone, television
household furniture: bed, chair, couch, table, wardrobe
insects: bee, beetle, butterfly, caterpillar, cockroach
large carnivores: bear, leopard, lion, tiger, wolf
large man-made outdoor things: bridge, castle, house, road, skyscraper
large natural outdoor scenes: cloud, forest, mountain, plain, sea
large omnivores and herbivores: camel, cattle, chimpanzee, elephant, kangaroo
medium-sized mammals: fox, porcupine, possum, raccoon, skunk
non-insect invertebrates: crab, lobster, snail, spider, worm
people: baby, boy, girl, man, woman
reptiles: crocodile, dinosaur, lizard, snake, turtle
small mammals: hamster, mouse, rabbit, shrew, squirrel
trees: maple, oak, palm, pine, willow
vehicles 1: bicycle, bus, motorcycle, pickup truck, train
vehicles 2: lawn-mower, rocket, streetcar, tank, tractor
"""
# The names in the official `meta` file, in the same order.
OFFICIAL = """
aquatic_mammals: beaver, dolphin, otter, seal, whale
fish: aquarium_fish, flatfish, ray, shark, trout
flowers: orchid, poppy, rose, sunflower, tulip
food_containers: bottle, bowl, can, cup, plate
fruit_and_vegetables: apple, mushroom, orange, pear, sweet_pepper
household_electrical_devices: clock, keyboard, lamp, telephone, television
household_furniture: bed, chair, couch, table, wardrobe
insects: bee, beetle, butterfly, caterpillar, cockroach
large_carnivores: bear, leopard, lion, tiger, wolf
large_man-made_outdoor_things: bridge, castle, house, road, skyscraper
large_natural_outdoor_scenes: cloud, forest, mountain, plain, sea
large_omnivores_and_herbivores: camel, cattle, chimpanzee, elephant, kangaroo
medium_mammals: fox, porcupine, possum, raccoon, skunk
non-insect_invertebrates: crab, lobster, snail, spider, worm
people: baby, boy, girl, man, woman
reptiles: crocodile, dinosaur, lizard, snake, turtle
small_mammals: hamster, mouse, rabbit, shrew, squirrel
trees: maple_tree, oak_tree, palm_tree, pine_tree, willow_tree
vehicles_1: bicycle, bus, motorcycle, pickup_truck, train
vehicles_2: lawn_mower, rocket, streetcar, tank, tractor
"""


def names(text: str) -> list[str]:
    return re.split(r"[:\n] ?|, ", text.strip())


def official_pickle(record: dict) -> bytes:
    """A pickle that asks for what CIFAR-100's, written by Python 2 and its numpy, ask for."""
    return pickle.dumps(record, protocol=3).replace(b"numpy._core", b"numpy.core")


def write_files(folder: Path, per_class: int = 3) -> dict[str, str]:
    """Three files laid out as the official ones, small, and their digests."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(7)
    contents = {
        "meta": {
            b"fine_label_names": [b"class_%d" % fine for fine in range(100)],
            b"coarse_label_names": [b"superclass_%d" % coarse for coarse in range(20)],
        }
    }
    for file, number in ("train", per_class), ("test", 1):
        fine = random.permutation(np.repeat(np.arange(100), number)).tolist()
        contents[file] = {
            b"data": random.integers(0, 256, (100 * number, 3072), np.uint8),
            b"fine_labels": fine,
            b"coarse_labels": [label // 5 for label in fine],
        }
    for file, record in contents.items():
        (folder / file).write_bytes(official_pickle(record))
    return {
        file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
        for file in ("train", "test", "meta")
    }


@pytest.fixture
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no data and no cache, and no way to the internet."""
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("CIFAR_LIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "ROOT", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(data, "ARCHIVE_URL", f"http://127.0.0.1:{port}/cifar-100-python.tar.gz")
    return tmp_path


@pytest.fixture
def small(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small data set, taken for CIFAR-100."""
    folder = empty_machine / "official"
    monkeypatch.setattr(data, "SHA256", write_files(folder))
    monkeypatch.setenv("CIFAR100_DIR", str(folder))
    return folder


def total(dataset: data.Dataset) -> int:
    splits = (dataset.train, dataset.test)
    return sum(int(split.images.sum()) + int(split.fine_labels.sum()) for split in splits)


# --- the official data ---


def test_cifar100_is_what_its_author_describes(cifar100: data.Dataset) -> None:
    assert cifar100.name == "cifar100" and not cifar100.synthetic
    assert cifar100.title == "CIFAR-100"
    for split, number in (cifar100.train, 500), (cifar100.test, 100):
        assert split.images.shape == (100 * number, 32, 32, 3) and split.images.dtype == np.uint8
        assert split.fine_labels.dtype == split.coarse_labels.dtype == np.int64
        assert np.bincount(split.fine_labels).tolist() == [number] * 100
        assert np.array_equal(cifar100.superclass_of[split.fine_labels], split.coarse_labels)
    assert np.bincount(cifar100.superclass_of).tolist() == [5] * 20
    # The mean and deviation of each channel that much published code holds.
    published = (0.5071, 0.2673), (0.4865, 0.2564), (0.4409, 0.2762)
    for channel, (mean, deviation) in enumerate(published):
        counts = np.bincount(cifar100.train.images[..., channel].ravel(), minlength=256)
        values = np.arange(256) / 255
        assert np.average(values, weights=counts) == pytest.approx(mean, abs=1e-4)
        variance = np.average((values - mean) ** 2, weights=counts)
        assert variance**0.5 == pytest.approx(deviation, abs=1e-4)


def test_pixels_and_labels_are_those_of_the_file(cifar100: data.Dataset) -> None:
    with (data.find() / "test").open("rb") as stream:
        record = pickle.load(stream, encoding="latin1")
    assert cifar100.test.fine_labels.tolist() == record["fine_labels"]
    assert cifar100.test.coarse_labels.tolist() == record["coarse_labels"]
    # "The first 1024 entries contain the red channel values, ... stored in row-major order."
    rows = record["data"]
    for image, row, column, channel in (0, 0, 0, 0), (1, 2, 3, 1), (9999, 31, 30, 2):
        value = rows[image, 1024 * channel + 32 * row + column]
        assert cifar100.test.images[image, row, column, channel] == value


def test_official_names(cifar100: data.Dataset) -> None:
    assert sorted((*cifar100.fine_names, *cifar100.coarse_names)) == sorted(names(OFFICIAL))
    assert data.class_names("cifar100") == cifar100.fine_names
    for line in OFFICIAL.strip().splitlines():
        coarse, *fine = names(line)
        ids = [cifar100.fine_names.index(name) for name in fine]
        assert {cifar100.coarse_names[c] for c in cifar100.superclass_of[ids]} == {coarse}


def test_display_names_are_the_decks() -> None:
    assert len(names(DECK)) == 120
    assert [data.display_name(name) for name in names(OFFICIAL)] == names(DECK)


def test_exact_duplicates_of_cifar100(cifar100: data.Dataset) -> None:
    train, test = cifar100.train.images, cifar100.test.images
    inside_train = data.exact_duplicates(train)
    across = data.exact_duplicates(train, test)
    assert (len(inside_train), len(data.exact_duplicates(test)), len(across)) == (14, 2, 10)
    assert (train[inside_train[:, 0]] == train[inside_train[:, 1]]).all()
    assert (train[across[:, 0]] == test[across[:, 1]]).all()


def test_near_duplicates_of_cifar100(cifar100: data.Dataset) -> None:
    test = cifar100.test
    pairs, cosines = data.near_duplicates(test.images)
    assert (pairs[:, 0] < pairs[:, 1]).all() and (np.diff(cosines) <= 0).all()
    assert sorted(pairs[:2].tolist()) == sorted(data.exact_duplicates(test.images).tolist())
    # Nothing but the pictures was compared: that the classes agree shows that the pairs are real.
    same = test.fine_labels[pairs[:, 0]] == test.fine_labels[pairs[:, 1]]
    assert len(pairs) >= 20 and same.mean() > 0.8
    # As exact as they are written, so that every processor puts the pairs in the same order.
    means = test.images.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(test.images), -1)
    whitened = np.linalg.svd(means - means.mean(axis=0), full_matrices=False)[0]
    whitened /= np.linalg.norm(whitened, axis=1, keepdims=True)
    expected = np.sum(whitened[pairs[:, 0]] * whitened[pairs[:, 1]], axis=1)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_later_loads_take_under_half_a_second(cifar100: data.Dataset) -> None:
    seconds = []
    for _ in range(3):
        # The processor's time: the wall clock also counts what else the machine has to do.
        start = time.process_time()
        total(data.load("cifar100", download=False))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5


def test_default_split_is_the_same_everywhere(cifar100: data.Dataset) -> None:
    indices = data.make_splits(cifar100).validation.indices
    assert indices.dtype == np.int64
    assert (
        hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest().startswith("2e60c627a5a0aae7")
    )


# --- found, verified, never run ---


def test_places_in_order(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.find() is None
    torchvision = empty_machine / "data" / "cifar-100-python"
    keras = empty_machine / "keras" / "datasets" / "cifar-100-python-target" / "cifar-100-python"
    for folder in torchvision, keras, empty_machine / "mine":
        write_files(folder, 1)
        monkeypatch.setenv("CIFAR100_DIR", str(folder) if folder.name == "mine" else "")
        assert data.find() == folder
    (empty_machine / "mine" / "test").unlink()
    with pytest.raises(data.DataError, match=r"CIFAR100_DIR is '.*mine'.* no readable test\."):
        data.load()  # and not from the other two


def test_without_data_the_places_and_the_remedy_are_named(empty_machine: Path) -> None:
    with pytest.raises(data.DataError, match=r"keras.*data/cifar-100-python.*CIFAR100_DIR"):
        data.load(download=False)
    with pytest.raises(data.DataError, match=r"cannot be reached: .*refused.*CIFAR100_DIR"):
        data.load()
    with pytest.raises(data.DataError, match=r"'cifar10'.*\"cifar100\" or \"synthetic\""):
        data.load("cifar10")


class Bomb:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def test_wrong_file_is_refused_unread(small: Path) -> None:
    expected = data.SHA256["test"]
    (small / "test").write_bytes(pickle.dumps(Bomb()))
    found = hashlib.sha256((small / "test").read_bytes()).hexdigest()
    for refuse in data.load, lambda: data.verify(small):
        with pytest.raises(data.DataError) as refusal:
            refuse()
        for part in str(small / "test"), expected, found:
            assert part in str(refusal.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_files_run_no_code(small: Path, monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    (small / "meta").write_bytes(pickle.dumps(Bomb(), protocol))
    digest = hashlib.sha256((small / "meta").read_bytes()).hexdigest()
    monkeypatch.setitem(data.SHA256, "meta", digest)  # as if someone had broken SHA-256
    with pytest.raises(data.DataError, match=r"asks for .*mkdir"):
        data.load()
    assert not Path("exploded").exists()


def test_file_changed_after_the_cache_was_built_is_refused(small: Path) -> None:
    assert data.verify(small) == data.SHA256
    data.load()
    content = bytearray((small / "train").read_bytes())
    content[-100] ^= 1
    (small / "train").write_bytes(content)
    with pytest.raises(data.DataError, match=data.SHA256["train"]):
        data.load()


# Files of the expected digests, for a process of its own: it waits for a line on stdin, loads, and
# prints the sum of all pixels and labels.
LOAD = """
import json, sys
from cifar_lib import data
data.SHA256, data.ARCHIVE_URL, data.ARCHIVE_SHA256 = json.loads(sys.argv[1])
sys.stdin.readline()
dataset = data.load()
splits = (dataset.train, dataset.test)
print(sum(int(split.images.sum()) + int(split.fine_labels.sum()) for split in splits))
"""


def start_load(archive: tuple[str, str] = ("", "")) -> subprocess.Popen:
    arguments = [sys.executable, "-c", LOAD, json.dumps([data.SHA256, *archive])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": "numpy"}
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=environment, stdin=pipe, stdout=pipe, text=True)


class Server(http.server.SimpleHTTPRequestHandler):
    gets = 0

    def do_GET(self) -> None:
        Server.gets += 1
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(empty_machine: Path) -> Iterator[str]:
    """The address of a web server with the files of the current folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_through_keras(small: Path, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = total(data.load())
    archive = small.parent / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(small, "cifar-100-python")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.delenv("CIFAR100_DIR")
    for cache in "first", "second":
        monkeypatch.setenv("CIFAR_LIB_CACHE", cache)
        output, _ = start_load((f"{site}/{archive.name}", digest)).communicate("\n", timeout=120)
        assert int(output.split()[-1]) == expected
        assert ("━" in output or "=" in output) == (cache == "first"), output  # the progress bar
    assert Server.gets == 1  # the second load found the first one's files


# --- the cache ---


def test_cache_serves_without_the_files_and_read_only(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.load()
    for path in small.iterdir():
        path.unlink()
    small.rmdir()
    monkeypatch.delenv("CIFAR100_DIR")
    later = data.load(download=False)
    assert np.array_equal(first.train.images, later.train.images)
    assert first.fine_names == later.fine_names and first.digests == later.digests == data.SHA256
    for dataset in first, later:
        with pytest.raises(ValueError, match="read-only"):
            dataset.train.images[0] = 0


def damage_by_truncation(cache: Path) -> None:
    path = cache / "train_images.npy"
    os.truncate(path, path.stat().st_size - 1)


def damage_by_a_flipped_bit(cache: Path) -> None:
    content = bytearray((cache / "test_images.npy").read_bytes())
    content[-1] ^= 1
    (cache / "test_images.npy").write_bytes(content)


def damage_by_emptying(cache: Path) -> None:
    (cache / "test_fine_labels.npy").write_bytes(b"")


def damage_by_deletion(cache: Path) -> None:
    (cache / "train_coarse_labels.npy").unlink()


def damage_to_the_contents(cache: Path) -> None:
    (cache / "contents.json").write_text('{"stamps": {')


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation,
        damage_by_a_flipped_bit,
        damage_by_emptying,
        damage_by_deletion,
        damage_to_the_contents,
    ],
)
def test_damaged_cache_is_built_again(
    small: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    expected = total(data.load())
    (cache,) = data.cache_folder().glob("cifar100-*")
    damage(cache)
    assert total(data.load()) == expected
    monkeypatch.delenv("CIFAR100_DIR")
    assert total(data.load(download=False)) == expected


def test_processes_that_build_at_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHA256", write_files(small, per_class=100))
    cache = data.cache_folder()
    for damaged in False, True:  # with no cache, and with a broken one in the way
        if damaged:
            damage_by_truncation(next(cache.glob("cifar100-*")))
        processes = [start_load() for _ in range(4)]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        sums = {process.communicate(timeout=60)[0] for process in processes}
        assert len(sums) == 1 and sums == {f"{total(data.load())}\n"}
        assert not list(cache.glob("building-*"))


def test_process_killed_while_it_builds(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHA256", write_files(small, per_class=100))
    process = start_load()
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None and not list(data.cache_folder().glob("building-*/*.npy")):
        pass
    process.kill()
    process.communicate()
    expected = total(data.load())
    (left_over,) = data.cache_folder().glob("building-*")
    os.utime(left_over, (0, 0))  # the next build, much later, clears it away
    damage_by_deletion(next(data.cache_folder().glob("cifar100-*")))
    assert total(data.load()) == expected
    assert not left_over.exists()


def test_read_only_data_and_no_cache(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = total(data.load())
    before = {path.name: path.stat().st_mtime_ns for path in (small, *small.iterdir())}
    for path in (*small.iterdir(), small):
        path.chmod(0o555 if path.is_dir() else 0o444)
    # A file where a folder should be cannot be written to, not even by root.
    Path("occupied").touch()
    monkeypatch.setenv("CIFAR_LIB_CACHE", "occupied/cache")
    with pytest.warns(UserWarning, match="Set CIFAR_LIB_CACHE to a folder that can be written"):
        assert total(data.load()) == expected
    assert before == {path.name: path.stat().st_mtime_ns for path in (small, *small.iterdir())}


def test_import_is_light() -> None:
    heavy = "import sys, cifar_lib.data; print({'tensorflow', 'keras', 'sklearn'} & {*sys.modules})"
    arguments = [sys.executable, "-c", heavy]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# --- splits ---

TRAIN, TEST = 1200, 300  # images of the data set that is split


def labelled(name: str, number: int) -> data.Split:
    fine = np.random.default_rng(3).permutation(np.arange(number) % 100)
    images = np.broadcast_to(
        np.arange(number, dtype=np.uint8)[:, None, None, None], (number, 1, 1, 1)
    )
    return data.Split(name, images, fine, fine // 5, np.arange(number))


SMALL = data.Dataset(
    "synthetic",
    labelled("train", TRAIN),
    labelled("test", TEST),
    tuple(names(OFFICIAL)[i] for i in range(120) if i % 6),
    tuple(names(OFFICIAL)[::6]),
    np.arange(100) // 5,
    {},
)
seeds = st.integers(0, 2**32 - 1)


def check_split(split: data.Split, source: data.Split, size: int, ids: set[int]) -> None:
    assert len(split) == len(split.images) == len(split.fine_labels) == size
    assert (np.diff(split.indices) > 0).all()
    for field in "images", "fine_labels", "coarse_labels":
        assert np.array_equal(getattr(split, field), getattr(source, field)[split.indices])
    counts = np.bincount(split.fine_labels, minlength=100)[sorted(ids)]
    assert counts.sum() == size and counts.max() - counts.min() <= 1


@settings(deadline=None)
@given(
    st.sampled_from(["holdout", "final", "deck"]),
    st.one_of(st.none(), st.sets(st.sampled_from(SMALL.fine_names), min_size=1)),
    st.data(),
    seeds,
)
def test_splits_are_stratified_and_disjoint(
    protocol: str, classes: set[str] | None, draw: st.DataObject, seed: int
) -> None:
    number = len(classes or SMALL.fine_names)
    ids = {SMALL.fine_names.index(name) for name in classes or SMALL.fine_names}
    left = number * TRAIN // 100
    fewest = 1 if protocol == "deck" else 0
    sizes = {"test_size": draw.draw(st.integers(fewest, number * TEST // 100))}
    if protocol == "holdout":
        sizes["validation_size"] = draw.draw(st.integers(1, left - 1))
        left -= sizes["validation_size"]
    sizes["train_size"] = draw.draw(st.integers(1, left))
    order = None if classes is None else sorted(classes)
    splits = data.make_splits(SMALL, protocol, classes=order, split_seed=seed, **sizes)
    check_split(splits.train, SMALL.train, sizes["train_size"], ids)
    check_split(splits.test, SMALL.test, sizes["test_size"], ids)
    if protocol == "holdout":
        check_split(splits.validation, SMALL.train, sizes["validation_size"], ids)
        assert not set(splits.validation.indices) & set(splits.train.indices)
    elif protocol == "final":
        assert splits.validation is None
    else:
        assert splits.validation.name == "validation"
        assert np.array_equal(splits.validation.indices, splits.test.indices)


@settings(deadline=None)
@given(st.data(), seeds)
def test_splits_are_nested_and_seeded(draw: st.DataObject, seed: int) -> None:
    small, large = sorted(draw.draw(st.tuples(st.integers(1, 600), st.integers(1, 600))))

    def split(name: str, **sizes: int) -> set[int]:
        splits = data.make_splits(SMALL, **({"validation_size": 600} | sizes))
        return set(getattr(splits, name).indices.tolist())

    for name in "train", "validation":
        size = f"{name}_size"
        assert split(name, **{size: small}, split_seed=seed) <= split(
            name, **{size: large}, split_seed=seed
        )
    assert split("train", split_seed=seed) != split("train", split_seed=seed + 1)
    assert split("test", test_size=99, split_seed=seed) == split(
        "test", test_size=99, split_seed=seed
    )


def test_whole_splits_copy_no_images() -> None:
    splits = data.make_splits(SMALL, "deck")
    assert np.shares_memory(splits.train.images, SMALL.train.images)
    assert np.shares_memory(splits.validation.images, SMALL.test.images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "holduot"}, "Unknown protocol 'holduot': did you mean 'holdout'?"),
        ({"classes": ["bee", "crocodil"]}, "Unknown class 'crocodil': did you mean 'crocodile'?"),
        ({"classes": []}, "classes is empty"),
        ({"validation_size": TRAIN}, f"validation_size is {TRAIN}.* from 1 to {TRAIN - 1}"),
        ({"validation_size": 0}, "validation_size is 0"),
        ({"validation_size": 200, "train_size": 1001}, "train_size is 1001.* from 1 to 1000"),
        ({"protocol": "final", "train_size": -1}, "train_size is -1"),
        ({"protocol": "deck", "test_size": 0}, f"test_size is 0.* from 1 to {TEST}"),
        ({"protocol": "final", "test_size": -1}, f"test_size is -1.* from 0 to {TEST}"),
        ({"protocol": "final", "test_size": TEST + 1}, f"test_size is {TEST + 1}.* to {TEST}"),
        ({"classes": ["bee"], "validation_size": 99}, "validation_size is 99, but 12 images"),
    ],
)
def test_impossible_splits_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(data.DataError, match=message.replace("?", r"\?")):
        data.make_splits(SMALL, **arguments)


# --- the stand-in ---


def test_stand_in_has_the_shape_of_cifar100(synthetic: data.Dataset) -> None:
    assert synthetic.synthetic and synthetic.title == "synthetic stand-in, not CIFAR-100"
    for split, number in (synthetic.train, 500), (synthetic.test, 100):
        assert split.images.shape == (100 * number, 32, 32, 3) and split.images.dtype == np.uint8
        assert split.fine_labels.dtype == split.coarse_labels.dtype == np.int64
        assert np.bincount(split.fine_labels).tolist() == [number] * 100
        assert np.array_equal(synthetic.superclass_of[split.fine_labels], split.coarse_labels)
        assert len(data.exact_duplicates(split.images)) == 0
    assert np.bincount(synthetic.superclass_of).tolist() == [5] * 20
    assert data.class_names("synthetic") == synthetic.fine_names
    ours = {*synthetic.fine_names, *synthetic.coarse_names}
    assert len(ours) == 120 and not ours & set(names(OFFICIAL))
    assert len(data.make_splits(synthetic).train) == 45_000
    assert data.make_splits(synthetic, test_size=0).test.images.shape == (0, 32, 32, 3)


def test_stand_in_is_deterministic(
    synthetic: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_LIB_CACHE", str(tmp_path))
    assert data.load("synthetic").digests == synthetic.digests


def ridge_accuracy(
    synthetic: data.Dataset, features: Callable[[np.ndarray], np.ndarray], train_size: int
) -> float:
    """Test accuracy of ridge regression on the classes, with the better of two penalties."""
    train, test = synthetic.train, synthetic.test
    x, x_test = features(train.images[:train_size]), features(test.images)
    mean = x.mean(0)
    x, x_test = x - mean, x_test - mean
    gram = x.T @ x
    moments = x.T @ (np.eye(100, dtype=np.float32)[train.fine_labels[:train_size]] - 0.01)
    accuracies = []
    for penalty in 1, 10:
        ridge = penalty * np.trace(gram) / len(gram) * np.eye(len(gram), dtype=np.float32)
        scores = x_test @ np.linalg.solve(gram + ridge, moments)
        accuracies.append(np.mean(scores.argmax(1) == test.fine_labels))
    return max(accuracies)


def test_stand_in_is_not_trivial_for_a_linear_model(synthetic: data.Dataset) -> None:
    def pixels(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32) / 255

    # 0.20; with all 50,000 images 0.21.
    assert 0.1 <= ridge_accuracy(synthetic, pixels, 20_000) <= 0.25


def test_stand_in_can_be_learnt_from_texture_alone(synthetic: data.Dataset) -> None:
    def log_spectrum(images: np.ndarray) -> np.ndarray:
        """What a texture keeps when it is moved, mirrored or has its colours swapped."""
        red, green, blue = images.astype(np.float32).transpose(3, 0, 1, 2) / 255
        axes = np.stack([red + green + blue, red - green, green - blue, blue - red], 1)
        spectrum = np.abs(np.fft.rfft2(axes - axes.mean((2, 3), keepdims=True)))
        mirrored = spectrum[:, :, -np.arange(17)]
        return np.log(spectrum[:, :, :17] + mirrored + 0.5).reshape(len(images), -1)

    assert ridge_accuracy(synthetic, log_spectrum, 5_000) >= 0.6


def test_a_picture_may_be_read_from_its_content(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(40, 50, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    np.testing.assert_array_equal(data.read_image(path.read_bytes()), data.read_image(path))
    assert data.read_image(path, side=64).shape == (64, 64, 3)
    for content in (b"no picture", path.read_bytes()[:100], b""):
        with pytest.raises(data.DataError, match=r"^cat\.jpg cannot be read as a picture: \w"):
            data.read_image(content, name="cat.jpg")


def test_a_picture_of_16_bits_has_its_shades(tmp_path):
    shades = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    path = tmp_path / "deep.png"
    Image.fromarray(shades).save(path)
    expected = (shades / 65535 * 255)[..., None].repeat(3, axis=-1)
    np.testing.assert_allclose(data.read_image(path), expected, atol=1)
