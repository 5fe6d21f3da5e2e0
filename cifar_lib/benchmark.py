"""How fast this machine trains the recipes, on each backend that is installed.

Keras has one backend a process, so each computes in a process of its own. They take turns, every
other round backwards, so that a machine that slows down slows all of them. The images are random: a
step's time does not depend on what they show, and no data set is needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from cifar_lib import data, figures, recipes, runs
from cifar_lib.recipes import TRAIN_IMAGES, Recipe, RecipeError

BACKENDS = ("tensorflow", "jax", "torch")
WARM_UP_STEPS = 2

# The choices on which the time of a step depends, beside the size of the images.
CHOICES = (
    *("model", "activation", "whitening", "augmentation"),
    *("optimizer", "filter_learning_rate", "weight_decay"),
    *("label_smoothing", "mixing", "weight_averaging", "batch_size", "precision"),
)

#: Seconds of a step: those in which its batch was made, and those in which the network trained.
Step = tuple[float, float]


class Processes(contextlib.ExitStack):
    """A process for each backend, which ends with the `with` block.

    Attributes:
        failures: why a backend is not measured, by its name.
    """

    def __init__(self, backends: Iterable[str]) -> None:
        super().__init__()
        self.failures = {
            backend: f"not installed; pip install -e '.[{backend}]' installs it"
            for backend in backends
            if importlib.util.find_spec(backend) is None
        }
        # A forked process would have this one's threads and backend.
        context = multiprocessing.get_context("spawn")
        self.processes = {
            backend: self.enter_context(ProcessPoolExecutor(1, context, _choose, (backend,)))
            for backend in backends
            if backend not in self.failures
        }

    def ask(self, backend: str, task: Callable, *arguments: object) -> Any:
        """What `task` gives in the backend's process; None, from then on, if it fails."""
        if backend in self.failures:
            return None
        try:
            return self.processes[backend].submit(task, *arguments).result()
        except Exception as error:
            self.failures[backend] = f"{type(error).__name__}: {error}"
            print(f"{backend}: {self.failures[backend]}", flush=True)
            return None


def _choose(backend: str) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["KERAS_BACKEND"] = backend
    # That each of many networks has a step of its own is no mistake to warn of.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def describe() -> dict:
    """What `backend.describe` gives, with the precision that "auto" is. For a backend's process."""
    from cifar_lib import backend

    return backend.describe(backend.resolve_precision("auto"))


def measure(step: Recipe, seconds: float) -> list[Step]:
    """Train for so many seconds, after `WARM_UP_STEPS` steps. For a backend's process.

    A batch is made and then trained on. In a run, two threads make batches beside the training, so
    its time lies between that of the training and that of both; where all cores have work, at both.

    Args:
        step: the recipe; the images are of its first epoch's size.
        seconds: how long to measure; at least one step is measured.
    """
    batches, model = network(step)
    steps: list[Step] = []
    while len(steps) <= WARM_UP_STEPS or sum(map(sum, steps[WARM_UP_STEPS:])) < seconds:
        began = time.perf_counter()
        # Whole batches alone: another shape is another compilation.
        batch = batches[len(steps) % (TRAIN_IMAGES // step.batch_size)]
        made = time.perf_counter()
        model.train_on_batch(*batch)
        steps.append((made - began, time.perf_counter() - made))
    return steps


@functools.cache
def network(step: Recipe) -> tuple:
    """A recipe's batches, of random images, and its network, ready for them.

    As `training.untrained` gives them, with images of the first epoch's size; made once a process.
    """
    from cifar_lib import training

    return training.untrained(step, _random_images(), step.image_size(0))


@functools.cache
def _random_images() -> data.Split:
    import numpy as np

    random = np.random.default_rng(0)
    images = random.integers(256, size=(TRAIN_IMAGES, *data.IMAGE_SHAPE), dtype=np.uint8)
    indices = np.arange(TRAIN_IMAGES)
    labels = random.integers(data.NUM_CLASSES, size=TRAIN_IMAGES)
    return data.Split("train", images, labels, labels // 5, indices)


def steps_of(recipe: Recipe) -> dict[Recipe, float]:
    """The steps of a recipe that take different times, each with its share of the epochs.

    A step is a recipe of one epoch, in which nothing but `CHOICES` and the size of the images is
    set: recipes whose steps take equally long have the same.
    """
    choices = {field: getattr(recipe, field) for field in CHOICES}
    return {
        Recipe(**choices, epochs=1, image_sizes=recipe.image_sizes and (size,)): count
        / recipe.epochs
        for size, count in recipe.epochs_by_size.items()
    }


def different(names: Iterable[str] = recipes.RECIPES) -> list[str]:
    """Those of the recipes that are not as fast as an earlier one because their steps are its."""
    first: dict[frozenset, str] = {}
    for name in names:
        first.setdefault(frozenset(steps_of(recipes.get(name)).items()), name)
    return list(first.values())


def run(
    out: Path,
    names: Sequence[str] = (),
    *,
    seconds: float = 5.0,
    rounds: int = 3,
    backends: Sequence[str] = BACKENDS,
) -> pd.DataFrame:
    """Measure recipes, each in its own precision and in float32, and write what was found.

    Args:
        out: the folder of `benchmark.csv`, `benchmark.json` and `benchmark.png`, written after
            every round.
        names: of recipes; by default all that differ in speed, those for GPUs only where one is.
        seconds: of each measurement, of which there is one a round for each backend, precision
            and size of the images.
        rounds: how often each is measured.
        backends: any of `BACKENDS`; what is not installed or fails is reported and left out.

    Returns:
        a row for each recipe, backend and precision, and for each size of the images if there are
        several, of which the last row has the `image_size` "mean", weighted by epochs. The columns:
        `images_per_second` that are made and trained on, by the median step, and its `lowest` and
        `highest` of the rounds; `trained_images_per_second`, without making them; `feeding_share`
        of a step's time that making its batch takes; `seconds_per_epoch` of 50,000 images;
        `compile_seconds`; and `steps`, how many were measured.

    Raises:
        RecipeError: a recipe or backend is unknown, or `seconds` or `rounds` cannot be.
        RunError: no backend could be measured.
    """
    for name in names:
        recipes.get(name)
    for backend in backends:
        if backend not in BACKENDS:
            raise RecipeError(recipes.unknown("backend", backend, BACKENDS))
    if not (math.isfinite(seconds) and seconds > 0):
        raise RecipeError(f"seconds is {seconds:g}; it must be a finite number above 0.")
    if rounds < 1:
        raise RecipeError(f"rounds is {rounds}; it must be 1 or more.")
    with Processes(dict.fromkeys(backends)) as processes:
        environments = {b: processes.ask(b, describe) for b in processes.processes}
        if not names:
            computes = {environments[b]["device"] for b in environments if environments[b]}
            names = [n for n in different() if n not in recipes.FOR_GPUS or "GPU" in computes]
        chosen = {name: recipes.get(name) for name in names}
        plan = {
            (name, backend, precision): steps_of(recipe.replace(precision=precision))
            for name, recipe in chosen.items()
            for backend in processes.processes
            if backend not in processes.failures
            for precision in _precisions(recipe, environments[backend])
        }
        turns = {(backend, step): [] for (_, backend, _), steps in plan.items() for step in steps}
        for number in range(rounds):
            _take_turns(processes, turns, seconds, number, rounds)
            rows = [
                {"recipe": name, "backend": backend, "precision": precision} | numbers
                for (name, backend, precision), steps in plan.items()
                if backend not in processes.failures
                for numbers in _rows(steps, {step: turns[backend, step] for step in steps})
            ]
            if not rows:
                reasons = "; ".join(f"{name}: {why}" for name, why in processes.failures.items())
                raise runs.RunError(f"No backend could be measured. {reasons}.")
            measured = {b: environments[b] for b in environments if b not in processes.failures}
            content = {"seconds": seconds, "rounds": number + 1, "environments": measured}
            content |= {"failures": processes.failures, "throughput": rows}
            # After every round, so that an interruption leaves what the finished ones found. By a
            # thread, which Ctrl-C does not reach: no two files are of different rounds, and Ctrl-C
            # is not lost in a callback of matplotlib's, where Python ignores all exceptions.
            with ThreadPoolExecutor(1) as pool:
                table = pool.submit(_write, out, content).result()
    return table


def _write(out: Path, content: Mapping[str, Any]) -> pd.DataFrame:
    table = pd.DataFrame(content["throughput"])
    machine = next(iter(content["environments"].values()))
    title = f"Training speed: {machine['processor']}, {machine['threads']} threads"
    whole = table.drop_duplicates(["recipe", "backend", "precision"], keep="last")
    picture = io.BytesIO()
    figures.training_speed(whole, title).savefig(picture)
    files = {
        "benchmark.json": runs.as_json(content),
        "benchmark.csv": table.to_csv(index=False).encode(),
        "benchmark.png": picture.getvalue(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        runs.write_atomically(out / name, file)
    return table


def _precisions(recipe: Recipe, environment: Mapping[str, str]) -> list[str]:
    own = environment["precision"] if recipe.precision == "auto" else recipe.precision
    return list(dict.fromkeys((own, "float32")))


def _take_turns(
    processes: Processes,
    turns: Mapping[tuple[str, Recipe], list[list[Step]]],
    seconds: float,
    number: int,
    rounds: int,
) -> None:
    """Measure round `number`, from 0, and add each one's steps to those of its earlier turns."""
    for backend, step in list(turns)[:: 1 if number % 2 == 0 else -1]:
        steps = processes.ask(backend, measure, step, seconds)
        if steps is None:
            continue
        turns[backend, step].append(steps)
        rate = step.batch_size / statistics.median(map(sum, steps[WARM_UP_STEPS:]))
        where = f"{step.model}, {step.image_size(0)} pixels, batch {step.batch_size}"
        print(
            f"{number + 1}/{rounds}  {backend:<11}{step.precision:<9} {where:<33}"
            f"{rate:8,.0f} images/s",
            flush=True,
        )


def _rows(steps: Mapping[Recipe, float], turns: Mapping[Recipe, list[list[Step]]]) -> list[dict]:
    """A row for each step, and if there are several, one for their mean."""
    rows = [{"image_size": s.image_size(0)} | _numbers({s: 1.0}, turns) for s in steps]
    return rows if len(rows) == 1 else [*rows, {"image_size": "mean"} | _numbers(steps, turns)]


def _numbers(shares: Mapping[Recipe, float], turns: Mapping[Recipe, list[list[Step]]]) -> dict:
    def rate(seconds: Callable[[Step], float], rounds: slice = slice(None)) -> float:
        per_image = 0.0
        for step, share in shares.items():
            measured = [s for turn in turns[step][rounds] for s in turn[WARM_UP_STEPS:]]
            per_image += share * statistics.median(map(seconds, measured)) / step.batch_size
        return 1 / per_image

    whole, trained = rate(sum), rate(lambda step: step[1])
    of_rounds = [rate(sum, slice(n, n + 1)) for n in range(len(turns[next(iter(shares))]))]
    compiling = 0.0
    for step in shares:
        # Backends compile in the first steps of the first turn.
        first = sum(seconds for _, seconds in turns[step][0][:WARM_UP_STEPS])
        later = statistics.median(seconds for _, seconds in turns[step][0][WARM_UP_STEPS:])
        compiling += max(first - WARM_UP_STEPS * later, 0.0)
    return {
        "batch_size": next(iter(shares)).batch_size,
        "images_per_second": round(whole, 1),
        "lowest": round(min(of_rounds), 1),
        "highest": round(max(of_rounds), 1),
        "trained_images_per_second": round(trained, 1),
        "feeding_share": round(1 - whole / trained, 4),
        "seconds_per_epoch": round(TRAIN_IMAGES / whole, 1),
        "compile_seconds": round(compiling, 1),
        "steps": sum(len(turn) - WARM_UP_STEPS for step in shares for turn in turns[step]),
    }
