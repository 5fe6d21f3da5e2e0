"""Training images per second of the seed's recipe, and what its loop costs beside plain Keras.

    python benchmarks/throughput.py                          about half an hour on 2 cores
    python benchmarks/throughput.py --seconds 5 --rounds 1   a quick look

Every round measures each precision and batch size once, so that a machine that slows down slows all
of them. "recipe" is the whole of it: batches shuffled, augmented by the ImageDataGenerator and
scaled. "bare" is `model.fit` of the same network on random float32 arrays of the same shape. Times
are taken inside callbacks, after the first steps: `fit` on arrays can return seconds late. How late
it returned is measured, too.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from cifar_lib import augmentation, backend, data, models, recipes, runs, training
from cifar_lib.backend import keras

WARM_UP_STEPS = 10
VARIANTS = [
    ("recipe", "float32", 32),
    ("bare", "float32", 32),
    ("recipe", "float32", 128),
    ("recipe", "bfloat16", 32),
    ("bare", "bfloat16", 32),
    ("recipe", "bfloat16", 128),
]


class Stopwatch(keras.callbacks.Callback):
    """Measures steps for so many seconds after the first ones, then stops the training."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.steps = seconds, -WARM_UP_STEPS

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.steps += 1
        now = time.perf_counter()
        if self.steps == 0:
            self.began = now
        if self.steps > 0 and now - self.began >= self.seconds:
            self.rate = self.steps / (now - self.began)
            self.model.stop_training = True

    def on_train_end(self, logs: dict | None = None) -> None:
        self.ended = time.perf_counter()


def measure(
    model: keras.Model, kind: str, batch_size: int, split: data.Split, seconds: float
) -> tuple[float, float]:
    """Images per second, and the seconds from the last callback to the return of `fit`."""
    stopwatch = Stopwatch(seconds)
    settings = {"epochs": 1000, "verbose": 0, "callbacks": [stopwatch]}
    if kind == "recipe":
        policy = augmentation.make("seed")
        batches = augmentation.Batches(split, batch_size, policy, shuffle=True)
        model.fit(batches, shuffle=False, **settings)
    else:
        random = np.random.default_rng(0)
        images = random.random((10_000, *data.IMAGE_SHAPE), dtype=np.float32)
        labels = random.integers(data.NUM_CLASSES, size=len(images))
        model.fit(images, labels, batch_size=batch_size, **settings)
    return stopwatch.rate * batch_size, time.perf_counter() - stopwatch.ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    if options.seconds <= 0 or options.rounds < 1:
        parser.error("--seconds must be above 0 and --rounds at least 1")

    try:
        dataset = data.load(download=False)
    except data.DataError:
        dataset = data.load("synthetic")
    recipe = recipes.get("seed")
    networks = {}
    for precision in ("float32", "bfloat16"):
        networks[precision] = models.build("seed", precision=precision)
        training.compile_model(networks[precision], recipe, steps=1)

    rates = {variant: [] for variant in VARIANTS}
    late = {variant: [] for variant in VARIANTS}
    for round_number in range(options.rounds):
        # Every other round backwards, so that neither of a pair is always the first.
        for variant in VARIANTS[:: 1 if round_number % 2 == 0 else -1]:
            kind, precision, batch_size = variant
            network = networks[precision]
            rate, delay = measure(network, kind, batch_size, dataset.train, options.seconds)
            rates[variant].append(round(rate, 1))
            late[variant].append(round(delay, 2))
            print(f"{round_number + 1}  {kind:<7}{precision:<9} batch {batch_size:<4}{rate:8.1f}")

    rows = [
        {
            "what": kind,
            "precision": precision,
            "batch_size": batch_size,
            "images_per_second": statistics.median(measured),
            "lowest": min(measured),
            "highest": max(measured),
            "rounds": measured,
            "seconds_fit_returned_late": late[kind, precision, batch_size],
        }
        for (kind, precision, batch_size), measured in rates.items()
    ]
    overheads = {}
    for precision in networks:
        pairs = zip(rates["bare", precision, 32], rates["recipe", precision, 32], strict=True)
        ratios = [bare / recipe - 1 for bare, recipe in pairs]
        overheads[precision] = {
            "median": round(statistics.median(ratios), 4),
            "pairs": [round(ratio, 4) for ratio in ratios],
        }
        print(f"{precision}: {statistics.median(ratios):+.1%} more time than bare fit")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(
            options.out,
            {
                "seconds": options.seconds,
                "data": dataset.title,
                "environment": backend.describe("float32 and bfloat16"),
                "throughput": rows,
                "slower_than_bare_fit": overheads,
            },
        )


if __name__ == "__main__":
    main()
