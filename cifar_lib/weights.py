"""Published networks: what `weights/` holds, checked, loaded and exported from finished runs.

index.json   of each network, the best first: file, digest, size, data set, test accuracy, recipe
NAME.npz     its weights as float16, in the order of `model.weights`
NAME.md      its model card

They are plain files in git, without Git LFS, and compute in float32: what they answer does not
depend on the machine that trained them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cifar_lib import ROOT, data, evaluation, recipes, reports, runs
from cifar_lib.reports import percent

if TYPE_CHECKING:
    import keras

FOLDER = ROOT / "weights"
PRECISION = "float32"
#: Bytes of all that a folder of published networks may hold: everyone who clones pays for it.
MOST_BYTES = 20_000_000

PROTOCOLS = {
    "holdout": "A part of the training images was held out for validation; the test images had no "
    "part in training.",
    "final": "All training images were trained on; the test images had no part in training.",
    "deck": "The test images validated it after every epoch: its test accuracy is optimistic.",
}


class WeightsError(runs.RunError):
    """A network cannot be published, or a published one is missing or is not what it should be."""


@dataclass(frozen=True)
class Published:
    """A published network, ready to use.

    Attributes:
        name: as in the index.
        recipe: every choice of its training.
        model: the network in float32; `evaluation.predict` gives it pictures.
    """

    name: str
    recipe: recipes.Recipe
    model: keras.Model


def index(folder: Path = FOLDER) -> dict[str, dict]:
    """What is published, by name, the best first; empty if nothing is.

    Each has `file`, `sha256`, `bytes`, `dataset` (its title), `test_accuracy` (0..1, of the file)
    and `recipe` (a dict).

    Raises:
        WeightsError: the index is no JSON.
    """
    path = folder / "index.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: {error}. {_get_back(path)}") from error


def load(name: str | None = None, folder: Path = FOLDER) -> Published:
    """A published network, by default the best; loading runs no stored code and needs no data.

    Raises:
        WeightsError: there is no such network, or its file is not the one that was published.
        RunError: the file holds something else than plain arrays, or another network's.
    """
    published = index(folder)
    if not published:
        raise WeightsError(
            f"{folder} holds no published network. Use a run, or get what was deleted back: git "
            f"checkout -- {folder}"
        )
    name = name or next(iter(published))
    if name not in published:
        raise WeightsError(recipes.unknown("published network", name, published))
    entry = published[name]
    path = folder / entry["file"]
    found = _digest(path.read_bytes()) if path.exists() else "no file"
    if found != entry["sha256"]:
        raise WeightsError(
            f"{path} is not what was published: its SHA-256 should be {entry['sha256']}; there is "
            f"{found}. {_get_back(path)}"
        )
    recipe = recipes.Recipe.from_json(json.dumps(entry["recipe"]))
    return Published(name, recipe, runs.network(recipe, PRECISION, runs.read_arrays(path), path))


def export(
    run: runs.Run, name: str, folder: Path = FOLDER, *, dataset: data.Dataset | None = None
) -> None:
    """Publish a finished and tested run's network, with its card; what is the same stays as it is.

    The weights are tested as they are published, in half precision, on the run's test images.

    Args:
        run: trained on all classes of CIFAR-100.
        name: that of its files, as "seed".
        folder: of the published networks; it is made if it is not there.
        dataset: what `data.load("cifar100")` gives, if it is at hand.

    Raises:
        WeightsError: the run is of other data, a weight is beyond float16, or the folder would
            become too large. Nothing was written.
        RunError: the run is not finished or not tested.
        DataError: the data set is not there or is not what it should be.
    """
    run.require_test()
    recipe = run.recipe
    if recipe.dataset != "cifar100" or recipe.classes:
        raise WeightsError(
            f"{run.name} is of the data set {recipe.dataset!r} and the classes "
            f"{recipe.classes or 'all'}; only networks for all of CIFAR-100 are published."
        )
    trained = run.weights()
    with np.errstate(over="ignore"):
        arrays = {key: array.astype(np.float16) for key, array in trained.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise WeightsError(
            f"{run.name} has weights that are not finite or beyond {np.finfo(np.float16).max}, the "
            "largest number in half precision: it cannot be published."
        )
    content = runs.npz(arrays)
    path = folder / f"{name}.npz"
    others = [file for file in folder.glob("*") if file.stem != name]
    size = len(content) + sum(file.stat().st_size for file in others)
    if size > MOST_BYTES:
        raise WeightsError(
            f"{path} would make {folder} {size:,} bytes large ({len(content):,} of its own); at "
            f"most {MOST_BYTES:,} are published. Publish a smaller network, or fewer."
        )
    dataset = dataset or data.load(recipe.dataset)
    test = data.make_splits(dataset, **recipe.split_choices).test
    model = runs.network(recipe, PRECISION, arrays, path)

    def measured(probabilities: np.ndarray) -> dict[str, float]:
        return evaluation.evaluate(probabilities, test.fine_labels, dataset.superclass_of)

    probabilities = evaluation.predict(model, test.images)
    of_file = measured(probabilities)
    averaged = evaluation.average_with_mirrored(model, test.images, probabilities)
    # Runs of other protocols than "final" are tested without mirror images.
    flipped = run.metrics.get("test_flip") or measured(
        evaluation.predict(run.load_model(), test.images, flip=True)
    )
    superclasses = evaluation.per_superclass(
        probabilities, test.fine_labels, dataset.coarse_names, dataset.superclass_of
    )
    published = index(folder) | {
        name: {
            "file": path.name,
            "sha256": _digest(content),
            "bytes": len(content),
            "dataset": dataset.title,
            "test_accuracy": of_file["accuracy"],
            "recipe": dataclasses.asdict(recipe),
        }
    }
    best_first = sorted(published.items(), key=lambda item: -item[1]["test_accuracy"])
    plain = _numbers(of_file, run.metrics["test"])
    card = _card(run, name, plain, _numbers(measured(averaged), flipped), superclasses)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, content)
    _write(path.with_suffix(".md"), card.encode())
    # The last: whatever happens before, nothing is in the index that is not there whole.
    _write(folder / "index.json", (json.dumps(dict(best_first), indent=2) + "\n").encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _get_back(path: Path) -> str:
    return f"Get it back as it was published: git checkout -- {path}"


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        runs.write_atomically(path, content)


def _numbers(of_file: dict[str, float], of_run: dict[str, float]) -> str:
    """A card's table of what `evaluation.evaluate` gives for the file and for the run."""

    def column(numbers: dict[str, float]) -> dict[str, str]:
        shares = {name: percent(value) for name, value in numbers.items()}
        return {
            "test images": f"{numbers['images']:,}",
            "accuracy": shares["accuracy"],
            "95 % interval": f"{shares['accuracy_low']} to {shares['accuracy_high']}",
            "top-5 accuracy": shares["top5_accuracy"],
            "superclass accuracy": shares["superclass_accuracy"],
            "expected calibration error": shares["expected_calibration_error"],
            "loss": f"{numbers['loss']:.4f}",
        }

    table = pd.DataFrame({"this file": column(of_file), "the run": column(of_run)})
    return reports.markdown_table(table.rename_axis("measure").reset_index())


def _card(run: runs.Run, name: str, plain: str, flipped: str, superclasses: pd.DataFrame) -> str:
    """The model card in Markdown, from two tables of `_numbers` and one of `per_superclass`."""
    metrics, environment, recipe = run.metrics, run.environment, run.recipe
    versions, backend = environment["versions"], environment["backend"]
    return f"""\
# {name}

A convolutional network (`{recipe.model}`, {metrics["parameters"]:,} parameters) that names the
class of a picture, one of the 100 of CIFAR-100. `{name}.npz` holds its weights in half precision
(float16).

## Use

```bash
python -m cifar_lib predict cat.jpg --weights {name}
```

```python
from cifar_lib import data, evaluation, weights

network = weights.load("{name}")
picture = data.read_image("cat.jpg")
[probabilities] = evaluation.predict(network.model, picture[None])
print(data.class_names("cifar100")[probabilities.argmax()])
```

## How good it is

On CIFAR-100's test images. "This file" is what is published: weights in half precision, arithmetic
in {PRECISION}. "The run" is what was trained: weights in float32, arithmetic in
{environment["precision"]}.

{plain}

The same where the probabilities of each picture are averaged with those of its mirror image, which
takes twice the time:

{flipped}

By superclass, this file without averaging, as shares from 0 to 1: `accuracy` is that of images
whose class is right; `precision`, `recall` and `f1` are of the superclass:

{reports.markdown_table(superclasses)}

`python -m cifar_lib evaluate --weights {name}` gives the first table's "this file" again, with
`--flip` the second's.

## Data

CIFAR-100: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009. It comes
without an explicit licence. Its pictures are from the Tiny Images collection, which its authors
withdrew in 2020 because of offensive labels and pictures.

{metrics["train_images"]:,} images trained it, by the protocol `{recipe.protocol}`.
{PROTOCOLS[recipe.protocol]}

## Training

{metrics["epochs_run"]} epochs with the seed {recipe.seed}, in {metrics["train_seconds"] / 60:,.0f}
minutes, on the {environment["device"]} of a machine with {environment["threads"]} threads
({environment["processor"] or environment["platform"]}), with Keras {versions["keras"]} on
{backend} {versions[backend]}, commit `{environment["commit"]}`. The recipe:

```json
{recipe.to_json()}```

## Limits

- It knows pictures of 32 x 32 pixels, as CIFAR-100's, and nothing but its 100 classes: whatever the
  picture shows, it answers one of them.
- Its probabilities rank the classes, but are not chances: the expected calibration error says how
  far its confidence is from the share of right answers, on average.
- It was trained and tested on a single data set, whose pictures were collected from the web by
  search words; its biases, in what is shown and how it is named, are the network's.
- Some classes are people (baby, boy, girl, man, woman). It is not for decisions about people.

## Licence

The weights are under the repository's [licence](../LICENSE).
"""
