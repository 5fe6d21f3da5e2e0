"""Training: a recipe and data in, a run folder out; interrupted at any moment, it resumes.

After every epoch one file, renamed into place, holds all that the rest of the run depends on.
Chance is a function of (seed, epoch, picture or layer), so a resumed run ends bit for bit where it
would have ended undisturbed, on the same machine with the same threads and precision.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cifar_lib import ROOT, augmentation, backend, data, evaluation, models, runs
from cifar_lib.backend import keras
from cifar_lib.recipes import Recipe

OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "adam": keras.optimizers.Adam,
    "rmsprop": keras.optimizers.RMSprop,
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
}

# A loss that is not finite stays so in the epoch's running mean, so now and then is soon enough.
STEPS_BETWEEN_LOSS_CHECKS = 16


class TrainingError(runs.RunError):
    """The loss is not finite."""


def train(
    recipe: Recipe, run_dir: Path | None = None, *, dataset: data.Dataset | None = None
) -> runs.Run:
    """Train and test a recipe's network, or continue where an interrupted run stopped.

    Args:
        recipe: every choice.
        run_dir: the run folder; by default `runs/<recipe.run_name>` in the repository. If it holds
            the finished run of this recipe, nothing is trained again.
        dataset: what `data.load(recipe.dataset)` gives, if it is at hand.

    Raises:
        TrainingError: the loss is not finite.
        RunError: the folder belongs to another recipe or another process, the disk is full, or
            `dataset` is not the recipe's.
        DataError: the data set is not there or is not what it should be.
    """
    run_dir = run_dir or ROOT / "runs" / recipe.run_name
    with runs.opened(run_dir, recipe) as run:
        if run.finished:
            # It may have been killed between its last two steps.
            (run_dir / "checkpoint.npz").unlink(missing_ok=True)
            print(f"{run_dir} holds this run already, finished.")
            return run
        (run_dir / "failure.json").unlink(missing_ok=True)
        dataset = dataset or data.load(recipe.dataset)
        if dataset.name != recipe.dataset:
            raise runs.RunError(
                f"The recipe asks for the data set {recipe.dataset!r}; {dataset.name!r} was given."
            )
        splits = data.make_splits(dataset, **recipe.split_choices)
        precision = backend.resolve_precision(recipe.precision)
        model = models.build(recipe.model, precision=precision, seed=recipe.seed)
        compile_model(model, recipe, steps=-(-len(splits.train) // recipe.batch_size))
        environment = backend.describe(precision) | {"data": dataset.digests}
        recorder = Recorder(run_dir, recipe, environment)
        recorder.fit(model, splits)
        _finish(run, model, splits, dataset, recorder)
    return run


def compile_model(model: keras.Model, recipe: Recipe, steps: int) -> None:
    """Compile with the recipe's optimiser and schedule.

    Args:
        model: the network.
        recipe: optimizer, learning_rate, schedule, decay and epochs are used.
        steps: steps an epoch.
    """
    schedules = keras.optimizers.schedules
    rate = recipe.learning_rate
    if recipe.schedule == "inverse_time":
        rate = schedules.InverseTimeDecay(rate, decay_steps=1, decay_rate=recipe.decay)
    elif recipe.schedule == "cosine":
        rate = schedules.CosineDecay(rate, decay_steps=recipe.epochs * steps)
    model.compile(
        optimizer=OPTIMIZERS[recipe.optimizer](rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=backend.jit_compile(),
    )


class Recorder(keras.callbacks.Callback):
    """Trains a network and keeps after every epoch what is needed to continue and to report.

    Args:
        run_dir: the run folder.
        recipe: every choice.
        environment: what `backend.describe` gives, and the data's digests.

    Attributes:
        history: one dict an epoch, as in `runs.Run.history`.
        weights_epoch: after `fit`, the epoch that the weights are of, from 1.
    """

    def __init__(self, run_dir: Path, recipe: Recipe, environment: dict) -> None:
        super().__init__()
        self.run_dir, self.recipe, self.environment = run_dir, recipe, environment
        self.checkpoint = run_dir / "checkpoint.npz"
        self.history: list[dict[str, float]] = []
        self.stopped = False
        self.early_stopping: keras.callbacks.EarlyStopping | None = None
        if recipe.early_stopping_patience:
            self.early_stopping = keras.callbacks.EarlyStopping(
                "val_loss", patience=recipe.early_stopping_patience, restore_best_weights=True
            )

    def fit(self, model: keras.Model, splits: data.Splits) -> None:
        """Train from the last finished epoch to the end."""
        recipe = self.recipe
        self.set_model(model)
        self._restore()
        runs.write_json(self.run_dir / "environment.json", self.environment)
        if len(self.history) < recipe.epochs and not self.stopped:
            policy = augmentation.make(recipe.augmentation)
            self.batches = augmentation.Batches(
                splits.train, recipe.batch_size, policy, seed=recipe.seed, shuffle=True
            )
            validation = splits.validation
            # Closed however training ends, or it is drawn again below what is then said.
            with contextlib.closing(Progress(len(self.history))) as progress:
                callbacks = [self, progress]
                if self.early_stopping:
                    callbacks = [self.early_stopping, *callbacks]
                model.fit(
                    self.batches,
                    validation_data=validation and augmentation.Batches(validation, 250),
                    initial_epoch=len(self.history),
                    epochs=recipe.epochs,
                    callbacks=callbacks,
                    shuffle=False,
                    verbose=0,
                )
        self.weights_epoch = len(self.history)
        if self.early_stopping and self.early_stopping.best_weights is not None:
            model.set_weights(self.early_stopping.best_weights)
            self.weights_epoch = int(self.early_stopping.best_epoch) + 1

    def on_train_begin(self, logs: dict | None = None) -> None:
        # Keras' early stopping has just forgotten the epochs before.
        if self.early_stopping and self.history:
            for name, value in self._early_stopping_state.items():
                setattr(self.early_stopping, name, value)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.batches.epoch = self.epoch = epoch
        states = [v for v in self.model.variables if v.name == "seed_generator_state"]
        for layer, state in enumerate(states):
            stream = augmentation.random_stream("layer", self.recipe.seed, epoch, layer)
            state.assign([int(stream.integers(2**31)), 0])
        self.epoch_began = self.training_ended = time.perf_counter()

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
        self.stopped = self.model.stop_training
        self._save()

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
        history = pd.DataFrame(self.history).to_csv(index=False)
        runs.write_atomically(self.run_dir / "history.csv", history.encode())

    def _restore(self) -> None:
        self.model.optimizer.build(self.model.trainable_variables)
        if not self.checkpoint.exists():
            return
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
            self._early_stopping_state = state["early_stopping"] | {"best_weights": groups["best"]}
            self.on_train_begin()
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


class Progress(keras.callbacks.Callback):
    """One updating line with the time left where somebody watches, else one line an epoch.

    Args:
        epochs_done: epochs of earlier attempts at this run.
    """

    def __init__(self, epochs_done: int) -> None:
        super().__init__()
        self.epochs_done = epochs_done
        self.bar: tqdm | None = None
        # A kernel that Jupyter started has this name; one that papermill started has not.
        self.live = sys.stdout.isatty() or "JPY_SESSION_NAME" in os.environ

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.began = time.perf_counter()
        epochs, steps = self.params["epochs"], self.params["steps"]
        self.bar = tqdm(
            total=epochs * steps,
            initial=self.epochs_done * steps,
            disable=not self.live,
            file=sys.stdout,
            unit="step",
            dynamic_ncols=True,
        )

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.bar.set_description(f"epoch {epoch + 1}/{self.params['epochs']}")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        numbers = "  ".join(f"{name} {float(value):.4f}" for name, value in logs.items())
        if self.live:
            self.bar.set_postfix_str(numbers)
            return
        epochs = self.params["epochs"]
        seconds = (time.perf_counter() - self.began) / (epoch + 1 - self.epochs_done)
        left = tqdm.format_interval(seconds * (epochs - epoch - 1))
        line = f"epoch {epoch + 1}/{epochs}  {numbers}  {seconds:.0f} s an epoch, {left} left"
        print(line, flush=True)  # a log is read while it grows

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _finish(
    run: runs.Run,
    model: keras.Model,
    splits: data.Splits,
    dataset: data.Dataset,
    recorder: Recorder,
) -> None:
    """Test the network, write what is left to write, and give up the checkpoint."""
    predictions, metrics = {}, {}
    # With the protocol "deck" both are the test images.
    tested = (
        [splits.test] if recorder.recipe.protocol != "holdout" else [splits.validation, splits.test]
    )
    for split in tested:
        probabilities = evaluation.predict(model, split.images)
        metrics[split.name] = evaluation.evaluate(
            probabilities, split.fine_labels, dataset.superclass_of
        )
        predictions |= {
            f"{split.name}_probabilities": probabilities,
            f"{split.name}_labels": split.fine_labels,
            f"{split.name}_indices": split.indices,
        }
    history = pd.DataFrame(recorder.history)
    best = history["val_accuracy"].idxmax() if "val_accuracy" in history else None
    metrics |= {
        "parameters": model.count_params(),
        "train_images": len(splits.train),
        "epochs_run": len(history),
        "best_epoch": None if best is None else int(history["epoch"][best]),
        "weights_epoch": recorder.weights_epoch,
        "train_seconds": float(history["train_seconds"].sum()),
    }
    runs.write_arrays(run.path / "predictions.npz", predictions)
    runs.write_arrays(run.path / "weights.npz", _numbered("", model.weights))
    runs.write_json(run.path / "metrics.json", metrics)
    recorder.checkpoint.unlink(missing_ok=True)


def _numbered(group: str, arrays: list) -> dict[str, np.ndarray]:
    return {f"{group}{n:04d}": keras.ops.convert_to_numpy(a) for n, a in enumerate(arrays)}
