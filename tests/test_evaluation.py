import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.calibration import calibration_curve

from cifar_lib import ROOT, evaluation

CLASSES = 100
SUPERCLASS_OF = np.arange(CLASSES) % 20
FINE_NAMES = [f"class {i}" for i in range(CLASSES)]
COARSE_NAMES = [f"superclass {i}" for i in range(20)]


def random_predictions(seed, images=400, classes=CLASSES, skill=3.0):
    """Probabilities (float32, as a network gives them) that lean towards the true class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)) + skill * (np.arange(classes) == labels[:, None])
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32), labels


def certain(predicted, classes=CLASSES):
    return np.eye(classes, dtype=np.float32)[predicted]


predictions = st.builds(
    random_predictions,
    st.integers(0, 2**32 - 1),
    images=st.integers(1, 200),
    skill=st.floats(0, 20),
)


class LinearNetwork:
    """Softmax of a random linear function of the pixels."""

    weights = np.random.default_rng(0).normal(size=(32 * 32 * 3, CLASSES)) / 20

    def predict_on_batch(self, images):
        exponentials = np.exp(images.reshape(len(images), -1) @ self.weights)
        return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def test_predictions_are_averaged_with_those_of_mirror_images():
    network = LinearNetwork()
    images = np.random.default_rng(1).integers(256, size=(7, 32, 32, 3), dtype=np.uint8)
    plain, mirrored = (
        network.predict_on_batch(views / 255) for views in (images, np.flip(images, axis=2))
    )
    found = evaluation.predict(network, images, batch_size=3)
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    averaged = evaluation.average_with_mirrored(network, images, found)
    np.testing.assert_allclose(averaged, (plain + mirrored) / 2, rtol=1e-5)
    flipped = evaluation.predict(network, images, flip=True)
    np.testing.assert_allclose(flipped, averaged, rtol=1e-6)


def test_evaluate_agrees_with_scikit_learn():
    probabilities, labels = random_predictions(1)
    found = evaluation.evaluate(probabilities, labels, SUPERCLASS_OF)
    predicted = probabilities.argmax(axis=1)
    every = np.arange(CLASSES)
    assert found["images"] == 400
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    normalised = probabilities.astype(float) / probabilities.sum(axis=1, keepdims=True, dtype=float)
    expected_loss = metrics.log_loss(labels, normalised, labels=every)
    assert found["loss"] == pytest.approx(expected_loss, rel=1e-6)
    assert found["top5_accuracy"] == pytest.approx(
        metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every)
    )
    assert found["superclass_accuracy"] == pytest.approx(
        metrics.accuracy_score(SUPERCLASS_OF[labels], SUPERCLASS_OF[predicted])
    )


def test_evaluate_by_hand():
    # Three images: right; wrong class of the right superclass (0 and 20); wrong in every way.
    probabilities = np.zeros((3, CLASSES), np.float32)
    probabilities[0, 7] = 1
    probabilities[1, [20, 0]] = 0.75, 0.25
    probabilities[2, [1, 2, 3, 4, 5, 6]] = 0.3, 0.2, 0.15, 0.15, 0.15, 0.05
    found = evaluation.evaluate(probabilities, np.array([7, 0, 6]), SUPERCLASS_OF)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["top5_accuracy"] == pytest.approx(2 / 3)
    assert found["superclass_accuracy"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx((np.log(4) + np.log(20)) / 3, abs=1e-6)
    # Confidences 1, 0.75 and 0.3, each alone in its bin.
    assert found["expected_calibration_error"] == pytest.approx((0 + 0.75 + 0.3) / 3, abs=1e-6)


def test_a_certain_mistake_costs_what_it_costs_in_keras():
    found = evaluation.evaluate(certain([1]), np.array([0]), SUPERCLASS_OF)
    assert found["loss"] == pytest.approx(16.118, abs=1e-3)  # -log(1e-7), Keras' epsilon


@given(predictions)
@settings(max_examples=50, deadline=None)
def test_evaluate_properties(sample):
    found = evaluation.evaluate(*sample, SUPERCLASS_OF)
    assert 0 <= found["expected_calibration_error"] <= 1
    assert 0 <= found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"] <= 1
    assert found["accuracy"] <= found["top5_accuracy"] <= 1
    assert found["accuracy"] <= found["superclass_accuracy"] <= 1
    assert found["loss"] >= 0


def test_ties_never_put_top5_below_top1():
    uniform = np.full((CLASSES, CLASSES), 1 / CLASSES, np.float32)
    found = evaluation.evaluate(uniform, np.arange(CLASSES), SUPERCLASS_OF)
    assert found["accuracy"] == pytest.approx(0.01)
    assert found["top5_accuracy"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion: comparison of
        # seven methods", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(right, images, low, high):
    assert evaluation.wilson_interval(right, images) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_refuses_impossible_counts():
    with pytest.raises(ValueError, match="11 right out of 10"):
        evaluation.wilson_interval(11, 10)


@given(predictions)
@settings(max_examples=30, deadline=None)
def test_confusion_counts_every_image_once(sample):
    probabilities, labels = sample
    found = evaluation.confusion(probabilities, labels)
    assert found.shape == (CLASSES, CLASSES)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found.sum(axis=1), np.bincount(labels, minlength=CLASSES))
    right = evaluation.evaluate(probabilities, labels, SUPERCLASS_OF)["accuracy"] * len(labels)
    assert np.trace(found) == pytest.approx(right)


def test_confusion_has_true_classes_in_rows():
    found = evaluation.confusion(certain([5, 5, 3]), np.array([2, 2, 3]))
    assert found[2, 5] == 2
    assert found[3, 3] == 1


def test_per_class_agrees_with_scikit_learn():
    probabilities, labels = random_predictions(2, images=2000)
    table = evaluation.per_class(probabilities, labels, FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF)
    report = metrics.classification_report(
        labels,
        probabilities.argmax(axis=1),
        labels=np.arange(CLASSES),
        target_names=FINE_NAMES,
        output_dict=True,
        zero_division=np.nan,
    )
    assert list(table["class"]) == FINE_NAMES
    assert table["superclass"][21] == "superclass 1"
    for row in table.itertuples():
        expected = report[FINE_NAMES[row.Index]]
        assert (row.images, row.recall, row.f1) == pytest.approx(
            (expected["support"], expected["recall"], expected["f1-score"])
        )
        assert row.precision == pytest.approx(expected["precision"], nan_ok=True)


def test_per_class_by_hand_for_a_class_subset():
    # Four images of class 8: three are found, one is taken for 9. One image of 9: missed.
    table = evaluation.per_class(
        certain([8, 8, 8, 9, 8]),
        np.array([8, 8, 8, 8, 9]),
        FINE_NAMES,
        COARSE_NAMES,
        SUPERCLASS_OF,
    ).set_index("class")
    assert list(table.index) == ["class 8", "class 9"]
    assert tuple(table.loc["class 8"])[1:] == pytest.approx((4, 0.75, 0.75, 0.75))
    assert tuple(table.loc["class 9"])[1:] == pytest.approx((1, 0, 0, 0))


def test_per_class_leaves_the_precision_of_an_unpredicted_class_undefined():
    table = evaluation.per_class(
        certain([1, 1]), np.array([0, 1]), FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF
    )
    assert np.isnan(table["precision"][0])
    assert table["recall"][0] == 0
    assert table["f1"][0] == 0


def test_per_superclass_by_hand():
    # Superclass 0 holds classes 0, 20, 40: one is right, one taken for a sister, one for class 1.
    table = evaluation.per_superclass(
        certain([0, 40, 1, 1]), np.array([0, 20, 20, 1]), COARSE_NAMES, SUPERCLASS_OF
    ).set_index("superclass")
    assert list(table.index) == ["superclass 0", "superclass 1"]
    first, second = table.loc["superclass 0"], table.loc["superclass 1"]
    assert (first["images"], first["accuracy"]) == pytest.approx((3, 1 / 3))
    assert (first["precision"], first["recall"]) == pytest.approx((1, 2 / 3))
    assert (second["precision"], second["recall"], second["f1"]) == pytest.approx((0.5, 1, 2 / 3))


def test_most_confused_by_hand():
    counts = np.array([[5, 3, 0], [0, 8, 2], [3, 0, 3]])
    table = evaluation.most_confused(counts, ["ant", "bee", "cat"], n=2)
    assert table.to_dict("list") == {
        "true": ["ant", "cat"],
        "predicted": ["bee", "ant"],
        "count": [3, 3],
        "share": [3 / 8, 0.5],
    }
    assert len(evaluation.most_confused(counts, ["ant", "bee", "cat"], n=50)) == 3


def test_most_confused_refuses_another_size():
    with pytest.raises(ValueError, match=r"\(3, 3\).*2 classes"):
        evaluation.most_confused(np.eye(3, dtype=int), ["ant", "bee"])


def test_calibration_error_is_zero_where_confidence_is_accuracy():
    # Ten images at confidence 0.7, of which seven are right, and ten at 1.0, all right.
    probabilities = np.zeros((20, CLASSES))
    probabilities[:10, 0], probabilities[:10, 1] = 0.7, 0.3
    probabilities[10:, 0] = 1
    labels = np.array([0] * 7 + [1] * 3 + [0] * 10)
    found = evaluation.evaluate(probabilities, labels, SUPERCLASS_OF)
    assert found["expected_calibration_error"] == pytest.approx(0, abs=1e-12)


def test_reliability_agrees_with_scikit_learn():
    probabilities, labels = random_predictions(3, images=5000, skill=6)
    right = probabilities.argmax(axis=1) == labels
    accuracy, confidence = calibration_curve(right, probabilities.max(axis=1), n_bins=15)
    table = evaluation.reliability(probabilities, labels)
    filled = table[table["images"] > 0]
    np.testing.assert_allclose(filled["accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(filled["confidence"], confidence, rtol=1e-6)
    assert table["images"].sum() == 5000


@pytest.mark.parametrize(("confidence", "row"), [(1.0, 4), (0.6, 2), (0.61, 3)])
def test_a_bin_includes_its_upper_edge(confidence, row):
    probabilities = np.array([[confidence, 1 - confidence]])
    table = evaluation.reliability(probabilities, np.array([0]), bins=5)
    assert table["images"].to_numpy().nonzero()[0] == [row]


GOOD = certain([0, 1])


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.zeros((0, CLASSES)), np.zeros(0, int), r"\(0, 100\)"),
        (np.zeros(CLASSES), np.array([0]), r"\(100,\)"),
        (GOOD, np.array([0]), r"\(1,\), expected \(2,\)"),
        (GOOD, np.array([[0], [1]]), r"\(2, 1\), expected \(2,\)"),
        (GOOD, np.array([0.0, 1.0]), "float64, expected integers"),
        (GOOD, np.array([0, 100]), r"label 100 of image 1 is outside 0\.\.99"),
        (GOOD, np.array([-1, 0]), r"label -1 of image 0 is outside 0\.\.99"),
        (GOOD * [[1], [2]], np.array([0, 1]), "row 1 .* the sum 2,.* softmax"),
        (GOOD + np.eye(2, CLASSES, 1) - np.eye(2, CLASSES, 2), np.array([0, 1]), "minimum -1"),
        (GOOD * np.nan, np.array([0, 1]), "row 0 .* sum nan"),
    ],
)
def test_bad_input_is_named(probabilities, labels, message):
    for measure in (
        lambda: evaluation.evaluate(probabilities, labels, SUPERCLASS_OF),
        lambda: evaluation.confusion(probabilities, labels),
        lambda: evaluation.reliability(probabilities, labels),
    ):
        with pytest.raises(ValueError, match=message):
            measure()


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="100 columns, but num_classes is 10"):
        evaluation.confusion(GOOD, np.array([0, 1]), num_classes=10)
    with pytest.raises(ValueError, match=r"\(99,\), expected \(100,\)"):
        evaluation.evaluate(GOOD, np.array([0, 1]), SUPERCLASS_OF[:99])
    with pytest.raises(ValueError, match="bins is 0"):
        evaluation.reliability(GOOD, np.array([0, 1]), bins=0)


def network(*head, filters=1):
    """A convolution of single pixels, whose filter k is 1 on colour k, and what follows it."""
    import keras

    inputs = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(filters, 1, activation="relu", name="last")(inputs)
    outputs = maps
    for layer in head:
        outputs = layer(outputs)
    model = keras.Model(inputs, outputs)
    model.get_layer("last").set_weights([np.eye(3)[None, None, :, :filters], np.zeros(filters)])
    return model


def test_grad_cam_finds_the_corner_that_decides():
    import keras

    model = network(keras.layers.Flatten(), keras.layers.Dense(2, "softmax"), filters=2)
    kernel = np.zeros((32, 32, 2, 2), np.float32)
    kernel[:8, :8, 0, 0] = 1  # class 0: red at the upper left
    kernel[24:, 24:, 1, 1] = 1  # class 1: green at the lower right
    model.layers[-1].set_weights([kernel.reshape(-1, 2), np.zeros(2)])
    image = np.zeros((32, 32, 3), np.uint8)
    image[:8, :8, 0] = image[24:, 24:, 1] = 200
    grad_cam = evaluation.GradCam(model)
    for label, corner in enumerate([np.s_[:8, :8], np.s_[24:, 24:]]):
        heat = grad_cam(image, label)
        inside = np.zeros((32, 32), bool)
        inside[corner] = True
        assert heat[inside].min() > 0
        assert (heat[~inside] == 0).all()


def test_the_map_does_not_fade_where_the_network_is_sure():
    # The gradient is that of the logit: the probability's own vanishes.
    import keras

    model = network(keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2, "softmax"))
    model.layers[-1].set_weights([np.array([[1e4, -1e4]]), np.zeros(2)])
    image = np.full((32, 32, 3), 200, np.uint8)
    assert evaluation.predict(model, image[None])[0, 0] == 1
    assert evaluation.GradCam(model)(image, 0).min() > 1


CAM = """
import sys
import numpy as np
from cifar_lib import evaluation, models
from cifar_lib.backend import keras

model = models.build("wide_resnet", num_classes=3, side=16)
image = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
pooling = next(n for n, l in enumerate(model.layers) if "Pooling" in type(l).__name__)
features = keras.Model(model.inputs, model.layers[pooling].input)
maps = keras.ops.convert_to_numpy(features(image[None].astype(np.float32) / 255))[0]
[kernel] = next(l for l in model.layers if type(l).__name__ == "Dense").get_weights()
# Zhou et al. 2016, arXiv 1512.04150, equation 2, at each of the positions that are averaged.
cam = maps @ kernel / maps[..., 0].size
grad_cam = evaluation.GradCam(model)
for label in range(3):
    np.testing.assert_allclose(
        grad_cam(image, label), cam[..., label].clip(0), rtol=1e-3, atol=1e-6
    )
print(keras.backend.backend(), maps.shape)
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_grad_cam_after_global_average_pooling_is_cam(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", CAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"{backend} (4, 4, 640)"


@pytest.mark.parametrize(
    ("name", "side", "shape"),
    [
        ("seed", 32, (4, 4)),
        ("airbench", 32, (3, 3)),
        ("airbench", 24, (2, 2)),
        ("speedrun", 32, (3, 3)),
        ("speedrun", 24, (2, 2)),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_network_has_a_map_for_each_class(name, side, shape, precision):
    from cifar_lib import models

    model = models.build(name, num_classes=4, side=side, precision=precision)
    images = np.random.default_rng(0).integers(256, size=(9, 32, 32, 3), dtype=np.uint8)
    models.adapt(model, images)
    before = evaluation.predict(model, images)
    grad_cam = evaluation.GradCam(model)
    maps = np.stack([grad_cam(images[0], label) for label in range(4)])
    assert maps.shape == (4, *shape) and maps.dtype == np.float32
    assert np.isfinite(maps).all() and maps.min() >= 0 and maps.max() > 0
    np.testing.assert_array_equal(evaluation.predict(model, images), before)


def test_grad_cam_needs_a_convolution():
    import keras

    model = keras.Sequential(
        [keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(2)], name="flat"
    )
    with pytest.raises(ValueError, match="flat has no Conv2D"):
        evaluation.GradCam(model)
