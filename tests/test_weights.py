"""Published networks: exported from one small run on the stand-in, which passes for CIFAR-100."""

import dataclasses
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_lib import ROOT, data, evaluation, recipes, reports, runs, weights, workflows
from cifar_lib.__main__ import main

MEGABYTE = 1_000_000
RECIPE = recipes.get("quick", train_size=64, validation_size=50, test_size=100, epochs=1)
PUBLISHED = list(weights.index()) or [
    pytest.param("", marks=pytest.mark.skip(reason="weights/ holds no published network yet"))
]


@pytest.fixture(scope="module")
def dataset(synthetic) -> data.Dataset:
    return dataclasses.replace(synthetic, name="cifar100")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory) -> runs.Run:
    from cifar_lib import training

    return training.train(RECIPE, tmp_path_factory.mktemp("runs") / "run", dataset=dataset)


@pytest.fixture(scope="module")
def exported(run, dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "weights"
    weights.export(run, "tiny", folder, dataset=dataset)
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy to do harm to."""
    return shutil.copytree(exported, tmp_path / "weights")


@pytest.fixture
def picture(dataset, tmp_path) -> Path:
    path = tmp_path / "cat.jpg"
    Image.fromarray(dataset.test.images[0]).resize((80, 64)).save(path)
    return path


def test_a_network_comes_back_in_half_precision(run, exported):
    network = weights.load("tiny", exported)
    assert (network.name, network.recipe) == ("tiny", RECIPE)
    for found, trained in zip(
        network.model.get_weights(), run.load_model().get_weights(), strict=True
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, trained.astype(np.float16))
    content = (exported / "tiny.npz").read_bytes()
    [entry] = weights.index(exported).values()
    assert entry["bytes"] == len(content) < 1.01 * 2 * run.metrics["parameters"]
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(path.name for path in exported.iterdir()) == ["index.json", "tiny.md", "tiny.npz"]


def table_of(text: str, header: str) -> list[list[str]]:
    """The cells of the tables with a header, row by row."""
    tables = re.findall(rf"^\| {re.escape(header)}.*\n\| -.*\n((?:\|.*\n)+)", text, re.M)
    return [[[c.strip() for c in line[1:-1].split("|")] for line in t.splitlines()] for t in tables]


def test_the_card_says_what_testing_the_file_gives(run, exported, dataset):
    card = (exported / "tiny.md").read_text("utf-8")
    test = data.make_splits(dataset, **RECIPE.split_choices).test
    published = weights.load("tiny", exported).model
    shown = table_of(card, "measure")
    assert len(shown) == 2
    for table, flip in zip(shown, (False, True), strict=True):
        rows = {row[0]: row[1:] for row in table}
        for column, model in enumerate((published, run.load_model())):
            probabilities = evaluation.predict(model, test.images, flip=flip)
            found = evaluation.evaluate(probabilities, test.fine_labels, dataset.superclass_of)
            assert rows["test images"][column] == "100"
            assert rows["loss"][column] == f"{found['loss']:.4f}"
            for row, *names in (
                ("accuracy", "accuracy"),
                ("95 % interval", "accuracy_low", "accuracy_high"),
                ("top-5 accuracy", "top5_accuracy"),
                ("superclass accuracy", "superclass_accuracy"),
                ("expected calibration error", "expected_calibration_error"),
            ):
                wanted = " to ".join(f"{100 * found[name]:.2f} %" for name in names)
                assert rows[row][column] == wanted, (row, column, flip)
    probabilities = evaluation.predict(published, test.images)
    right = probabilities.argmax(axis=1) == test.fine_labels
    [superclasses] = table_of(card, "superclass")
    assert [row[0] for row in superclasses] == list(dataset.coarse_names)
    for number, row in enumerate(superclasses):
        here = test.coarse_labels == number
        assert row[1:3] == [str(here.sum()), f"{right[here].mean():.4f}"]


def test_the_card_of_a_run_that_saw_mirror_images_has_its_numbers(run, dataset, tmp_path):
    tested = runs.Run(shutil.copytree(run.path, tmp_path / "run"))
    flipped = run.metrics["test"] | {"loss": 1.2345}
    runs.write_json(tested.path / "metrics.json", run.metrics | {"test_flip": flipped})
    weights.export(tested, "tiny", tmp_path / "weights", dataset=dataset)
    _, table = table_of((tmp_path / "weights" / "tiny.md").read_text("utf-8"), "measure")
    [loss] = [row for row in table if row[0] == "loss"]
    assert loss[1] != loss[2] == "1.2345"


def test_the_card_tells_the_recipe_the_data_and_the_limits(run, exported):
    card = (exported / "tiny.md").read_text("utf-8")
    [recipe] = re.findall(r"```json\n(.+?)```", card, re.S)
    assert recipes.Recipe.from_json(recipe) == RECIPE
    words = " ".join(card.split())
    assert "by the protocol `holdout`. A part of the training images was held out" in words
    assert f"{run.metrics['parameters']:,} parameters" in words
    assert f"commit `{run.environment['commit']}`" in words
    for said in (
        "without an explicit licence",
        "withdrew in 2020",
        "not for decisions about people",
    ):
        assert said in words
    assert (ROOT / "weights" / "../LICENSE").resolve() == ROOT / "LICENSE"
    assert "](../LICENSE)" in card


def test_the_card_s_lines_of_python_run(exported, picture, monkeypatch, capsys):
    card = (exported / "tiny.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(.+?)```", card, re.S)
    monkeypatch.chdir(picture.parent)
    exec(code.replace('load("tiny")', 'load("tiny", folder)'), {"folder": exported})
    assert capsys.readouterr().out.strip() in data.class_names("cifar100")


def test_what_is_the_same_is_not_written_again(run, folder, dataset):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    weights.export(run, "tiny", folder, dataset=dataset)
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before}
    (folder / "tiny.md").write_text("edited")
    weights.export(run, "tiny", folder, dataset=dataset)
    assert (folder / "tiny.md").read_bytes() == before[folder / "tiny.md"][1]


def test_the_best_is_the_first_and_the_default(run, folder, dataset):
    [entry] = weights.index(folder).values()
    others = {"poor": entry | {"test_accuracy": 0.0}, "good": entry | {"test_accuracy": 1.0}}
    runs.write_json(folder / "index.json", others)
    weights.export(run, "tiny", folder, dataset=dataset)
    assert list(weights.index(folder)) == ["good", "tiny", "poor"]
    assert weights.load(folder=folder).name == "good"


@pytest.mark.parametrize("harm", ["changed", "cut", "deleted"])
def test_a_file_that_is_not_the_published_one_is_refused(folder, harm):
    path = folder / "tiny.npz"
    content = path.read_bytes()
    bad = {"changed": content[:5000] + b"!" + content[5001:], "cut": content[:-1]}.get(harm)
    path.unlink()
    found = "no file"
    if bad:
        path.write_bytes(bad)
        found = hashlib.sha256(bad).hexdigest()
    with pytest.raises(weights.WeightsError) as caught:
        weights.load("tiny", folder)
    expected = hashlib.sha256(content).hexdigest()
    for said in (str(path), expected, found, f"git checkout -- {path}"):
        assert said in str(caught.value)


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


def test_loading_runs_nothing_that_a_file_holds(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = folder / "tiny.npz"
    np.savez(path, x=np.array([Intruder()], object))
    published = weights.index(folder)
    published["tiny"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    runs.write_json(folder / "index.json", published)
    with pytest.raises(runs.RunError, match="no file of plain arrays"):
        weights.load("tiny", folder)
    assert not Path("intruder").exists()


def test_what_is_not_published_is_said(folder, tmp_path):
    with pytest.raises(weights.WeightsError, match=r"'tinny' is unknown\. Did you mean 'tiny'"):
        weights.load("tinny", folder)
    with pytest.raises(weights.WeightsError, match=r"holds no published network\. Use a run"):
        weights.load(folder=tmp_path / "nothing")
    (folder / "index.json").write_text("<<<<<<< HEAD\n{}")
    with pytest.raises(weights.WeightsError, match=r"index\.json is damaged: .* git checkout"):
        weights.load("tiny", folder)


def test_a_folder_does_not_grow_beyond_its_limit(run, folder, dataset, monkeypatch):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(weights, "MOST_BYTES", sum(map(len, before.values())) + MEGABYTE)
    weights.export(run, "tiny", folder, dataset=dataset)  # it takes its own place
    with pytest.raises(weights.WeightsError, match=r"second\.npz would make .* bytes large"):
        weights.export(run, "second", folder, dataset=dataset)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dataset": "synthetic"}, "is of the data set 'synthetic'"),
        ({"classes": ("bee", "bear")}, r"the classes \('bee', 'bear'\)"),
        ({"test_size": 0}, "was not tested"),
        ({}, "the run is interrupted"),
    ],
)
def test_what_is_no_tested_network_for_cifar_100_is_not_published(changes, told, tmp_path):
    recipe = recipes.get("seed", validation_size=100, **changes)
    with runs.opened(tmp_path / "run", recipe) as run:
        pass
    with pytest.raises(runs.RunError, match=told):
        weights.export(run, "tiny", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_weights_beyond_half_precision_are_not_published(run, dataset, tmp_path):
    copy = runs.Run(shutil.copytree(run.path, tmp_path / "run"))
    arrays = runs.read_arrays(copy.path / "weights.npz")
    arrays["0001"][0] = 70_000
    runs.write_arrays(copy.path / "weights.npz", arrays)
    with pytest.raises(weights.WeightsError, match="beyond 65504"):
        weights.export(copy, "tiny", tmp_path / "weights", dataset=dataset)


def test_predict_needs_neither_a_run_nor_the_data(exported, picture, tmp_path, monkeypatch, capsys):
    for name in ("CIFAR100_DIR", "CIFAR_LIB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    places = ["--weights-dir", str(exported), "--runs-dir", str(tmp_path / "nothing")]
    network = weights.load("tiny", exported)
    [row] = evaluation.predict(network.model, data.read_image(picture)[None])
    for chosen in ([], ["--weights", "tiny"]):
        assert main(["predict", str(picture), *chosen, *places]) == 0
        answered, path, best, *others = capsys.readouterr().out.splitlines()
        assert (answered, path, len(others)) == ("published network tiny", str(picture), 4)
        assert best == f"  {data.class_names('cifar100')[row.argmax()]} {row.max():.1%}"
    assert main(["predict", str(picture), "--weights", "tinny", *places]) == 1
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_a_run_that_is_named_answers_itself(run, exported, picture, capsys):
    places = ["--weights-dir", str(exported), "--runs-dir", str(run.path.parent)]
    assert main(["predict", str(picture), "--run", "run", *places]) == 0
    assert capsys.readouterr().out.startswith("run run\n")


def test_evaluate_gives_the_numbers_of_the_card(exported, dataset, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", {"cifar100": dataset}.get)
    plain, flipped = table_of((exported / "tiny.md").read_text("utf-8"), "measure")
    for table, flip in ((plain, []), (flipped, ["--flip"])):
        arguments = ["evaluate", "--weights", "tiny", "--weights-dir", str(exported), *flip]
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("tiny, test images of CIFAR-100\n")
        [loss] = [row[1] for row in table if row[0] == "loss"]
        assert re.search(rf"^loss +{loss}$", shown, re.M)


def test_the_notebook_shows_a_published_network_where_no_run_is(
    exported, picture, cifar100, tmp_path
):
    executed = tmp_path / "executed.ipynb"
    places = {name: str(tmp_path / name) for name in ("runs_dir", "output_dir", "tables_dir")}
    parameters = places | {"weights_dir": str(exported), "images": [str(picture)]}
    reports.execute(ROOT / "notebooks" / "06_predictions.ipynb", executed, parameters)
    assert "The network is **tiny**" in executed.read_text("utf-8")
    assert (tmp_path / "output_dir" / "tiny-own-pictures.png").exists()


def test_the_repository_publishes_what_its_workflow_names():
    published = weights.index()
    assert set(published) == set(workflows.WEIGHTS)
    accuracies = [entry["test_accuracy"] for entry in published.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    files = [path for path in weights.FOLDER.glob("*") if path.name != "index.json"]
    assert {path.stem for path in files} == set(published)
    assert sum(path.stat().st_size for path in files) <= 20 * MEGABYTE


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_load(name):
    network = weights.load(name)
    assert network.recipe == workflows.WEIGHTS[name]
    assert network.model.output_shape == (None, 100)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_are_as_good_as_their_cards_say(name, cifar100):
    images, labels = cifar100.test.images[:1000], cifar100.test.fine_labels[:1000]
    probabilities = evaluation.predict(weights.load(name).model, images)
    low, high = evaluation.wilson_interval(
        int((probabilities.argmax(axis=1) == labels).sum()), len(labels)
    )
    accuracy = weights.index()[name]["test_accuracy"]
    spread = (high - low) / 2  # twice the 95 % interval of 1,000 images
    assert low - spread < accuracy < high + spread
    card = (weights.FOLDER / f"{name}.md").read_text("utf-8")
    [[row], _] = [[r for r in t if r[0] == "accuracy"] for t in table_of(card, "measure")]
    assert row[1] == f"{100 * accuracy:.2f} %"
