"""Numbers that say how good a network is: arrays in, numbers and tables out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

if TYPE_CHECKING:
    import keras

CALIBRATION_BINS = 15


def predict(
    model: keras.Model, images: np.ndarray, *, batch_size: int = 250, flip: bool = False
) -> np.ndarray:
    """Give the probability of every class for uint8 images (N, 32, 32, 3), as (N, K) float32.

    `flip` averages with the probabilities of the mirror images (test-time averaging).
    """
    from cifar_lib.augmentation import scale

    # Batch by batch: `model.predict` goes through tf.data, whose end can be a minute late.
    batches = [
        np.asarray(model.predict_on_batch(scale(images[start : start + batch_size])))
        for start in range(0, len(images), batch_size)
    ]
    probabilities = np.concatenate(batches)
    return average_with_mirrored(model, images, probabilities) if flip else probabilities


def average_with_mirrored(
    model: keras.Model, images: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """What `predict` gives for the images with `flip`, from what it gave without, as (N, K)."""
    mirrored = np.ascontiguousarray(images[:, :, ::-1])
    return (probabilities + predict(model, mirrored)) / 2


class GradCam:
    """Where in a picture a network sees a class.

    Selvaraju et al. 2017, "Grad-CAM: visual explanations from deep networks via gradient-based
    localization", arXiv 1610.02391, section 3: the last convolutional feature map, summed over its
    channels, each with the mean of its gradient as its weight; what is negative becomes zero. The
    gradient is that of the class's logit. The map is taken after what follows the convolution at
    its resolution: normalisation, activation, the sum with a shortcut.

    Args:
        model: a network whose last layer gives probabilities by softmax, or else the scores.

    Raises:
        ValueError: it has no convolution.
    """

    def __init__(self, model: keras.Model) -> None:
        from cifar_lib import backend
        from cifar_lib.backend import keras

        convolutions = [
            number
            for number, layer in enumerate(model.layers)
            if isinstance(layer, keras.layers.Conv2D)
        ]
        if not convolutions:
            raise ValueError(f"{model.name} has no Conv2D layer, whose map Grad-CAM weights")
        for layer in model.layers[convolutions[-1] :]:
            if len(layer.output.shape) != 4 or "pool_size" in layer.get_config():
                break
            features = layer.output
        last = model.layers[-1]
        logits = last.output
        if isinstance(last, keras.layers.Softmax):
            logits = last.input
        elif getattr(last, "activation", None) is keras.activations.softmax:
            linear = type(last).from_config(last.get_config() | {"activation": None})
            logits = linear(last.input)
            linear.set_weights(last.get_weights())
        self._features = keras.Model(model.inputs, features)
        head = keras.Model(features, logits)
        self._gradient = backend.gradient(
            lambda features, chosen: head(features, training=False) * chosen
        )
        self._classes = model.output_shape[-1]

    def __call__(self, image: np.ndarray, label: int) -> np.ndarray:
        """The map of an image, uint8 (32, 32, 3), for a class: (h, w) float32, none below 0.

        Of the resolution of the network's last feature map, and in units of the logit a position.
        """
        from cifar_lib import backend
        from cifar_lib.augmentation import scale

        ops = backend.keras.ops
        features = self._features.predict_on_batch(scale(image[None]))
        chosen = ops.one_hot([label], self._classes)
        gradient = self._gradient(ops.convert_to_tensor(features), chosen)
        gradient = ops.convert_to_numpy(ops.cast(gradient, "float32"))
        weights = gradient[0].mean(axis=(0, 1))
        return np.maximum(features[0].astype(np.float32) @ weights, 0)


def evaluate(
    probabilities: np.ndarray, labels: np.ndarray, superclass_of: np.ndarray
) -> dict[str, float]:
    """Measure predictions against the true classes.

    `probabilities` is (N, K) float with rows that sum to 1, `labels` (N,) int in 0..K-1,
    `superclass_of` (K,) int, the superclass of each class.

    Returns `images` (N); `accuracy` with its 95 % interval `accuracy_low` to `accuracy_high`;
    `loss`, the mean negative log-likelihood in nats; `top5_accuracy`; `superclass_accuracy`, the
    share of images whose likeliest class is of the right superclass; and
    `expected_calibration_error` over 15 bins. All but `images` and `loss` lie in 0..1.

    Raises ValueError for arrays that do not fit this.
    """
    probabilities, labels = _checked(probabilities, labels)
    superclass_of = _checked_superclasses(superclass_of, probabilities.shape[1])
    # Not sklearn's top_k_accuracy_score: it gives a tie to the highest class, argmax to the lowest,
    # and logits in bfloat16 do tie, so that top-5 could be below top-1.
    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    predicted = ranking[:, 0]
    right = predicted == labels
    # Keras clips in the same way, so that one confident mistake does not make the loss infinite.
    likelihood = np.clip(probabilities[np.arange(len(labels)), labels], 1e-7, 1 - 1e-7)
    accuracy_low, accuracy_high = wilson_interval(int(right.sum()), len(labels))
    bins = reliability(probabilities, labels)
    return {
        "images": len(labels),
        "accuracy": float(right.mean()),
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "loss": float(-np.log(likelihood).mean()),
        "top5_accuracy": float((ranking[:, :5] == labels[:, None]).any(axis=1).mean()),
        "superclass_accuracy": float((superclass_of[predicted] == superclass_of[labels]).mean()),
        "expected_calibration_error": expected_calibration_error(bins),
    }


def wilson_interval(right: int, images: int) -> tuple[float, float]:
    """Give the 95 % confidence interval of an accuracy of `right` out of `images`, both in 0..1.

    Raises ValueError unless 0 <= right <= images and images > 0.
    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if images < 1 or not 0 <= right <= images:
        raise ValueError(f"{right} right out of {images} images: expected 0 <= right <= images > 0")
    interval = binomtest(int(right), int(images)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def confusion(probabilities: np.ndarray, labels: np.ndarray, num_classes: int = 100) -> np.ndarray:
    """Count the images of each true class (row) that were taken for each class (column).

    `probabilities` is (N, num_classes), `labels` (N,). Returns (num_classes, num_classes) int64.
    Raises ValueError for arrays that do not fit.
    """
    probabilities, labels = _checked(probabilities, labels)
    if probabilities.shape[1] != num_classes:
        raise ValueError(
            f"probabilities have {probabilities.shape[1]} columns, but num_classes is {num_classes}"
        )
    return confusion_matrix(labels, probabilities.argmax(axis=1), labels=np.arange(num_classes))


def per_class(
    probabilities: np.ndarray,
    labels: np.ndarray,
    fine_names: Sequence[str],
    coarse_names: Sequence[str],
    superclass_of: np.ndarray,
) -> pd.DataFrame:
    """Give precision, recall and F1 of every class that has an image.

    Columns: `class`, `superclass`, `images`, `precision`, `recall`, `f1` (0..1). The recall of a
    class is its accuracy. The precision of a class that was never predicted is NaN.
    Raises ValueError for arrays that do not fit.
    """
    probabilities, labels = _checked(probabilities, labels)
    superclass_of = _checked_superclasses(superclass_of, probabilities.shape[1])
    present = np.unique(labels)
    table = _precision_recall(labels, probabilities.argmax(axis=1), present)
    table.insert(0, "class", [fine_names[i] for i in present])
    table.insert(1, "superclass", [coarse_names[superclass_of[i]] for i in present])
    return table


def per_superclass(
    probabilities: np.ndarray,
    labels: np.ndarray,
    coarse_names: Sequence[str],
    superclass_of: np.ndarray,
) -> pd.DataFrame:
    """Give precision, recall and F1 of every superclass that has an image.

    An image's predicted superclass is that of its likeliest class. Columns: `superclass`, `images`,
    `accuracy` (share whose class is right), `precision`, `recall`, `f1` (of the superclass), 0..1.
    Raises ValueError for arrays that do not fit.
    """
    probabilities, labels = _checked(probabilities, labels)
    superclass_of = _checked_superclasses(superclass_of, probabilities.shape[1])
    predicted = probabilities.argmax(axis=1)
    true_superclass = superclass_of[labels]
    present = np.unique(true_superclass)
    table = _precision_recall(true_superclass, superclass_of[predicted], present)
    table.insert(0, "superclass", [coarse_names[i] for i in present])
    right = predicted == labels
    table.insert(2, "accuracy", [right[true_superclass == i].mean() for i in present])
    return table


def most_confused(confusion: np.ndarray, fine_names: Sequence[str], n: int = 20) -> pd.DataFrame:
    """List the `n` commonest mistakes, commonest first.

    `confusion` is (K, K) int, rows true. Columns: `true`, `predicted`, `count` and `share`, the
    part of the true class's images (0..1). Pairs that never happened are left out.
    Raises ValueError if `confusion` is not square or does not fit the names.
    """
    confusion = np.asarray(confusion)
    if confusion.shape != (len(fine_names), len(fine_names)):
        raise ValueError(
            f"confusion has the shape {confusion.shape}, expected a square of the "
            f"{len(fine_names)} classes that fine_names names"
        )
    mistakes = confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:n]
    true, predicted = np.unravel_index(order, mistakes.shape)
    count = mistakes[true, predicted]
    happened = count > 0
    true, predicted, count = true[happened], predicted[happened], count[happened]
    return pd.DataFrame(
        {
            "true": [fine_names[i] for i in true],
            "predicted": [fine_names[i] for i in predicted],
            "count": count,
            "share": count / confusion.sum(axis=1)[true],
        }
    )


def reliability(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = CALIBRATION_BINS
) -> pd.DataFrame:
    """Compare the confidence of predictions with how often they are right.

    The confidence of a prediction is the probability of its likeliest class. One row for each of
    `bins` bins of equal width; columns `confidence_low` (excluded), `confidence_high` (included),
    `images`, and the means `confidence` and `accuracy` (0..1; NaN in an empty bin).
    Raises ValueError for arrays that do not fit or `bins` below 1.
    Guo et al. 2017, "On calibration of modern neural networks", section 2.
    """
    probabilities, labels = _checked(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    edges = np.linspace(0, 1, bins + 1)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    images = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of, confidence, bins) / images
        accuracy = np.bincount(bin_of, right, bins) / images
    return pd.DataFrame(
        {
            "confidence_low": edges[:-1],
            "confidence_high": edges[1:],
            "images": images,
            "confidence": mean_confidence,
            "accuracy": accuracy,
        }
    )


def expected_calibration_error(table: pd.DataFrame) -> float:
    """Give the mean gap between confidence and accuracy over the bins of `reliability` (0..1).

    Each bin counts by its images: Guo et al. 2017, equation 3.
    """
    gap = (table["confidence"] - table["accuracy"]).abs().fillna(0)
    return float((gap * table["images"]).sum() / table["images"].sum())


def _precision_recall(true: np.ndarray, predicted: np.ndarray, present: np.ndarray) -> pd.DataFrame:
    precision, recall, f1, images = precision_recall_fscore_support(
        true, predicted, labels=present, zero_division=np.nan
    )
    return pd.DataFrame({"images": images, "precision": precision, "recall": recall, "f1": f1})


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise ValueError(
            f"probabilities have the shape {probabilities.shape}, expected (images, classes) "
            "with at least one of each"
        )
    if labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"labels have the shape {labels.shape}, expected {probabilities.shape[:1]}: "
            "one for each row of probabilities"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels have the type {labels.dtype}, expected integers")
    classes = probabilities.shape[1]
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        raise ValueError(
            f"label {labels[outside][0]} of image {outside.argmax()} is outside 0..{classes - 1}"
        )
    # float64, because the sum of 100 float32 that are all rounded is off by more than its own error
    probabilities = probabilities.astype(np.float64)
    wrong = ~((probabilities >= 0).all(axis=1) & (np.abs(probabilities.sum(axis=1) - 1) < 1e-3))
    if wrong.any():
        row = probabilities[wrong.argmax()]
        raise ValueError(
            f"row {wrong.argmax()} of probabilities has the minimum {row.min():.6g} and the sum "
            f"{row.sum():.6g}, expected none below 0 and the sum 1: apply softmax to logits first"
        )
    return probabilities, labels


def _checked_superclasses(superclass_of: np.ndarray, classes: int) -> np.ndarray:
    superclass_of = np.asarray(superclass_of)
    if superclass_of.shape != (classes,):
        raise ValueError(
            f"superclass_of has the shape {superclass_of.shape}, expected ({classes},): "
            "one for each column of probabilities"
        )
    return superclass_of
