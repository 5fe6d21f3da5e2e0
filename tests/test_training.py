"""Training: stopped at any moment it ends as if undisturbed; what it records; when it refuses.

Runs are stopped in a thread while the same recipes are trained undisturbed in this process.
"""

import contextlib
import importlib.util
import json
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cifar_lib import (
    ROOT,
    augmentation,
    backend,
    data,
    explorers,
    models,
    recipes,
    runs,
    training,
    workflows,
)
from cifar_lib.__main__ import main
from cifar_lib.recipes import Recipe

SMALL = {
    "dataset": "synthetic",
    "train_size": 24,
    "validation_size": 25,
    "test_size": 25,
    "batch_size": 16,
    "epochs": 3,
    "learning_rate": 1e-4,
}
# Where the processor does not compute in bfloat16, gradients take fifty times as long in it.
LOWEST = backend.resolve_precision("auto")
# Together: every augmentation, optimiser, schedule, precision and protocol that the deck's network
# is trained with, and early stopping. All have dropout.
RECIPES = {
    "seed": {"optimizer": "adam", "schedule": "cosine", "precision": "float32"},
    "none": {
        "optimizer": "rmsprop",
        "precision": LOWEST,
        "protocol": "final",
        "mixing": "mixup",
        "weight_averaging": 0.5,
    },
    "seed_layers": {"optimizer": "sgd", "schedule": "constant", "protocol": "deck"},
    "shift_flip": {
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "batch_size": 8,
        "early_stopping_patience": 2,
        "epochs": 20,
    },
}


def make_recipe(augmentation: str) -> Recipe:
    return recipes.get("seed", augmentation=augmentation, **(SMALL | RECIPES[augmentation]))


def command(recipe: Recipe, folder: Path) -> list[str]:
    """What a person types to train a recipe in a folder."""
    usual = asdict(recipes.get("seed"))
    choices = []
    for field, value in asdict(recipe).items():
        if value != usual[field]:
            values = value if isinstance(value, tuple) else [value]
            choices += [f"--{field.replace('_', '-')}", *map(str, values)]
    place = ["--runs-dir", str(folder.parent), "--run-name", folder.name]
    return ["-m", "cifar_lib", "train", "seed", *choices, *place]


@contextlib.contextmanager
def started(arguments: list[str], log: Path, **settings: object) -> Iterator[subprocess.Popen]:
    with log.open("w") as output:
        settings = {"stdout": output, "stderr": subprocess.STDOUT, "cwd": ROOT} | settings
        process = subprocess.Popen([sys.executable, *arguments], **settings)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def epochs_stored(folder: Path) -> int:
    # Asked for again and again: what is read is no more than counted.
    history = folder / "history.csv"
    return history.read_text().count("\n") - 1 if history.exists() else 0


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], log: Path) -> None:
    for _ in range(120_000):  # ten minutes
        if condition():
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=0.005)
            pytest.fail(f"It ended too soon, with exit code {code}:\n{log.read_text()}")
    pytest.fail(f"It takes too long:\n{log.read_text()}")


class Disturber:
    """Starts the run of a recipe and stops it, again and again, as `PLANS` says.

    Attributes:
        exit_codes: of every process that was stopped.
        printed: what each of them printed.
    """

    def __init__(self, recipe: Recipe, folder: Path, moments: random.Random) -> None:
        self.recipe, self.folder, self.moments = recipe, folder, moments
        self.exit_codes: list[int] = []
        self.printed: list[str] = []

    @contextlib.contextmanager
    def attempt(self, **settings: object) -> Iterator[tuple[subprocess.Popen, Path]]:
        log = self.folder.with_name(f"{self.folder.name}-{len(self.exit_codes)}.log")
        with started(command(self.recipe, self.folder), log, **settings) as process:
            yield process, log
            self.exit_codes.append(process.wait(timeout=120))
        self.printed.append(log.read_text())

    def at_random(self, number: signal.Signals, after: int = 1, **settings: object) -> None:
        """Stop it within the epoch after the one that is the first to be stored, or `after`th."""
        enough = epochs_stored(self.folder) + after
        with self.attempt(**settings) as (process, log):
            wait_for(process, lambda: epochs_stored(self.folder) >= enough, log)
            last = pd.read_csv(self.folder / "history.csv").iloc[-1]
            seconds = last["validation_seconds"] if "val_loss" in last else last["train_seconds"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Never so late that a fast machine is done.
                process.wait(timeout=self.moments.uniform(0, min(seconds, 0.4)))
            process.send_signal(number)

    def while_it_writes_a_checkpoint(self) -> None:
        """Kill it when an older checkpoint is there and the next one is half written."""
        partial = self.folder / ".checkpoint.npz.partial"

        def writes() -> bool:
            if not (partial.exists() and (self.folder / "history.csv").exists()):
                return False
            process.send_signal(signal.SIGSTOP)  # so that it is still there when it is killed
            if partial.exists():
                return True
            process.send_signal(signal.SIGCONT)
            return False

        with self.attempt() as (process, log):
            wait_for(process, writes, log)
            process.kill()
        assert partial.exists() and (self.folder / "checkpoint.npz").exists()

    def after_early_stopping(self) -> None:
        """Kill it when it has stopped to train and tests the best weights."""

        def stopped() -> bool:
            losses = pd.read_csv(self.folder / "history.csv")["val_loss"]
            return len(losses) - 1 - losses.argmin() == self.recipe.early_stopping_patience

        with self.attempt() as (process, log):
            wait_for(process, stopped, log)
            process.kill()
        assert not (self.folder / "metrics.json").exists()

    def in_a_terminal(self) -> None:
        """Give it a terminal, and press Ctrl-C."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 120))
        shown: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):  # the end of a terminal
                while piece := os.read(ours, 65536):
                    shown.append(piece)

        reader = threading.Thread(target=read)
        reader.start()
        self.at_random(signal.SIGINT, stdout=theirs, stderr=theirs)
        os.close(theirs)
        reader.join()
        os.close(ours)
        self.printed[-1] = b"".join(shown).decode()


PLANS: dict[str, Callable[[Disturber], object]] = {
    "seed": lambda run: (run.at_random(signal.SIGKILL), run.in_a_terminal()),
    "none": lambda run: run.while_it_writes_a_checkpoint(),
    "seed_layers": lambda run: (run.at_random(signal.SIGKILL), run.at_random(signal.SIGTERM)),
    # After 2 epochs the first is the best, and its weights are stored beside the last ones.
    "shift_flip": lambda run: (run.at_random(signal.SIGKILL, after=2), run.after_early_stopping()),
}


@pytest.fixture(scope="module")
def disturbed(synthetic, tmp_path_factory) -> Iterator[dict[str, Future]]:
    """For every recipe a future of its `Disturber`, after all its interruptions."""
    folder = tmp_path_factory.mktemp("disturbed")
    seed = random.SystemRandom().randrange(2**32)

    def disturb(name: str) -> Disturber:
        moments = random.Random(f"{seed} {name}")
        run = Disturber(make_recipe(name), folder / name, moments)
        PLANS[name](run)
        return run

    with ThreadPoolExecutor(1) as pool:
        futures = {name: pool.submit(disturb, name) for name in RECIPES}
        yield futures | {"seed of the moments": seed}
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def undisturbed(disturbed, synthetic, tmp_path_factory) -> dict[str, tuple[runs.Run, str]]:
    """For every recipe its run and what it printed into a log."""
    done = {}
    for name in RECIPES:
        folder = tmp_path_factory.mktemp("undisturbed") / name
        with (folder.with_suffix(".log")).open("w+") as log, contextlib.redirect_stdout(log):
            run = training.train(make_recipe(name), folder, dataset=synthetic)
            log.seek(0)
            done[name] = run, log.read()
    return done


def assert_same(run: runs.Run, other: runs.Run) -> None:
    """The same bit for bit, wall times excepted."""
    kept = [column for column in run.history if not column.endswith("_seconds")]
    pd.testing.assert_frame_equal(run.history[kept], other.history[kept], check_exact=True)
    for name in ("weights.npz", "predictions.npz"):
        with np.load(run.path / name) as ours, np.load(other.path / name) as theirs:
            assert ours.files == theirs.files
            for array in ours.files:
                np.testing.assert_array_equal(ours[array], theirs[array], err_msg=array)
    ours, theirs = (
        {name: value for name, value in metrics.items() if not name.endswith("_seconds")}
        for metrics in (run.metrics, other.metrics)
    )
    assert ours == theirs


@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    name, disturbed, undisturbed, synthetic, capsys
):
    print("seed of the moments:", disturbed["seed of the moments"])
    attempts: Disturber = disturbed[name].result()
    expected = {
        "seed": [-signal.SIGKILL, 130],
        "none": [-signal.SIGKILL],
        "seed_layers": [-signal.SIGKILL, 130],
        "shift_flip": [-signal.SIGKILL, -signal.SIGKILL],
    }
    assert attempts.exit_codes == expected[name], attempts.printed[-1]
    for printed in attempts.printed[1:]:
        assert f"Continuing {attempts.folder} after epoch" in printed
    assert runs.load(attempts.folder).state == "interrupted"
    stored = epochs_stored(attempts.folder)
    assert stored >= 1

    run = training.train(make_recipe(name), attempts.folder, dataset=synthetic)
    assert_same(run, undisturbed[name][0])
    assert not list(run.path.glob("*checkpoint*")) and not list(run.path.glob(".*partial"))
    capsys.readouterr()


def test_a_run_of_several_image_sizes_ends_as_an_undisturbed_one(synthetic, tmp_path):
    fast = {"model": "airbench", "augmentation": "crop_flip", "image_sizes": (16, 12, 14)}
    fast |= {"optimizer": "muon", "filter_learning_rate": 0.1, "label_smoothing": 0.2}
    fast |= {"schedule": "linear", "warmup": 0.25, "weight_decay": 5e-3, "precision": LOWEST}
    fast |= {"mixing": "cutmix", "weight_averaging": 0.6}
    sizes = {"learning_rate": 0.5, "batch_size": 10, "epochs": 6, "early_stopping_patience": 5}
    recipe = recipes.get("seed", **SMALL | fast | sizes)
    folder, log = tmp_path / "killed", tmp_path / "log"
    # It is killed where the size changes, so that it continues with the second, then the third.
    with started(command(recipe, folder), log) as process:
        wait_for(process, lambda: epochs_stored(folder) >= 2, log)
        process.kill()
    assert runs.load(folder).state == "interrupted"
    whole = training.train(recipe, tmp_path / "whole", dataset=synthetic)
    assert_same(training.train(recipe, folder, dataset=synthetic), whole)
    # Nothing is forgotten where the size changes.
    losses = whole.history["val_loss"]
    assert whole.metrics["weights_epoch"] == losses.argmin() + 1
    assert whole.metrics["validation"]["loss"] == pytest.approx(losses.min(), rel=1e-2)


TINY = {"model": "airbench", "augmentation": "crop_flip", "precision": "float32"}


def test_the_button_stops_after_the_epoch_and_the_same_cell_continues(
    synthetic, tmp_path, monkeypatch, capsys
):
    recipe = recipes.get("seed", **SMALL | TINY)
    folder = tmp_path / "stopped"

    def cell(clicked: bool) -> runs.Run:
        explorer = explorers.Training(recipe, folder, synthetic.title)
        shown.append(explorer)
        with explorer as watcher:
            if clicked:
                # As a person would: while the second step runs.
                step_ended = watcher.step_ended
                watcher.step_ended = lambda epoch, step, steps: (
                    explorer.button.click() if step == 1 else step_ended(epoch, step, steps)
                )
            return training.train(recipe, folder, dataset=synthetic, watcher=watcher)

    shown: list[explorers.Training] = []
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/04_train.ipynb")
    for done in (1, 2):
        message = f"Stopped after epoch {done} of 3. Run this cell again to continue."
        with pytest.raises(explorers.StoppedError) as stopped:
            cell(clicked=True)
        # What IPython shows in place of a traceback.
        assert stopped.value._render_traceback_() == [message]
        assert shown[-1].button.disabled
        assert shown[-1].button.description == "Stopping after this epoch"
        assert bytes(shown[-1].picture.value).startswith(b"\x89PNG")
        assert runs.load(folder).state == "interrupted"
        assert epochs_stored(folder) == done
    # Clicked within the last epoch, it has nothing left to stop.
    run = cell(clicked=True)
    assert shown[-1].text.value == "Trained for 3 of 3 epochs."
    assert run.metrics["stopped"] is None
    printed = capsys.readouterr().out
    assert printed.count("Continuing") == 2 and "step/s" not in printed

    monkeypatch.delenv("JPY_SESSION_NAME")
    assert_same(run, training.train(recipe, tmp_path / "whole", dataset=synthetic))


AVERAGED = {
    "model": "airbench",
    "optimizer": "muon",
    "filter_learning_rate": 0.1,
    "learning_rate": 0.5,
    "precision": "float32",
    "batch_size": 12,
    "image_sizes": (12, 12, 14),
    "mixing": "cutmix",
}


@pytest.mark.parametrize("protocol", ["holdout", "final"])
def test_the_averaged_weights_are_validated_and_kept(protocol, synthetic, tmp_path):
    recipe = recipes.get("seed", **SMALL | AVERAGED, protocol=protocol, weight_averaging=0.6)
    run = training.train(recipe, tmp_path / "run", dataset=synthetic)
    # The same by hand, without callbacks and with Keras' average left out.
    train = data.make_splits(synthetic, **recipe.split_choices).train
    plain = recipe.replace(weight_averaging=0.0)
    _, model = training.untrained(plain, train)
    average = None
    for epoch in range(recipe.epochs):
        batches = training.training_batches(plain, train, recipe.image_size(epoch))
        batches.epoch = epoch
        for number in range(len(batches)):
            model.train_on_batch(*batches[number])
            weights = [variable.numpy() for variable in model.trainable_variables]
            average = [0.6 * a + 0.4 * w for a, w in zip(average or weights, weights, strict=True)]
    found = [variable.numpy() for variable in run.load_model().trainable_variables]
    for ours, expected in zip(found, average, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    distance = max(np.abs(a - w).max() for a, w in zip(average, weights, strict=True))
    assert distance > 1e-2, "the last weights are others"
    if protocol == "holdout":
        assert run.metrics["validation"]["loss"] == pytest.approx(
            run.history["val_loss"].iloc[-1], rel=1e-4
        )


def test_early_stopping_goes_back_to_the_best_weights(undisturbed):
    run, _ = undisturbed["shift_flip"]
    history = run.history
    best = history["val_loss"].argmin()
    assert len(history) == best + 1 + run.recipe.early_stopping_patience < run.recipe.epochs
    assert run.metrics["weights_epoch"] == best + 1
    assert run.metrics["epochs_run"] == len(history)
    assert run.metrics["validation"]["loss"] == pytest.approx(history["val_loss"].min(), rel=1e-3)


def test_a_person_who_interrupts_is_told_how_to_continue(disturbed):
    for name in ("seed", "seed_layers"):
        assert "give the same command to continue" in disturbed[name].result().printed[-1]
        assert "Traceback" not in disturbed[name].result().printed[-1]


def test_a_terminal_shows_one_updating_line(disturbed):
    printed = disturbed["seed"].result().printed[-1]
    lines = [line for line in printed.split("\n") if "step" in line]
    assert len(lines) == 1, printed
    assert "epoch 2/3" in lines[0] and "val_accuracy" in lines[0]
    assert lines[0].count("\r") > 2


def test_a_log_has_one_line_an_epoch(disturbed, undisturbed):
    lines = undisturbed["seed"][1].splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert line.startswith(f"epoch {number}/3 ")
        assert "val_accuracy" in line and "left" in line and "\r" not in line
    killed = disturbed["seed"].result().printed[0].splitlines()
    assert len([line for line in killed if line.startswith("epoch 1/3 ")]) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_the_history_and_the_numbers_are_those_of_the_protocol(name, undisturbed, synthetic):
    run, _ = undisturbed[name]
    history, metrics, protocol = run.history, run.metrics, run.recipe.protocol
    validation = [] if protocol == "final" else ["val_accuracy", "val_loss"]
    times = ["train_seconds", "validation_seconds"]
    columns = ["epoch", "accuracy", "loss", *validation, "learning_rate", *times]
    assert list(history) == columns
    assert list(history["epoch"]) == list(range(1, len(history) + 1))
    assert (history["train_seconds"] > 0).all()

    assert metrics["parameters"] == 6_777_060
    assert metrics["train_images"] == 24
    assert metrics["epochs_run"] == len(history)
    assert metrics["stopped"] == (None if len(history) == run.recipe.epochs else "early stopping")
    assert ("validation" in metrics) == (protocol == "holdout")
    assert ("test_flip" in metrics) == (protocol == "final")
    if protocol == "final":
        assert metrics["best_epoch"] is None
    else:
        best = metrics["best_epoch"] - 1
        assert history["val_accuracy"][best] == history["val_accuracy"].max()
    last = {"accuracy": "val_accuracy", "loss": "val_loss"}
    validated_on = {"holdout": "validation", "deck": "test"}.get(protocol)
    if validated_on and not run.recipe.early_stopping_patience:
        for metric, column in last.items():
            # Keras' running mean is in float32.
            assert metrics[validated_on][metric] == pytest.approx(
                history[column].iloc[-1], rel=1e-3
            )

    splits = data.make_splits(synthetic, **run.recipe.split_choices)
    predictions = run.predictions()
    tested = ["validation", "test"] if protocol == "holdout" else ["test"]
    kinds = ("probabilities", "labels", "indices")
    assert set(predictions) == {f"{split}_{kind}" for split in tested for kind in kinds}
    for split in tested:
        probabilities, labels = (predictions[f"{split}_{kind}"] for kind in kinds[:2])
        assert probabilities.shape == (25, 100) and probabilities.dtype == np.float32
        assert metrics[split]["images"] == 25
        assert metrics[split]["accuracy"] == np.mean(probabilities.argmax(1) == labels)
        np.testing.assert_array_equal(labels, getattr(splits, split).fine_labels)
        np.testing.assert_array_equal(
            predictions[f"{split}_indices"], getattr(splits, split).indices
        )


def test_the_learning_rate_follows_the_schedule(undisturbed):
    rates = {name: run.history["learning_rate"] for name, (run, _) in undisturbed.items()}
    steps = 2 * np.arange(1, 4)
    np.testing.assert_allclose(
        rates["seed"], 1e-4 * (1 + np.cos(np.pi * steps / 6)) / 2, atol=1e-10
    )
    # As in the Keras of 2018: lr / (1 + decay * iterations).
    np.testing.assert_allclose(rates["none"], 1e-4 / (1 + 1e-6 * steps), rtol=1e-6)
    np.testing.assert_allclose(rates["seed_layers"], 1e-4, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_rises_to_its_highest_and_falls_to_zero(schedule):
    recipe = recipes.get("seed", schedule=schedule, warmup=0.25, learning_rate=0.1, epochs=4)
    model = models.build("airbench")
    training.compile_model(model, recipe, steps=10)
    rates = []
    for step in range(41):
        model.optimizer.iterations.assign(step)
        rates.append(float(model.optimizer.learning_rate))
    # As documented: a quarter of the 40 steps up, the others down.
    assert max(rates) == rates[10] == pytest.approx(0.1)
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert rates[40] == pytest.approx(0, abs=1e-8)
    middle = 0.05  # of either curve: half of the highest, half way down
    assert rates[25] == pytest.approx(middle, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_weight_decay_takes_from_kernels_alone(optimizer):
    filter_rate = {"filter_learning_rate": 1e-9} if optimizer == "muon" else {}
    choices = {"schedule": "constant", "learning_rate": 0.5, "optimizer": optimizer} | filter_rate
    model = models.build("airbench", num_classes=4)
    random = np.random.default_rng(0)
    before = [random.normal(size=variable.shape) for variable in model.trainable_variables]
    for variable, value in zip(model.trainable_variables, before, strict=True):
        variable.assign(value)
    # With no gradient, half of all that decays is left.
    training.compile_model(model, recipes.get("seed", weight_decay=1.0, **choices), steps=1)
    zeros = [np.zeros(variable.shape, "float32") for variable in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        if value.ndim == 4 and optimizer == "muon":  # it gives them a norm of its own
            share = value.shape[-1] ** 0.5 / np.linalg.norm(value)
        else:
            share = 1 if value.ndim == 1 else 0.5
        np.testing.assert_allclose(
            variable.numpy(), share * value, rtol=1e-5, err_msg=variable.path
        )


def test_the_environment_is_recorded(undisturbed, synthetic):
    precisions = {name: run.environment["precision"] for name, (run, _) in undisturbed.items()}
    assert precisions["seed"] == "float32" and precisions["none"] == LOWEST
    assert precisions["shift_flip"] in ("float32", "bfloat16"), "what 'auto' became"
    for run, _ in undisturbed.values():
        model = run.load_model()
        assert model.layers[0].compute_dtype == run.environment["precision"]
        with np.load(run.path / "weights.npz") as weights:
            assert {weights[name].dtype.name for name in weights.files} == {"float32"}
    environment = run.environment
    assert environment["backend"] == "tensorflow"
    assert environment["data"] == synthetic.digests
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["versions"]["keras"] == importlib.metadata.version("keras")
    assert environment["threads"] >= 1


def test_a_finished_run_is_not_trained_again(undisturbed, capsys):
    run, _ = undisturbed["seed"]
    before = {path: path.stat().st_mtime_ns for path in run.path.iterdir() if path.suffix}
    # Left by a process that was killed between its last steps.
    for left in ("checkpoint.npz", "stop"):
        (run.path / left).write_bytes(b"")
    began = time.process_time()
    assert main(command(run.recipe, run.path)[2:]) == 0
    assert time.process_time() - began < 2
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.path.iterdir() if path.suffix}
    assert not (run.path / "stop").exists()


def test_a_stop_file_ends_training_after_the_epoch(synthetic, tmp_path, capsys):
    recipe = make_recipe("none").replace(schedule="constant")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "stop").touch()
    stopped = training.train(recipe, tmp_path / "stopped", dataset=synthetic)
    assert "Stopped after epoch 1" in capsys.readouterr().out
    assert stopped.metrics["stopped"] == "stop file"
    assert stopped.metrics["epochs_run"] == stopped.metrics["weights_epoch"] == 1
    assert stopped.state == "finished"
    assert not (stopped.path / "stop").exists()
    # What it gives is what a recipe of that many epochs does.
    short = training.train(recipe.replace(epochs=1), tmp_path / "short", dataset=synthetic)
    assert short.metrics["stopped"] is None
    for kind in ("predictions.npz", "weights.npz"):
        ours, theirs = (runs.read_arrays(run.path / kind) for run in (stopped, short))
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_run_that_was_killed_after_it_was_stopped_ends_there(synthetic, tmp_path):
    recipe = make_recipe("none")
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    (folder / "stop").touch()
    with started(command(recipe, folder), log) as process:
        wait_for(process, lambda: epochs_stored(folder) == 1, log)
        process.kill()
    assert not (folder / "metrics.json").exists()
    (folder / "stop").unlink()  # it has done what it is for
    run = training.train(recipe, folder, dataset=synthetic)
    assert run.metrics["epochs_run"] == 1 and run.metrics["stopped"] == "stop file"


@pytest.fixture(scope="module")
def untested(synthetic, tmp_path_factory) -> runs.Run:
    """A run that leaves the test images alone, made by the notebook."""
    sizes = {"train_size": 64, "validation_size": 50, "test_size": 0, "epochs": 1}
    folder = tmp_path_factory.mktemp("untested")
    recipe = recipes.get("seed", dataset="synthetic", **sizes)
    return workflows.train(recipe, folder, folder / "figures")


def test_a_run_can_leave_the_test_images_alone(untested):
    assert "test" not in untested.metrics
    assert untested.metrics["validation"]["images"] == 50
    assert not [name for name in untested.predictions() if name.startswith("test")]
    shown = (untested.path / "notebook.ipynb").read_text()
    assert "50 validation images, the test images left alone." in shown
    assert "50 validation images correctly" in shown


def test_commands_on_a_run_that_was_not_tested(untested, capsys):
    place = ["--runs-dir", str(untested.path.parent)]
    assert main(command(untested.recipe, untested.path)[2:]) == 0
    accuracy = f"{untested.metrics['validation']['accuracy']:.2%}"
    printed = capsys.readouterr().out
    assert f"{untested.name}, validation images of synthetic" in printed and accuracy in printed

    assert main(["runs", *place]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == [untested.name, "finished", "1/1", "synthetic"]

    assert main(["evaluate", *place]) == 2
    error = capsys.readouterr().err
    assert f"{untested.name} has no test images" in error and "--split validation" in error
    assert main(["evaluate", "--split", "validation", *place]) == 0
    assert accuracy in capsys.readouterr().out

    assert main(["report", *place]) == 1
    assert "There is no finished and tested run in" in capsys.readouterr().err
    assert main(["report", untested.name, *place]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"RunError: {untested.name} was not tested: its test_size is 0")
    assert "Leave it out" in error


def test_another_data_set_than_the_recipes_is_refused(synthetic, tmp_path):
    recipe = make_recipe("none").replace(dataset="cifar100")
    with pytest.raises(runs.RunError, match="asks for the data set 'cifar100'; 'synthetic' was"):
        training.train(recipe, tmp_path / "run", dataset=synthetic)


def test_a_loss_that_is_not_finite_stops_the_run(synthetic, tmp_path, capsys):
    recipe = make_recipe("none").replace(learning_rate=1e20, batch_size=2)
    assert main(command(recipe, tmp_path / "run")[2:]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("TrainingError: The loss became")
    assert "learning_rate below 1e+20" in error
    assert ("precision 'float32'" in error) == (LOWEST == "bfloat16")
    run = runs.load(tmp_path / "run")
    assert run.state == "failed"
    failure = json.loads((run.path / "failure.json").read_text())
    assert failure["epoch"] == 1 and failure["error"] in error
    assert not (run.path / "checkpoint.npz").exists(), "nothing of it is kept"


# Learns quickly: four classes, no augmentation.
EASY = {
    "dataset": "synthetic",
    "classes": data.class_names("synthetic")[:4],
    "augmentation": "none",
    "optimizer": "adam",
    "precision": "float32",
    "batch_size": 16,
    "train_size": 240,
    "validation_size": 50,
    "test_size": 0,
}


@pytest.fixture(scope="module")
def ranged(synthetic) -> pd.DataFrame:
    recipe = recipes.get("seed", **EASY)
    return training.range_test(recipe, lowest=1e-6, highest=100, steps=60, dataset=synthetic)


def test_a_range_test_sees_the_loss_fall_and_then_diverge(ranged):
    steps = len(ranged)
    assert 15 < steps < 60, "more than one pass, and ended early"
    assert list(ranged) == ["step", "learning_rate", "loss", "smoothed"]
    assert list(ranged["step"]) == list(range(1, steps + 1))
    expected = 1e-6 * 10 ** (8 / 59 * np.arange(steps))
    np.testing.assert_allclose(ranged["learning_rate"], expected, rtol=1e-12)
    # With `adjust`, its default, pandas corrects for the start.
    mean = ranged["loss"].ewm(alpha=0.02).mean()
    np.testing.assert_allclose(ranged["smoothed"], mean, rtol=1e-9)
    smoothed = ranged["smoothed"].to_numpy()
    lowest = smoothed.argmin()
    assert smoothed[lowest] < 0.9 * smoothed[0]
    assert smoothed[-1] > 4 * smoothed[lowest] and (smoothed[:-1] <= 4 * smoothed[lowest]).all()
    rate = training.suggested_rate(ranged)
    assert 1e-5 < rate < ranged["learning_rate"][lowest]


def test_a_range_test_gives_the_loss_of_each_batch(ranged, synthetic):
    import keras
    import tensorflow as tf

    recipe = recipes.get("seed", **EASY)
    model = models.build("seed", seed=recipe.seed)
    optimizer = keras.optimizers.Adam()
    split = data.make_splits(synthetic, **recipe.split_choices).train
    batches = augmentation.Batches(split, recipe.batch_size, seed=recipe.seed, shuffle=True)
    for number in range(4):
        optimizer.learning_rate = ranged["learning_rate"][number]
        images, labels = batches[number]
        with tf.GradientTape() as tape:
            probabilities = model(images, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        assert ranged["loss"][number] == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"lowest": 0.0}, "from 0 to 1; lowest must be above 0"),
        ({"lowest": 0.1, "highest": 0.01}, "from 0.1 to 0.01; .* highest above lowest"),
        ({"lowest": float("nan")}, "from nan to 1"),
        ({"highest": float("inf")}, "from 1e-06 to inf; .* finite"),
        ({"steps": 1}, "steps is 1; .* needs 2 or more"),
    ],
    ids=str,
)
def test_impossible_bounds_are_refused_before_data_is_loaded(
    bounds, message, tmp_path, monkeypatch
):
    monkeypatch.setenv("CIFAR100_DIR", str(tmp_path))  # nothing is there
    with pytest.raises(recipes.RecipeError, match=message):
        training.range_test(recipes.get("seed"), **bounds)


def range_table(losses: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"learning_rate": np.geomspace(1e-6, 1, len(losses)), "loss": losses})


@pytest.mark.parametrize("steepest", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("end", [0.0, 1e6, np.inf, np.nan])
def test_the_suggestion_is_the_rate_of_the_steepest_descent(steepest, end):
    rates = np.geomspace(1e-6, 1, 300)
    # A logistic curve over the logarithm of the rate; then it diverges.
    losses = 4.6 - 2 / (1 + (rates / steepest) ** -2)
    losses[290:] += end
    table = range_table(losses)
    step = rates[1] / rates[0]
    assert 1 / step < training.suggested_rate(table) / steepest < step
    noise = np.random.default_rng(0).normal(0, 0.05, 300)
    assert 1 / 2 < training.suggested_rate(range_table(losses + noise)) / steepest < 2


@pytest.mark.parametrize("steps", [15, 300])
@pytest.mark.parametrize("rise", [0.0, 3.0])
def test_no_rate_is_suggested_where_the_loss_never_fell(rise, steps):
    noise = np.random.default_rng(0).normal(0, 0.05, steps)
    table = range_table(4.6 + noise + rise * np.linspace(0, 1, steps) ** 2)
    with pytest.raises(training.TrainingError, match=r"never fell .* 1e-06 and 1\. .* more steps"):
        training.suggested_rate(table)
    with pytest.raises(training.TrainingError, match=r"9 finite losses .* Try more steps"):
        training.suggested_rate(range_table(np.append(np.linspace(4, 3, 9), np.nan)))


def test_the_command_line_writes_a_range_test(synthetic, tmp_path, capsys):
    choices = command(recipes.get("seed", **EASY), tmp_path / "unused")[4:-4]
    range_test = ["range-test", "seed", *choices, "--runs-dir", str(tmp_path), "--steps", "15"]
    path = tmp_path / "range_tests" / f"{recipes.get('seed', **EASY).run_name}.csv"

    assert main([*range_test, "--lowest", "1e-5", "--highest", "1e-3"]) == 0
    printed = capsys.readouterr().out.splitlines()
    table = pd.read_csv(path)
    assert list(table["learning_rate"].iloc[[0, -1]]) == pytest.approx([1e-5, 1e-3])
    rate = f"{training.suggested_rate(table):.3g}"
    assert printed == [f"suggested learning rate  {rate}", str(path), str(path.with_suffix(".png"))]
    before = path.with_suffix(".png").read_bytes()
    assert before.startswith(b"\x89PNG")

    # Where no rate can be suggested, the curve is still drawn.
    assert main([*range_test, "--lowest", "1e-9", "--highest", "1e-8"]) == 1
    assert "TrainingError: The loss never fell" in capsys.readouterr().err
    assert path.with_suffix(".png").read_bytes() != before

    assert main([*range_test, "--lowest", "1", "--highest", "0.1"]) == 2
    assert "from 1 to 0.1" in capsys.readouterr().err


ON_A_BACKEND = """
import sys
from pathlib import Path
from cifar_lib import training
from cifar_lib.recipes import Recipe

recipe = Recipe.from_json(sys.argv[1])
for folder in sys.argv[2:]:
    training.train(recipe, Path(folder))
"""


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_another_backend_trains_and_resumes(name, synthetic, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    environment = os.environ | {
        "KERAS_BACKEND": name,
        # What the first process compiles need not be compiled again.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    # JAX takes no numbers that need more than 32 bits; a seed may. Batches of one size are compiled
    # once.
    recipe = make_recipe("seed").replace(seed=2**40, batch_size=12)
    killed, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    with started(command(recipe, killed), log, env=environment) as process:
        wait_for(process, lambda: epochs_stored(killed) == 1, log)
        process.kill()
    assert runs.load(killed).state == "interrupted"
    arguments = ["-c", ON_A_BACKEND, recipe.to_json(), str(killed), str(whole)]
    with started(arguments, log, env=environment) as process:
        assert process.wait(timeout=600) == 0, log.read_text()
    assert_same(runs.load(killed), runs.load(whole))
    run = runs.load(whole)
    assert run.environment["backend"] == name
    assert list(run.history["epoch"]) == [1, 2, 3]
    # Another backend's weights are this one's, too.
    from cifar_lib import evaluation

    images = data.make_splits(synthetic, **recipe.split_choices).test.images
    probabilities = evaluation.predict(run.load_model(), images)
    np.testing.assert_allclose(probabilities, run.predictions()["test_probabilities"], atol=1e-4)


def test_the_recipe_for_gpus_runs_on_a_cpu_too(synthetic, tmp_path):
    small = {"train_size": 4, "test_size": 2, "batch_size": 2, "epochs": 1}
    recipe = recipes.get(
        "best", dataset="synthetic", classes=data.class_names("synthetic")[:2], **small
    )
    run = training.train(recipe, tmp_path / "run", dataset=synthetic)
    assert run.metrics["parameters"] == pytest.approx(36.5e6, rel=0.002)
    assert run.metrics["test_flip"]["images"] == 2
