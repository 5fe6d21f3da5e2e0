import datetime
import io
import re
import signal
import weakref

import ipywidgets
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from cifar_lib import ROOT, evaluation, explorers, recipes, runs
from cifar_lib.data import display_name

IMAGES = 3000


def shown(explorer, images, scale=3):
    """The positions of the images that an explorer's picture holds, found pixel by pixel."""
    picture = np.asarray(Image.open(io.BytesIO(explorer.picture.value)))
    rows = [row.tobytes() for row in picture]
    return [i for i, image in enumerate(images) if _holds(picture, rows, image, scale)]


def _holds(picture, rows, image, scale):
    large = image.repeat(scale, axis=0).repeat(scale, axis=1)
    first = large[0].tobytes()
    for y, row in enumerate(rows):
        x = row.find(first)
        while x >= 0:
            part = picture[y : y + len(large), x // 3 : x // 3 + len(large)]
            if np.array_equal(part, large):
                return True
            x = row.find(first, x + 1)
    return False


def opened(explorer):
    assert isinstance(explorer.panel, ipywidgets.VBox)
    return explorer


def choose(explorer, **values):
    before = explorer.picture.value
    for name, value in values.items():
        explorer.controls[name].value = value
    assert explorer.picture.value != before, f"{values} changed nothing"


@pytest.fixture(scope="module")
def of_class(synthetic):
    """Positions of the training images of each class."""
    return [np.flatnonzero(synthetic.train.fine_labels == label) for label in range(100)]


@pytest.fixture
def images(synthetic, of_class):
    """An explorer of images, two pairs of which are said to be alike."""
    pairs = np.array([[of_class[7][40], 5], [of_class[12][0], 6]])
    cosines = np.array([0.95, 0.9])
    return opened(explorers.Images(synthetic, pairs, cosines, synthetic.fine_names[7]))


@pytest.fixture(scope="module")
def probabilities(synthetic):
    """Of the first test images, as a network might give them that is right about half of them."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.full(100, 0.02), IMAGES)
    likeliest = probabilities.argmax(axis=1)
    labels = np.where(random.random(IMAGES) < 0.5, synthetic.test.fine_labels[:IMAGES], likeliest)
    rows = np.arange(IMAGES)
    highest = probabilities[rows, likeliest].copy()
    probabilities[rows, likeliest] = probabilities[rows, labels]
    probabilities[rows, labels] = highest
    return probabilities


@pytest.fixture
def predictions(synthetic, probabilities):
    labels = synthetic.test.fine_labels[:IMAGES]
    return opened(
        explorers.Predictions(synthetic, probabilities, labels, np.arange(IMAGES), "stand-in")
    )


@pytest.fixture(scope="module")
def augmentation(synthetic):
    positions = np.array([3, 14, 159])
    return opened(explorers.Augmentation(synthetic.train.images[positions], positions, "stand-in"))


def test_images_of_a_class_fill_page_after_page(images, synthetic, of_class):
    of_seven = synthetic.train.images[of_class[7]]
    assert shown(images, of_seven) == list(range(30))
    choose(images, page=2)
    assert shown(images, of_seven) == list(range(30, 60))
    assert images.controls["page"].max == -(-len(of_seven) // 30)
    choose(images, page=images.controls["page"].max)
    assert shown(images, of_seven) == list(range(480, 500))


def test_another_choice_of_images_begins_at_its_first_page(images, synthetic):
    choose(images, page=4)
    superclass = f"{display_name(synthetic.coarse_names[3])} (superclass)"
    choose(images, classes=images.choices[superclass])
    assert images.controls["page"].value == 1
    members = np.flatnonzero(np.isin(synthetic.train.fine_labels, range(15, 20)))
    assert shown(images, synthetic.train.images[members[:60]]) == list(range(30))
    choose(images, split="test")
    members = np.flatnonzero(np.isin(synthetic.test.fine_labels, range(15, 20)))
    assert shown(images, synthetic.test.images[members[:60]]) == list(range(30))
    choose(images, classes=images.choices["all classes"])
    assert shown(images, synthetic.test.images[:60]) == list(range(30))


def test_near_duplicates_of_a_page_stand_below_it(images, synthetic):
    assert not shown(images, synthetic.test.images[5:7])
    choose(images, page=2)  # the 40th image is there
    assert shown(images, synthetic.test.images[5:7]) == [0]
    assert "Near duplicates of this page's images: 1." in images.text.value


def test_images_can_be_those_with_near_duplicates_alone(images, synthetic, of_class):
    choose(images, duplicates=True)
    assert shown(images, synthetic.train.images[of_class[7]]) == [40]
    images.controls["classes"].value = images.choices[display_name(synthetic.fine_names[50])]
    assert images.text.value.startswith("There are no training images of")
    assert images.picture.value == b""
    assert images.picture.layout.display == "none"
    choose(images, duplicates=False)
    assert images.picture.layout.display is None


def test_predictions_are_filtered_and_the_surest_come_first(predictions, synthetic, probabilities):
    labels, predicted = synthetic.test.fine_labels[:IMAGES], probabilities.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    everything = predictions.choices["all classes"]
    choose(predictions, true=everything, predicted=everything)
    surest = np.argsort(-confidence, kind="stable")
    assert shown(predictions, synthetic.test.images[surest[:40]]) == list(range(20))
    for outcome, right in (("right", True), ("wrong", False)):
        choose(predictions, outcome=outcome)
        rows = surest[(predicted == labels)[surest] == right]
        assert shown(predictions, synthetic.test.images[rows[:40]]) == list(range(20))
        assert f": {len(rows):,}; page 1" in predictions.text.value
    choose(predictions, confidence=(0.3, 0.6))
    rows = rows[(confidence[rows] >= 0.3) & (confidence[rows] <= 0.6)]
    choose(predictions, page=2)
    assert shown(predictions, synthetic.test.images[rows[:60]]) == list(range(20, 40))
    choose(predictions, true=(8,), confidence=(0.0, 1.0))
    rows = surest[(labels == 8)[surest] & (predicted != labels)[surest]]
    assert shown(predictions, synthetic.test.images[rows]) == list(range(min(20, len(rows))))
    choose(predictions, true=everything, predicted=(8,))
    rows = surest[(predicted == 8)[surest] & (predicted != labels)[surest]]
    assert shown(predictions, synthetic.test.images[rows]) == list(range(min(20, len(rows))))


def test_predictions_that_nothing_fits_are_said_to_be_none(predictions):
    predictions.controls["true"].value = predictions.controls["predicted"].value = (8,)
    predictions.controls["outcome"].value = "wrong"
    assert predictions.text.value.startswith("There are no test images of")
    assert "wrong" in predictions.text.value
    assert predictions.picture.value == b""


def test_a_click_on_a_cell_shows_its_images(predictions, synthetic, probabilities):
    true = synthetic.superclass_of[synthetic.test.fine_labels[:IMAGES]]
    predicted = synthetic.superclass_of[probabilities.argmax(axis=1)]
    predictions.controls["confidence"].value = (0.99, 1.0)
    for cell in ((2, 5), (5, 2), (4, 4)):
        before = predictions.picture.value
        predictions.cells[cell].click()
        assert predictions.picture.value != before
        rows = np.flatnonzero((true == cell[0]) & (predicted == cell[1]))
        assert predictions.cells[cell].description == str(len(rows))
        assert f": {len(rows):,}; page 1" in predictions.text.value
        found = shown(predictions, synthetic.test.images[rows])
        assert len(found) == min(20, len(rows))
    choose(predictions, predicted=predictions.choices["all classes"])  # the controls still work


def test_a_cell_without_an_image_cannot_be_clicked(synthetic):
    labels = synthetic.test.fine_labels[:200]
    sure = np.eye(100)[labels]
    explorer = opened(explorers.Predictions(synthetic, sure, labels, np.arange(200), "perfect"))
    assert explorer.cells[1, 2].disabled
    assert explorer.cells[1, 2].description == ""
    assert not explorer.cells[1, 1].disabled


@pytest.mark.parametrize("policy", ["none", "seed", "crop_flip", "rand_augment"])
def test_draws_are_those_of_the_policy(augmentation, policy):
    from cifar_lib.augmentation import make

    augmentation.controls["policy"].value = policy
    augmentation.controls["seed"].value = 5
    indices = augmentation.indices.repeat(12) + np.tile(np.arange(12), 3)
    draws = make(policy)(augmentation.images.repeat(12, axis=0), 5, 0, indices)
    draws = (255 * draws.clip(0, 1)).round().astype(np.uint8)
    assert shown(augmentation, augmentation.images, scale=2) == [0, 1, 2]
    assert shown(augmentation, draws, scale=2) == list(range(36))


def test_every_policy_can_be_chosen(augmentation):
    from cifar_lib.augmentation import BUILDERS

    assert set(BUILDERS) < set(augmentation.controls["policy"].options)
    pictures = set()
    for policy in augmentation.controls["policy"].options:
        augmentation.controls["policy"].value = policy
        assert f"{policy}" in augmentation.text.value
        pictures.add(augmentation.picture.value)
        sliders = [augmentation.controls[name].disabled for name in augmentation.arguments]
        assert sliders == [policy != "ImageDataGenerator"] * len(sliders)
    # The generator begins as the deck's, which "seed" is.
    assert len(pictures) >= len(BUILDERS)


def test_the_generator_begins_as_the_deck_s(augmentation):
    pixels = []
    for policy in ("ImageDataGenerator", "seed"):
        augmentation.controls["policy"].value = policy
        picture = Image.open(io.BytesIO(augmentation.picture.value))
        pixels.append(np.asarray(picture).astype(int))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rotation_range", 45),
        ("width_shift_range", 0.4),
        ("height_shift_range", 0.4),
        ("shear_range", 40),
        ("zoom_range", (0.5, 1.5)),
        ("brightness_range", (0.5, 1.5)),
        ("channel_shift_range", 100),
        ("fill_mode", "wrap"),
        ("interpolation_order", 3),
        ("horizontal_flip", False),
        ("vertical_flip", False),
    ],
)
def test_each_argument_of_the_generator_changes_the_draws(augmentation, argument, value):
    augmentation.controls["policy"].value = "ImageDataGenerator"
    choose(augmentation, **{argument: value})
    assert shown(augmentation, augmentation.images, scale=2) == [0, 1, 2]
    if value:
        assert f"{argument}={value!r}" in augmentation.text.value
    choose(augmentation, **{argument: augmentation.initial[argument]})


def test_cval_fills_what_is_constant(augmentation):
    augmentation.controls["policy"].value = "ImageDataGenerator"
    choose(augmentation, fill_mode="constant")
    choose(augmentation, cval=255)
    choose(augmentation, cval=0)
    choose(augmentation, fill_mode="nearest")


@pytest.fixture(scope="module")
def own(synthetic):
    """An explorer of pictures, of an untrained network."""
    from cifar_lib import models

    model = models.build("airbench", side=24)
    models.adapt(model, synthetic.train.images[:100])
    names = synthetic.fine_names
    return opened(
        explorers.OwnPicture(model, names, "stand-in", synthetic.test.images[0], "the first")
    )


def uploaded(content, name="cat.png"):
    """What a browser sends."""
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    file = {"name": name, "type": "image/png", "size": len(content), "last_modified": moment}
    return ({**file, "content": memoryview(content)},)


def encoded(image, mode="RGB", kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(image).resize((64, 64), Image.Resampling.NEAREST).convert(mode).save(
        file, kind, **options
    )
    return file.getvalue()


def test_an_uploaded_picture_is_classified_and_explained(own, synthetic):
    from cifar_lib import data

    assert shown(own, synthetic.test.images[:3], scale=6) == [0]
    content = encoded(synthetic.test.images[1])
    choose(own, upload=uploaded(content))
    seen = data.read_image(content)
    assert shown(own, np.stack([seen, synthetic.test.images[0]]), scale=6) == [0]
    assert own.text.value.startswith("cat.png: ")
    [probabilities] = evaluation.predict(own.model, seen[None])
    best = np.argsort(-probabilities)[:5]
    offered = [label for label, _ in own.controls["rank"].options]
    names = [display_name(synthetic.fine_names[i]) for i in best]
    assert offered == [
        f"{name} ({probabilities[i]:.1%})" for name, i in zip(names, best, strict=True)
    ]
    assert names[0] in own.text.value
    choose(own, rank=4)
    assert shown(own, seen[None], scale=6) == [0]
    choose(own, upload=uploaded(encoded(synthetic.test.images[2]), "dog.png"))
    assert own.controls["rank"].value == 0
    choose(own, upload=())
    assert shown(own, synthetic.test.images[:3], scale=6) == [0]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("P", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")],
)
def test_any_colour_mode_may_be_uploaded(own, synthetic, mode, kind):
    choose(own, upload=uploaded(encoded(synthetic.test.images[1], mode, kind), f"{mode}.x"))
    assert own.text.value.startswith(f"{mode}.x: ")
    own.controls["upload"].value = ()


def test_a_photograph_is_turned_as_its_camera_says(own):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32, :, 0] = 255  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    choose(own, upload=uploaded(encoded(image, exif=exif)))
    seen = own.answer(own.controls["upload"].value).seen
    assert seen[-1, 0, 0] == 255 and seen[0, 0, 0] == 0
    own.controls["upload"].value = ()


def test_what_is_no_picture_is_refused_in_the_panel(own, synthetic):
    own.controls["upload"].value = uploaded(b"hello", "<b>notes.txt")
    assert own.text.value.startswith("&lt;b&gt;notes.txt cannot be read as a picture")
    assert own.picture.value == b"" and own.controls["rank"].disabled
    choose(own, upload=uploaded(encoded(synthetic.test.images[1])))
    assert not own.controls["rank"].disabled
    own.controls["upload"].value = ()


@pytest.fixture
def three(tmp_path, synthetic):
    """Three finished runs, one that is not, and one on other data."""
    for number, (name, rate) in enumerate({"a": 1e-3, "b": 1e-4, "c": 1e-3}.items(), 1):
        _finished(tmp_path / name, number, learning_rate=rate, dataset="synthetic")
    _finished(tmp_path / "other", 1, dataset="cifar100")
    with runs.opened(tmp_path / "open", recipes.get("seed", dataset="synthetic")):
        pass
    return opened(explorers.Runs(tmp_path, ["a", "b"], synthetic))


def _finished(folder, number, **choices):
    with runs.opened(folder, recipes.get("seed", **choices)):
        epochs = np.arange(1, 4)
        curves = {"accuracy": epochs / 10 / number, "loss": 4 / epochs / number}
        pd.DataFrame({"epoch": epochs, **curves}).to_csv(folder / "history.csv", index=False)
        test = {"accuracy": 0.1 * number, "loss": 4.0, "top5_accuracy": 0.5}
        metrics = {"test": test, "train_seconds": 60 * number, "parameters": 7}
        runs.write_json(folder / "metrics.json", metrics)


def test_runs_are_chosen_among_the_finished_ones_on_the_data_set(three):
    assert set(three.controls["names"].options) == {"a", "b", "c"}
    assert three.controls["names"].value == ("a", "b")
    choose(three, names=("a", "b", "c"))
    choose(three, names=("c",))
    assert three.table.value == ""
    three.controls["names"].value = ()
    assert three.text.value.startswith("No run is chosen")
    assert three.picture.value == b""


def test_only_the_choices_that_differ_are_compared(three):
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", three.table.value)
    assert cells == ["", "a", "b", "learning_rate", "0.001", "0.0001"]
    choose(three, names=("a", "c"))
    assert "recipes are the same" in three.text.value and three.table.value == ""


def test_the_numbers_of_runs_are_those_of_their_folders(three):
    numbers = three.numbers(["a", "c"])
    assert list(numbers["test accuracy"]) == pytest.approx([0.1, 0.3])
    assert list(numbers["minutes"]) == [1, 3]
    assert not [column for column in numbers if "validation" in column]


def test_training_is_not_watched_where_nobody_is(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    recipe = recipes.get("quick")
    with explorers.Training(recipe, tmp_path, "CIFAR-100") as watcher:
        assert watcher is None
    with pytest.raises(KeyboardInterrupt), explorers.Training(recipe, tmp_path, "CIFAR-100"):
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("done", [0, 2])
def test_an_interrupted_kernel_says_how_to_continue(done, tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/04_train.ipynb")
    if done:
        history = {"epoch": [1, 2], "accuracy": [0.1, 0.2], "loss": [4.0, 3.0]}
        pd.DataFrame(history).to_csv(tmp_path / "history.csv", index=False)
    explorer = explorers.Training(recipes.get("quick", epochs=5), tmp_path, "CIFAR-100")
    message = rf"^Stopped after epoch {done} of 5\. Run this cell again to continue\.$"
    with pytest.raises(explorers.StoppedError, match=message), explorer:
        assert bool(explorer.picture.value) == bool(done)  # what there is already
        raise KeyboardInterrupt


def test_an_interrupt_while_the_curves_are_drawn_is_not_lost(tmp_path, monkeypatch):
    class Shape:
        """Of matplotlib, which is told by weak references of what has gone."""

    def drawn(figure) -> bytes:
        shape = Shape()
        told = weakref.ref(shape, lambda _: signal.raise_signal(signal.SIGINT))
        del shape
        return b"" if told() is None else b"still there"

    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/04_train.ipynb")
    explorer = explorers.Training(recipes.get("quick", epochs=5), tmp_path, "CIFAR-100")
    with pytest.raises(explorers.StoppedError), explorer as watcher:
        monkeypatch.setattr(explorers, "_drawn", drawn)
        watcher.epoch_ended(pd.DataFrame({"epoch": [1], "accuracy": [0.1], "loss": [4.0]}))


def test_progress_within_an_epoch_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/04_train.ipynb")
    monkeypatch.setattr(explorers.Training, "seconds", 0)
    with explorers.Training(recipes.get("quick", epochs=5), tmp_path, "CIFAR-100") as watcher:
        for step in range(1, 31):
            watcher.step_ended(2, step, 80)
        assert (watcher.bar.value, watcher.bar.max) == (30, 80)
        assert watcher.text.value.startswith("Epoch 2 of 5, step 30 of 80, about 00:0")


@pytest.mark.parametrize("live", [False, True])
def test_a_kernel_shows_controls_if_jupyter_started_it_and_else_a_picture(
    live, monkeypatch, synthetic
):
    code = """
import numpy as np
from cifar_lib import data, explorers
dataset = data.load("synthetic")
explorers.Images(dataset, np.zeros((0, 2), int), np.zeros(0), dataset.coarse_names[0])
"""
    if live:
        monkeypatch.setenv("JPY_SESSION_NAME", "notebooks/01_dataset.ipynb")
    else:
        monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    notebook = new_notebook(cells=[new_code_cell(code)])
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    ).execute()
    outputs = [output.data for output in notebook.cells[0].outputs]
    if live:
        assert ["application/vnd.jupyter.widget-view+json" in data for data in outputs] == [True]
        return
    line, picture = outputs
    assert ": 2,500; page 1" in line["text/markdown"]
    assert "make lab" in line["text/markdown"]
    assert "image/png" in picture
    assert "widgets" not in notebook.metadata
