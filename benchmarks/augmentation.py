"""Images per second of the augmentation policies, alone, in batches of 128 on one thread.

python benchmarks/augmentation.py
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from cifar_lib import augmentation, backend, data, runs
from cifar_lib.recipes import AUGMENTATIONS

BATCH_SIZE, BATCHES = 128, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()

    images = np.random.default_rng(0).integers(
        256, size=(BATCH_SIZE * BATCHES, *data.IMAGE_SHAPE), dtype=np.uint8
    )
    indices = np.arange(len(images))
    policies = {name: augmentation.make(name) for name in AUGMENTATIONS}
    rates = {name: [] for name in policies}
    for epoch in range(options.rounds + 1):
        for name, policy in policies.items():
            began = time.perf_counter()
            for start in range(0, len(images), BATCH_SIZE):
                rows = slice(start, start + BATCH_SIZE)
                policy(images[rows], 0, epoch, indices[rows])
            rate = len(images) / (time.perf_counter() - began)
            if epoch:  # the first round warms up
                rates[name].append(round(rate))
    rows = [
        {
            "augmentation": name,
            "images_per_second": statistics.median(measured),
            "lowest": min(measured),
            "highest": max(measured),
        }
        for name, measured in rates.items()
    ]
    for row in rows:
        print(f"{row['augmentation']:<14}{row['images_per_second']:>10,} images/s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"batch_size": BATCH_SIZE, "environment": backend.describe("float32")}
        runs.write_json(options.out, content | {"throughput": rows})


if __name__ == "__main__":
    main()
