"""Training: a recipe and data in, a run folder out; interrupted at any moment, it resumes.

After every epoch one file, renamed into place, holds all that the rest of the run depends on.
Chance is a function of (seed, epoch, picture or layer), so a resumed run ends bit for bit where it
would have ended undisturbed, on the same machine with the same threads and precision.

The learning-rate range test is a short training of its own, and leaves no run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

from cifar_lib import (
    ROOT,
    augmentation,
    backend,
    data,
    evaluation,
    models,
    optimizers,
    runs,
    started_by_jupyter,
)
from cifar_lib.backend import keras
from cifar_lib.recipes import SIDE, Recipe, RecipeError

OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "adam": keras.optimizers.Adam,
    "rmsprop": keras.optimizers.RMSprop,
    "sgd": functools.partial(keras.optimizers.SGD, momentum=0.9, nesterov=True),
    "muon": optimizers.Muon,
}

# A loss that is not finite stays so in the epoch's running mean, so now and then is soon enough.
STEPS_BETWEEN_LOSS_CHECKS = 16

STEPS_TO_WARM_UP = 3
SECONDS_TO_MEASURE = 2.0

# A file of this name in the run folder ends training after the epoch in which it is found.
STOP_FILE = "stop"

# Of the range test: the weight of the past in its running mean; how many times its lowest value the
# running mean must exceed to end the test; and how many standard errors the smoothed loss must fall
# for a rate to be suggested: the least of 300 steps of mere noise lies some 3 below the first.
RANGE_TEST_BETA = 0.98
RANGE_TEST_DIVERGENCE = 4
RANGE_TEST_CLEAR_FALL = 5


class TrainingError(runs.RunError):
    """The loss is not finite, or no learning rate can be read from it."""


class Watcher(Protocol):
    """Who follows a run while it trains, and may stop it: `explorers.Training`.

    Attributes:
        stop: once it is set, training stops at the end of the epoch.
    """

    stop: threading.Event

    def step_ended(self, epoch: int, step: int, steps: int) -> None:
        """Called after each step, `step` of `steps` in the epoch; all of them count from 1."""

    def epoch_ended(self, history: pd.DataFrame) -> None:
        """Called with `runs.Run.history` after each epoch, whose checkpoint is then stored."""


def train(
    recipe: Recipe,
    run_dir: Path | None = None,
    *,
    dataset: data.Dataset | None = None,
    watcher: Watcher | None = None,
) -> runs.Run:
    """Train and test a recipe's network, or continue where an interrupted run stopped.

    If the run folder holds a file named `stop` at the end of an epoch, training ends there, and the
    run is finished with the epochs that it has. If `watcher` asks for it, training is interrupted
    there, and the same call continues the run.

    Args:
        recipe: every choice.
        run_dir: the run folder; by default `runs/<recipe.run_name>` in the repository. If it holds
            the finished run of this recipe, nothing is trained again.
        dataset: what `data.load(recipe.dataset)` gives, if it is at hand.
        watcher: is told of every step and epoch; nothing is printed of them then.

    Raises:
        KeyboardInterrupt: `watcher` stopped it before the run was finished.
        TrainingError: the loss is not finite.
        RunError: the folder belongs to another recipe or another process, the disk is full, or
            `dataset` is not the recipe's.
        DataError: the data set is not there or is not what it should be.
    """
    run_dir = run_dir or ROOT / "runs" / recipe.run_name
    with runs.opened(run_dir, recipe) as run:
        if run.finished:
            # It may have been killed between its last steps.
            for left in ("checkpoint.npz", STOP_FILE):
                (run_dir / left).unlink(missing_ok=True)
            print(f"{run_dir} holds this run already, finished.")
            return run
        (run_dir / "failure.json").unlink(missing_ok=True)
        began = time.perf_counter()
        dataset = _recipes_dataset(recipe, dataset)
        splits = data.make_splits(dataset, **recipe.split_choices)
        precision = backend.resolve_precision(recipe.precision)
        model = models.build_for(recipe, precision)
        compile_model(model, recipe, steps=-(-len(splits.train) // recipe.batch_size))
        environment = backend.describe(precision) | {"data": dataset.digests}
        recorder = Recorder(run_dir, recipe, environment, watcher)
        setup_seconds = time.perf_counter() - began
        recorder.fit(model, splits)
        _finish(run, model, splits, dataset, recorder, setup_seconds)
    return run


def _recipes_dataset(recipe: Recipe, given: data.Dataset | None) -> data.Dataset:
    dataset = given or data.load(recipe.dataset)
    if dataset.name != recipe.dataset:
        raise runs.RunError(
            f"The recipe asks for the data set {recipe.dataset!r}; {dataset.name!r} was given."
        )
    return dataset


def compile_model(model: keras.Model, recipe: Recipe, steps: int) -> None:
    """Compile with the recipe's optimiser and schedule.

    Args:
        model: the network.
        recipe: the optimiser, its rates, its schedule, weight_decay and weight_averaging are used,
            and what kind of labels it has.
        steps: steps an epoch.
    """
    schedules = keras.optimizers.schedules
    rate, all_steps = recipe.learning_rate, recipe.epochs * steps
    if recipe.schedule == "inverse_time":
        rate = schedules.InverseTimeDecay(rate, decay_steps=1, decay_rate=recipe.decay)
    elif recipe.schedule == "cosine":
        warmup = round(recipe.warmup * all_steps)
        rate = schedules.CosineDecay(
            0.0 if warmup else rate,
            decay_steps=all_steps - warmup,
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    elif recipe.schedule == "linear":
        rate = optimizers.LinearSchedule(rate, all_steps, recipe.warmup)
    choices = {"weight_decay": recipe.weight_decay or None}
    if recipe.weight_averaging:
        choices |= {"use_ema": True, "ema_momentum": recipe.weight_averaging}
    if recipe.optimizer == "muon":
        choices["filter_rate"] = recipe.filter_learning_rate / recipe.learning_rate
        choices["compute_dtype"] = model.compute_dtype
    optimizer = OPTIMIZERS[recipe.optimizer](rate, **choices)
    moved_by_muon = 4 if recipe.optimizer == "muon" else None
    optimizer.exclude_from_weight_decay(
        [v for v in model.trainable_variables if len(v.shape) in (1, moved_by_muon)]
    )
    model.compile(
        optimizer=optimizer,
        loss=("" if recipe.soft_labels else "sparse_") + "categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=backend.jit_compile(),
    )
    # Else the first step makes these variables, and TensorFlow traces it twice.
    optimizer.build(model.trainable_variables)
    scores = np.full((1, model.output_shape[-1]), 0.5, np.float32)
    labels = scores if recipe.soft_labels else np.zeros(1, np.int64)
    model.compute_metrics(None, labels, scores)
    model.reset_metrics()


def training_batches(recipe: Recipe, train: data.Split, size: int = SIDE) -> augmentation.Batches:
    """The batches that a recipe trains on, with images of `size` pixels a side."""
    return augmentation.Batches(
        train,
        recipe.batch_size,
        augmentation.make(recipe.augmentation),
        seed=recipe.seed,
        shuffle=True,
        size=size,
        label_smoothing=recipe.label_smoothing or None,
        mixing=recipe.mixing,
    )


def untrained(
    recipe: Recipe, train: data.Split, size: int = SIDE
) -> tuple[augmentation.Batches, keras.Model]:
    """A recipe's batches, with images of `size` pixels a side, and its network, ready for them."""
    batches = training_batches(recipe, train, size)
    model = models.build_for(recipe, backend.resolve_precision(recipe.precision))
    models.adapt(model, train.images)
    compile_model(model, recipe, steps=len(batches))
    return batches, model


def seconds_per_step(recipe: Recipe, *, dataset: data.Dataset | None = None) -> float:
    """How long a training step of a recipe's first epoch takes on this machine, in seconds.

    The median of some seconds' steps, after the first ones, in which the backend compiles.

    Raises:
        RunError: `dataset` is not the recipe's.
        DataError: the data set is not there or is not what it should be.
    """
    dataset = _recipes_dataset(recipe, dataset)
    train = data.make_splits(dataset, **recipe.split_choices).train
    batches, model = untrained(recipe, train, recipe.image_size(0))
    seconds: list[float] = []
    number = 0
    while sum(seconds[STEPS_TO_WARM_UP:]) < SECONDS_TO_MEASURE:
        began = time.perf_counter()
        model.train_on_batch(*batches[number % len(batches)])
        seconds.append(time.perf_counter() - began)
        number += 1
    return statistics.median(seconds[STEPS_TO_WARM_UP:])


class EarlyStopping(keras.callbacks.EarlyStopping):
    """Keras', but over all calls of `fit` that make a run: `Recorder` restores the best weights.

    Args:
        patience: epochs without a lower validation loss.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val_loss", patience=patience, restore_best_weights=True)
        super().on_train_begin()

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Forget nothing of the calls before."""

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leave the last weights to the call that follows."""


class WeightAveraging(keras.callbacks.Callback):
    """Validates the averaged weights, in every call of `fit`, and trains on without the average.

    Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the average is
    Keras' optimiser's. Statistics of batch normalisation, which are running means already, are not
    averaged. It follows `EarlyStopping`, which keeps the weights that were validated, and precedes
    `Recorder`, which stores those that training goes on from. Keras' `SwapEMAWeights` swaps on
    TensorFlow by sums and differences, which round (3.15).
    """

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.trained: list[np.ndarray] | None = None

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._keep()
        self.model.optimizer.finalize_variable_values(self.model.trainable_variables)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if self.trained is None:  # nothing was validated
            self._keep()
        self._restore()

    def on_train_end(self, logs: dict | None = None) -> None:
        self._restore()  # Keras' `fit` ends with the average

    def _keep(self) -> None:
        self.trained = [keras.ops.convert_to_numpy(v) for v in self.model.trainable_variables]

    def _restore(self) -> None:
        for variable, value in zip(self.model.trainable_variables, self.trained, strict=True):
            variable.assign(value)


class Recorder(keras.callbacks.Callback):
    """Trains a network and keeps after every epoch what is needed to continue and to report.

    Args:
        run_dir: the run folder.
        recipe: every choice.
        environment: what `backend.describe` gives, and the data's digests.
        watcher: who follows it in place of the printed progress.

    Attributes:
        history: one dict an epoch, as in `runs.Run.history`.
        stopped: what ended training before all epochs were run: "early stopping" or "stop file";
            else None.
        weights_epoch: after `fit`, the epoch that the weights are of, from 1.
    """

    def __init__(
        self, run_dir: Path, recipe: Recipe, environment: dict, watcher: Watcher | None = None
    ) -> None:
        super().__init__()
        self.run_dir, self.recipe, self.environment = run_dir, recipe, environment
        self.watcher = watcher
        self.checkpoint = run_dir / "checkpoint.npz"
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.early_stopping: EarlyStopping | None = None
        if recipe.early_stopping_patience:
            self.early_stopping = EarlyStopping(recipe.early_stopping_patience)

    def fit(self, model: keras.Model, splits: data.Splits) -> None:
        """Train from the last finished epoch to the end."""
        recipe = self.recipe
        self.set_model(model)
        self.epoch_began = time.perf_counter()
        if not self._restored():
            models.adapt(model, splits.train.images)
        runs.write_json(self.run_dir / "environment.json", self.environment)
        with contextlib.ExitStack() as stack:
            if self.watcher:
                callbacks = [self, Watched(self, self.watcher)]
            else:
                progress = Progress(recipe.epochs, len(self.history))
                # Closed however training ends, or it is drawn again below what is then said.
                stack.callback(progress.close)
                callbacks = [self, progress]
            if recipe.weight_averaging:
                callbacks = [WeightAveraging(), *callbacks]
            if self.early_stopping:
                callbacks = [self.early_stopping, *callbacks]
            while len(self.history) < recipe.epochs and not self.stopped:
                self._fit_one_size(model, splits, callbacks)
        if self.stopped == "stop file":
            print(f"Stopped after epoch {len(self.history)}, as {self.run_dir / STOP_FILE} asks.")
        self.weights_epoch = len(self.history)
        if recipe.weight_averaging:
            model.optimizer.finalize_variable_values(model.trainable_variables)
        if self.early_stopping and self.early_stopping.best_weights is not None:
            model.set_weights(self.early_stopping.best_weights)
            self.weights_epoch = int(self.early_stopping.best_epoch) + 1

    def _fit_one_size(self, model: keras.Model, splits: data.Splits, callbacks: list) -> None:
        """Train for the epochs that follow with images of the same size."""
        recipe, done = self.recipe, len(self.history)
        size = recipe.image_size(done)
        more = itertools.takewhile(
            lambda epoch: recipe.image_size(epoch) == size, range(done, recipe.epochs)
        )
        self.batches = training_batches(recipe, splits.train, size)
        # Each size has its own compiled step, in which it is a constant.
        model.make_train_function(force=True)
        validation = splits.validation
        label_smoothing = 0.0 if recipe.soft_labels else None
        model.fit(
            self.batches,
            validation_data=validation
            and augmentation.Batches(validation, 250, label_smoothing=label_smoothing),
            initial_epoch=done,
            epochs=done + len(list(more)),
            callbacks=callbacks,
            shuffle=False,
            verbose=0,
        )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.batches.epoch = self.epoch = epoch
        states = [v for v in self.model.variables if v.name == "seed_generator_state"]
        for layer, state in enumerate(states):
            stream = augmentation.random_stream("layer", self.recipe.seed, epoch, layer)
            state.assign([int(stream.integers(2**31)), 0])

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.training_ended = time.perf_counter()
        if batch % STEPS_BETWEEN_LOSS_CHECKS == 0:
            self._refuse_infinite_loss(float(logs["loss"]), f"step {batch + 1}")

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self._refuse_infinite_loss(float(logs["loss"]), "its last step")
        now = time.perf_counter()
        self.history.append(
            {"epoch": epoch + 1}
            | {name: float(value) for name, value in logs.items()}
            | {
                "learning_rate": float(self.model.optimizer.learning_rate),
                "train_seconds": round(self.training_ended - self.epoch_began, 3),
                "validation_seconds": round(now - self.training_ended, 3),
            }
        )
        if epoch + 1 < self.recipe.epochs:
            if self.model.stop_training:
                self.stopped = "early stopping"
            elif (self.run_dir / STOP_FILE).exists():
                self.stopped = "stop file"
                self.model.stop_training = True
        self._save()
        self.epoch_began = time.perf_counter()

    def _refuse_infinite_loss(self, loss: float, where: str) -> None:
        if math.isfinite(loss):
            return
        message = (
            f"The loss became {loss} in epoch {self.epoch + 1} by {where}. Try a learning_rate "
            f"below {self.recipe.learning_rate:g}"
            + (", or precision 'float32'." if self.environment["precision"] != "float32" else ".")
        )
        failure = {"error": message, "epoch": self.epoch + 1, "loss": str(loss)}
        runs.write_json(self.run_dir / "failure.json", failure)
        raise TrainingError(message)

    def _save(self) -> None:
        state = {"history": self.history, "stopped": self.stopped, "environment": self.environment}
        arrays = _numbered("model", self.model.weights)
        arrays |= _numbered("optimizer", self.model.optimizer.variables)
        if self.early_stopping:
            state["early_stopping"] = {
                name: float(getattr(self.early_stopping, name)) for name in ("wait", "best")
            } | {"best_epoch": int(self.early_stopping.best_epoch)}
            arrays |= _numbered("best", self.early_stopping.best_weights or [])
        arrays["state"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        runs.write_arrays(self.checkpoint, arrays)
        self.write_history()

    def write_history(self) -> None:
        history = pd.DataFrame(self.history).to_csv(index=False)
        runs.write_atomically(self.run_dir / "history.csv", history.encode())

    def _restored(self) -> bool:
        """Whether the run goes on from a checkpoint, which is then loaded."""
        if not self.checkpoint.exists():
            return False
        arrays = runs.read_arrays(self.checkpoint)
        state = json.loads(arrays.pop("state").tobytes())
        groups = {
            group: [array for name, array in arrays.items() if name.startswith(group)]
            for group in ("model", "optimizer", "best")
        }
        runs.assign(self.model.weights, groups["model"], self.checkpoint)
        runs.assign(self.model.optimizer.variables, groups["optimizer"], self.checkpoint)
        self.history, self.stopped = state["history"], state["stopped"]
        if self.early_stopping:
            stored = state["early_stopping"] | {"best_weights": groups["best"]}
            for name, value in stored.items():
                setattr(self.early_stopping, name, value)
        print(f"Continuing {self.run_dir} after epoch {len(self.history)}.", flush=True)
        differences = [
            f"{key} was {before!r} and is {self.environment.get(key)!r}"
            for key, before in state["environment"].items()
            if key != "commit" and before != self.environment.get(key)
        ]
        if differences:
            print(
                "The result will not be bit for bit that of an undisturbed run: "
                + "; ".join(differences)
            )
        return True


class Watched(keras.callbacks.Callback):
    """Tells a watcher of steps and epochs, and stops training where the watcher asks for it.

    It follows `recorder`, which stores the epoch: the run is then as after Ctrl-C, and goes on in
    the same way. A run that ends with this epoch is not stopped.
    """

    def __init__(self, recorder: Recorder, watcher: Watcher) -> None:
        super().__init__()
        self.recorder, self.watcher = recorder, watcher

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.watcher.step_ended(self.recorder.epoch + 1, batch + 1, self.params["steps"])

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.watcher.epoch_ended(pd.DataFrame(self.recorder.history))
        ends = self.recorder.stopped or epoch + 1 == self.recorder.recipe.epochs
        if self.watcher.stop.is_set() and not ends:
            raise KeyboardInterrupt(f"stopped after epoch {epoch + 1}")


class Progress(keras.callbacks.Callback):
    """One updating line with the time left where somebody watches, else one line an epoch.

    Args:
        epochs: of the run.
        epochs_done: those of earlier attempts at it.
    """

    def __init__(self, epochs: int, epochs_done: int) -> None:
        super().__init__()
        self.epochs, self.epochs_done = epochs, epochs_done
        self.bar: tqdm | None = None
        self.live = _watched()

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self.bar is not None:
            return
        self.began = time.perf_counter()
        steps = self.params["steps"]
        self.bar = tqdm(
            total=self.epochs * steps,
            initial=self.epochs_done * steps,
            disable=not self.live,
            file=sys.stdout,
            unit="step",
            dynamic_ncols=True,
        )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.bar.set_description(f"epoch {epoch + 1}/{self.epochs}")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        numbers = "  ".join(f"{name} {float(value):.4f}" for name, value in logs.items())
        if self.live:
            self.bar.set_postfix_str(numbers)
            return
        seconds = (time.perf_counter() - self.began) / (epoch + 1 - self.epochs_done)
        left = tqdm.format_interval(seconds * (self.epochs - epoch - 1))
        line = f"epoch {epoch + 1}/{self.epochs}  {numbers}  {seconds:.0f} s an epoch, {left} left"
        print(line, flush=True)  # a log is read while it grows

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _watched() -> bool:
    """Whether somebody sees a line that updates itself."""
    return sys.stdout.isatty() or started_by_jupyter()


def _finish(
    run: runs.Run,
    model: keras.Model,
    splits: data.Splits,
    dataset: data.Dataset,
    recorder: Recorder,
    setup_seconds: float,
) -> None:
    """Test the network, write what is left to write, and give up the checkpoint."""
    predictions, metrics = {}, {}
    # With the protocol "deck" both are the test images; with `test_size` 0 there are none.
    tested = (
        [splits.test] if recorder.recipe.protocol != "holdout" else [splits.validation, splits.test]
    )
    began = time.perf_counter()
    for split in filter(len, tested):
        probabilities = evaluation.predict(model, split.images)
        metrics[split.name] = evaluation.evaluate(
            probabilities, split.fine_labels, dataset.superclass_of
        )
        predictions |= {
            f"{split.name}_probabilities": probabilities,
            f"{split.name}_labels": split.fine_labels,
            f"{split.name}_indices": split.indices,
        }
    seconds = {"setup": setup_seconds, "evaluation": time.perf_counter() - began}
    if recorder.recipe.protocol == "final":
        # Test-time averaging over mirror images, always reported apart from a single view.
        averaged = evaluation.average_with_mirrored(
            model, splits.test.images, predictions["test_probabilities"]
        )
        metrics["test_flip"] = evaluation.evaluate(
            averaged, splits.test.fine_labels, dataset.superclass_of
        )
    history = pd.DataFrame(recorder.history)
    best = history["val_accuracy"].idxmax() if "val_accuracy" in history else None
    metrics |= {
        "parameters": model.count_params(),
        "train_images": len(splits.train),
        "epochs_run": len(history),
        "stopped": recorder.stopped,
        "best_epoch": None if best is None else int(history["epoch"][best]),
        "weights_epoch": recorder.weights_epoch,
        "train_seconds": float(history["train_seconds"].sum()),
    } | {f"{name}_seconds": round(value, 3) for name, value in seconds.items()}
    runs.write_arrays(run.path / "predictions.npz", predictions)
    runs.write_arrays(run.path / "weights.npz", _numbered("", model.weights))
    # A kill between the last checkpoint and its table has left this one epoch short.
    recorder.write_history()
    runs.write_json(run.path / "metrics.json", metrics)
    recorder.checkpoint.unlink(missing_ok=True)
    (run.path / STOP_FILE).unlink(missing_ok=True)


def _numbered(group: str, arrays: list) -> dict[str, np.ndarray]:
    return {f"{group}{n:04d}": keras.ops.convert_to_numpy(a) for n, a in enumerate(arrays)}


def range_test(
    recipe: Recipe,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 300,
    dataset: data.Dataset | None = None,
) -> pd.DataFrame:
    """Train shortly while the learning rate rises, to see at which rates the loss falls.

    Smith 2017, "Cyclical learning rates for training neural networks", section 3.3, with a rate
    that grows by the same factor from step to step, as in fastai. The network, the optimiser, the
    augmentation, the batches, the precision and the size of the first epoch's images are the
    recipe's; its learning rate and schedule are not used, and nothing is validated or kept.

    Args:
        recipe: every choice.
        lowest: the learning rate of the first step, above 0.
        highest: that of the last step, above `lowest`.
        steps: batches to train on, at least 2; the training images are used again as needed.
        dataset: what `data.load(recipe.dataset)` gives, if it is at hand.

    Returns:
        one row a step: `step` (from 1), `learning_rate`, `loss` of the step's batch before the
        weights change (nats), and `smoothed`, its exponential running mean with the weight 0.98 of
        the past, corrected for its start. The last row is earlier than `steps` if `smoothed`
        became more than 4 times its lowest value, or not finite.

    Raises:
        RecipeError: the bounds or the number of steps cannot be.
        RunError: `dataset` is not the recipe's.
        DataError: the data set is not there or is not what it should be.
    """
    if not (math.isfinite(highest) and 0 < lowest < highest):
        raise RecipeError(
            f"The range of learning rates is from {lowest:g} to {highest:g}; lowest must be above "
            "0, and highest above lowest and finite."
        )
    if steps < 2:
        raise RecipeError(f"steps is {steps}; a range of learning rates needs 2 or more.")
    dataset = _recipes_dataset(recipe, dataset)
    train = data.make_splits(dataset, **recipe.split_choices).train
    # Keras lets the rate be set only where no schedule sets it.
    constant = recipe.replace(schedule="constant", warmup=0.0)
    batches, model = untrained(constant, train, recipe.image_size(0))
    rows = []
    mean, least = 0.0, math.inf
    rates = np.geomspace(lowest, highest, steps)
    bar = tqdm(rates, disable=not _watched(), file=sys.stdout, unit="step", dynamic_ncols=True)
    with contextlib.closing(bar):
        for step, rate in enumerate(bar):
            batches.epoch, number = divmod(step, len(batches))
            model.optimizer.learning_rate = rate
            # Not `fit`, whose loss is the mean of an epoch's batches so far.
            loss = float(model.train_on_batch(*batches[number], return_dict=True)["loss"])
            mean = RANGE_TEST_BETA * mean + (1 - RANGE_TEST_BETA) * loss
            smoothed = mean / (1 - RANGE_TEST_BETA ** (step + 1))
            rows.append((step + 1, rate, loss, smoothed))
            least = min(least, smoothed)
            if not math.isfinite(smoothed) or smoothed > RANGE_TEST_DIVERGENCE * least:
                break
    return pd.DataFrame(rows, columns=["step", "learning_rate", "loss", "smoothed"])


def suggested_rate(table: pd.DataFrame) -> float:
    """The learning rate at which the loss of a range test falls most steeply.

    The steepest descent over the logarithm of the rate, before the lowest loss. The loss is first
    smoothed by a Gaussian whose standard deviation is a fifteenth of the steps, or one step. It is
    centred; the column `smoothed` would not do, since it follows the loss by up to 49 steps, so
    that its steepest point lies at too high a rate.

    Args:
        table: what `range_test` gives.

    Raises:
        TrainingError: the loss never fell by clearly more than its noise, or there are fewer than
            10 finite losses.
    """
    finite = table[np.isfinite(table["loss"])]
    if len(finite) < 10:
        raise TrainingError(
            f"{len(finite)} finite losses are too few to suggest a learning rate. Try more steps, "
            "or a lower lowest."
        )
    losses = finite["loss"].to_numpy()
    # A loss beyond any at the start has diverged. How far says nothing, and would spread.
    ceiling = losses[: max(1, len(losses) // 10)].max()
    losses = np.minimum(losses, ceiling)
    width = max(len(losses) / 15, 1)
    smooth = gaussian_filter1d(losses, width, mode="reflect")
    lowest = int(smooth.argmin())
    # The standard error of a mean with Gaussian weights, from differences of neighbours, which have
    # hardly a trend, and no longer those near divergence.
    noise = np.diff(losses[: max(lowest, 9) + 1]).std() / np.sqrt(2)
    error = noise / np.sqrt(2 * np.sqrt(np.pi) * width)
    if smooth[0] - smooth[lowest] <= RANGE_TEST_CLEAR_FALL * error:
        first, last = table["learning_rate"].iloc[[0, -1]]
        raise TrainingError(
            f"The loss never fell from {table['loss'].iloc[0]:.4g}, its first value, between the "
            f"learning rates {first:g} and {last:g}. Let the rate rise more slowly, by more steps; "
            "or try a higher highest if it stayed level to the end, a lower lowest if it rose from "
            "the start."
        )
    rates = finite["learning_rate"].to_numpy()[: lowest + 1]
    return float(rates[np.gradient(smooth[: lowest + 1], np.log(rates)).argmin()])
