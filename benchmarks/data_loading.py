"""How long CIFAR-100 takes to load, beside Keras' own loader.

    CIFAR100_DIR=... python benchmarks/data_loading.py [--repeats 5] [--out FILE]

Each load is timed in a process of its own, imports not included, and again with a sum over every
pixel. The files are in the operating system's memory throughout. Keras gets an archive packed from
the same files, in a folder of its own: it need not download, but unpacks it at every call.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from cifar_lib import ROOT, backend, data, runs

OURS = """
from cifar_lib import data
def load():
    dataset = data.load(download=False)
    return dataset.train.images, dataset.test.images
"""
VERIFY = """
from cifar_lib import data
def load():
    data.verify(data.find())
    return ()
"""
# The archive packed here has another digest than the official one, and is compared with that.
KERAS = """
import os
from keras.src.datasets import cifar100
def get_file(file_hash, **arguments):
    return original(file_hash=os.environ["ARCHIVE"], **arguments)
original, cifar100.get_file = cifar100.get_file, get_file
def load():
    (train, _), (test, _) = cifar100.load_data()
    return train, test
"""
TIME = """
import json, time
start = time.perf_counter()
arrays = load()
loaded = time.perf_counter()
total = sum(int(array.sum()) for array in arrays)
print(json.dumps([loaded - start, time.perf_counter() - start, total]))
"""


def measure(code: str, environments: list[dict[str, str]]) -> dict:
    """Seconds of `code`'s load, alone and with the sum, once with each environment."""
    common = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    runs = []
    for environment in environments:
        arguments = [sys.executable, "-c", code + TIME]
        done = subprocess.run(arguments, env=common | environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    load, load_and_sum, totals = zip(*runs, strict=True)
    return {
        "load": statistics.median(load),
        "load_and_sum": statistics.median(load_and_sum),
        "lowest": min(load_and_sum),
        "highest": max(load_and_sum),
        "pixel_sum": totals[0],
    }


def pack_for_keras(home: Path) -> str:
    """Put the archive where Keras looks for its download; its SHA-256."""
    archive = home / "datasets" / "cifar-100-python-target_archive"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        for file in data.SHA256:
            tar.add(data.find() / file, f"cifar-100-python/{file}")
    with archive.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind (default 5)")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args()
    if data.find() is None:
        parser.error("CIFAR-100 is not on this machine: set CIFAR100_DIR to its folder")

    with tempfile.TemporaryDirectory() as folder:
        caches = [{"CIFAR_LIB_CACHE": f"{folder}/cache{n}"} for n in range(arguments.repeats)]
        keras = {"KERAS_HOME": f"{folder}/keras", "ARCHIVE": pack_for_keras(Path(folder, "keras"))}
        seconds = {
            "first load, builds the cache": measure(OURS, caches),
            "later loads": measure(OURS, caches[:1] * arguments.repeats),
            "digests alone": measure(VERIFY, caches),
            "keras.datasets.cifar100": measure(KERAS, [keras] * arguments.repeats),
        }
    if len({row["pixel_sum"] for row in seconds.values() if row["pixel_sum"]}) > 1:
        raise SystemExit(f"The loaders disagree on the pixels: {seconds}")

    print(f"{'median seconds':<30}{'load':>8}{'with sum':>10}{'lowest':>9}{'highest':>9}")
    for name, row in seconds.items():
        print(
            f"{name:<30}{row['load']:>8.3f}{row['load_and_sum']:>10.3f}"
            f"{row['lowest']:>9.3f}{row['highest']:>9.3f}"
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        environment = backend.describe("float32")
        content = {"repeats": arguments.repeats, "environment": environment, "seconds": seconds}
        runs.write_json(arguments.out, content)


if __name__ == "__main__":
    main()
