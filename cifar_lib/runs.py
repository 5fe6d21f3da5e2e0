"""The run folder: what is in it, written atomically, read back.

recipe.json        every choice
history.csv        one row an epoch
metrics.json       final numbers; a run that has it is finished
predictions.npz    probabilities of the test and validation images that the recipe has
weights.npz        the network's weights
environment.json   versions, backend, device, threads, precision, commit, data digests
notebook.ipynb     the executed notebook, when papermill made the run
failure.json       why it failed, if it did
checkpoint.npz     the last finished epoch, while the run is not finished
stop               put there by whoever wants training to end after the epoch that runs; removed
                   when the run has finished
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import pandas as pd

from cifar_lib.recipes import Recipe

if TYPE_CHECKING:
    import keras


# The end of the name of a file that is being written.
PARTIAL = ".partial"
# What the system says when a disk, a quota or a limit is full.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunError(Exception):
    """A run folder cannot be used as asked, or a run failed."""


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not; files are read when they are asked for.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @property
    def state(self) -> str:
        """One of "finished", "failed", "running" (a process has it open) and "interrupted"."""
        if self.finished:
            return "finished"
        if (self.path / "failure.json").exists():
            return "failed"
        lock = filelock.FileLock(self.path / ".lock")
        try:
            with lock.acquire(blocking=False):
                return "interrupted"
        except filelock.Timeout:
            return "running"
        except OSError:  # a folder that cannot be written
            return "interrupted"

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self._text("recipe.json"))

    @property
    def label(self) -> str:
        """Its recipe and length in words, as "fast in float32, 4 epochs"; seeds share it."""
        return f"{self.recipe.label}, {len(self.history)} epochs"

    @property
    def tested(self) -> bool:
        """Whether its recipe has test images."""
        return self.recipe.test_size != 0

    def require_test(self) -> None:
        """Raise RunError if the run has no test results."""
        if not self.tested:
            raise RunError(
                f"{self.name} was not tested: its test_size is 0, and this is about the test "
                "images. Leave it out, or train its recipe with another test_size."
            )

    @property
    def history(self) -> pd.DataFrame:
        """One row an epoch.

        Columns: epoch (from 1), loss, accuracy, val_loss and val_accuracy (not with the protocol
        "final"), learning_rate (at the epoch's end), train_seconds, validation_seconds.
        """
        text = self._text("history.csv")
        return pd.read_csv(io.StringIO(text))

    @cached_property
    def metrics(self) -> dict:
        """Final numbers: "test" and "validation" are what `evaluation.evaluate` gives.

        "test" is missing if the recipe's `test_size` is 0; "test_flip", of the protocol "final"
        alone, averages with the mirror images. "setup_seconds" (data, building, compiling),
        "train_seconds" (all steps, the compilation for every image size included) and
        "evaluation_seconds" (one view of every image) leave out imports. "stopped" is None if all
        epochs were run, else what ended training: "early stopping" or "stop file".
        """
        return json.loads(self._text("metrics.json"))

    @cached_property
    def environment(self) -> dict:
        return json.loads(self._text("environment.json"))

    def predictions(self) -> dict[str, np.ndarray]:
        """Arrays by name: test_probabilities (N, 100) float32, test_labels (N,) int64, test_indices
        (N,) int64, positions in the official test file; the same for validation where there is one.
        """
        return read_arrays(self._file("predictions.npz"))

    def load_model(self) -> keras.Model:
        """The trained network, built by name and given its weights; loading runs no stored code."""
        path = self.path / "weights.npz"
        return network(self.recipe, self.environment["precision"], self.weights(), path)

    def weights(self) -> dict[str, np.ndarray]:
        """The trained network's weights, float32, by their place in `model.weights`."""
        return read_arrays(self._file("weights.npz"))

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.exists():
            raise RunError(f"{path} is not there: the run is {self.state}. Run its recipe again.")
        return path

    def _text(self, name: str) -> str:
        return self._file(name).read_text(encoding="utf-8")


def load(path: Path | str) -> Run:
    """The run in a folder.

    Raises:
        RunError: there is no run.
    """
    path = Path(path)
    if not (path / "recipe.json").exists():
        known = ", ".join(run.name for run in find(path.parent)) or "none"
        raise RunError(f"{path} holds no run. Runs in {path.parent}: {known}.")
    return Run(path)


def find(runs_dir: Path | str) -> list[Run]:
    """All runs of a folder, the newest last."""
    recipes = Path(runs_dir).glob("*/recipe.json")
    return [Run(path.parent) for path in sorted(recipes, key=lambda path: path.stat().st_mtime)]


def finished(runs_dir: Path | str, names: Sequence[str] = (), *, tested: bool = False) -> list[Run]:
    """The named runs, or without names the newest finished one.

    Args:
        runs_dir: the folder of the run folders.
        names: of the runs.
        tested: only runs that were tested on test images will do.

    Raises:
        RunError: there is none, or a named one is missing, not finished, or not tested.
    """
    if not names:
        found = [run for run in find(runs_dir) if run.finished]
        newest = [run for run in found if run.tested or not tested][-1:]
        if not newest:
            wanted = "finished and tested" if tested else "finished"
            raise RunError(
                f"There is no {wanted} run in {runs_dir}. Make one: python -m cifar_lib train quick"
            )
        return newest
    named = [load(Path(runs_dir) / name) for name in names]
    for run in named:
        if not run.finished:
            raise RunError(f"{run.path} is {run.state}, not finished. Run its recipe again.")
        if tested:
            run.require_test()
    return named


def labels(shown: Sequence[Run]) -> list[str]:
    """What tells runs apart, as short as it can be: their labels, or else their names."""
    found = [run.label for run in shown]
    return found if len(set(found)) == len(found) else [run.name for run in shown]


@contextlib.contextmanager
def opened(path: Path, recipe: Recipe) -> Iterator[Run]:
    """Make or continue the run of `recipe` in a folder, which no other process may have open.

    Raises:
        RunError: another process trains there, or the folder holds the run of another recipe.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise RunError(
            f"Another process is training in {path}. Wait for it, or give this run another name."
        ) from None
    try:
        for partial in path.glob(f".*{PARTIAL}"):
            partial.unlink()
        run = Run(path)
        if not (path / "recipe.json").exists():
            write_atomically(path / "recipe.json", recipe.to_json().encode())
        elif run.recipe != recipe:
            there, here = dataclasses.asdict(run.recipe), dataclasses.asdict(recipe)
            differences = ", ".join(
                f"{field} is {there[field]!r} there and {here[field]!r} here"
                for field in there
                if there[field] != here[field]
            )
            raise RunError(
                f"{path} holds the run of another recipe: {differences}. Give this run another "
                "name, or delete that folder."
            )
        yield run
    finally:
        lock.release()


def write_atomically(
    path: Path, data: bytes, *, owner: str = "", check: Callable[[], None] | None = None
) -> None:
    """Write a file whole or not at all: whatever happens, `path` holds its old content or `data`.

    Args:
        path: the file.
        data: its new content.
        owner: of the partial file, where several processes might write one.
        check: called right before the file is replaced; if it raises, `path` is as it was.

    Raises:
        RunError: the disk is full; `path` is as it was.
    """
    # Without an owner a fixed name: what a killed process left is written over, and `opened`
    # sweeps it up.
    partial = path.with_name(f".{path.name}{owner}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if check:
            check()
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            kept = "is as it was" if path.exists() else "was not written"
            raise RunError(
                f"No space for {path} ({len(data):,} bytes): {error.strerror}. The file {kept}; "
                "free some space and run the same again to continue."
            ) from error
        raise


def write_json(path: Path, content: object) -> None:
    write_atomically(path, as_json(content))


def as_json(content: object) -> bytes:
    """The content of a file that people read, too."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an uncompressed .npz whole or not at all."""
    write_atomically(path, npz(arrays))


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of an uncompressed .npz, the same for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a .npz; nothing in it is run.

    Raises:
        RunError: it holds something else than plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} is no file of plain arrays: {error}") from error


def network(
    recipe: Recipe, precision: str, arrays: Mapping[str, np.ndarray], source: Path
) -> keras.Model:
    """The network of a recipe, computing in `precision`, with the weights in the order of `arrays`.

    Raises:
        RunError: the weights, which `source` holds, are another network's.
    """
    from cifar_lib import models

    model = models.build_for(recipe, precision)
    assign(model.weights, list(arrays.values()), source)
    return model


def assign(variables: list[keras.Variable], arrays: list[np.ndarray], source: Path) -> None:
    """Give variables their values.

    Raises:
        RunError: number or shapes differ; no variable was changed.
    """
    wanted = [tuple(variable.shape) for variable in variables]
    found = [array.shape for array in arrays]
    if wanted != found:
        raise RunError(
            f"{source} is not of this network: it holds arrays of shapes {found}, not {wanted}."
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
