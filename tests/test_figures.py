import io
import itertools
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_rgba
from PIL import Image

from cifar_lib import evaluation, figures

SUPERCLASS_OF = np.arange(100) % 20
FINE_NAMES = [f"class {i}" for i in range(100)]
COARSE_NAMES = [f"superclass {i}" for i in range(20)]


def history(epochs, validation=True):
    epoch = np.arange(1, epochs + 1)
    table = pd.DataFrame({"epoch": epoch, "loss": 4 / epoch, "accuracy": 1 - 1 / (epoch + 1)})
    if validation:
        # Best at two thirds of the way.
        table["val_accuracy"] = 0.5 - 0.001 * np.abs(epoch - max(1, 2 * epochs // 3))
        table["val_loss"] = 2.0
    return table


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 32, 32, 3), np.uint8)


def random_probabilities(images, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(100, 0.05), images)


def texts(figure):
    return [text.get_text() for text in figure.findobj(plt.Text) if text.get_text()]


def rendered(figure):
    file = io.BytesIO()
    figure.savefig(file)
    return np.asarray(Image.open(file).convert("RGB"))


def lines(axes, color):
    return [line for line in axes.get_lines() if to_rgba(line.get_color()) == to_rgba(color)]


def assert_text_is_inside(figure):
    figure.canvas.draw()
    for text in figure.findobj(plt.Text):
        if text.get_text() and text.get_visible() and text.axes is None:
            box = text.get_window_extent()
            assert box.x0 >= 0, text.get_text()
            assert box.x1 <= figure.bbox.x1, text.get_text()


def test_training_curves_mark_the_best_epoch():
    figure = figures.training_curves({"long": history(30), "short": history(9)}, "CIFAR-100: runs")
    accuracy_long, _, accuracy_short, _ = figure.axes
    assert any("best epoch, 20: 0.5000" in text for text in texts(accuracy_long))
    assert any("best epoch, 6: 0.5000" in text for text in texts(accuracy_short))
    assert "CIFAR-100: runs" in texts(figure)


@pytest.mark.parametrize("validation", [True, False])
def test_training_curves_of_one_epoch_are_visible(validation):
    figure = figures.training_curves({"run": history(1, validation)}, "CIFAR-100")
    picture = rendered(figure)
    blue = np.array([round(255 * part) for part in to_rgba(figures.TRAINING)[:3]])
    # More than the legend's two samples of a line.
    assert (picture == blue).all(axis=-1).sum() > 300
    assert bool(lines(figure.axes[0], figures.VALIDATION)) == validation


def test_training_curves_of_many_runs_stay_legible():
    histories = {f"run {number}": history(number + 2) for number in range(5)}
    figure = figures.training_curves(histories, "CIFAR-100")
    assert figure.get_figwidth() <= 14
    upper, lower = figure.axes[::2], figure.axes[1::2]
    assert [axes.get_title() for axes in upper] == list(histories)
    assert len({axes.get_ylim() for axes in upper}) == 1
    assert len({axes.get_ylim() for axes in lower}) == 1
    rendered(figure)


def test_training_curves_draw_the_deck_where_asked():
    deck = {"accuracy": 0.6187, "loss": 1.5597}
    figure = figures.training_curves({"run": history(3)}, "CIFAR-100", deck=deck)
    assert [lines(axes, figures.DECK)[0].get_ydata()[0] for axes in figure.axes] == [0.6187, 1.5597]


def test_training_curves_refuse_nothing():
    with pytest.raises(ValueError, match="no run given"):
        figures.training_curves({}, "CIFAR-100")
    with pytest.raises(ValueError, match="'killed'"):
        figures.training_curves({"killed": history(0)}, "CIFAR-100")


def test_overlaid_curves_give_each_run_its_colour_in_the_same_panels():
    histories = {"long": history(30), "short": history(9)}
    figure = figures.overlaid_curves(histories, "CIFAR-100: runs")
    assert len(figure.axes) == 2
    for axes, metric in zip(figure.axes, ("accuracy", "loss"), strict=True):
        colors = {line.get_color() for line in axes.get_lines()}
        assert len(colors) == 2
        drawn = {tuple(line.get_ydata()) for line in axes.get_lines()}
        expected = [h[name] for h in histories.values() for name in (metric, f"val_{metric}")]
        assert drawn == set(map(tuple, expected))
    assert {"long", "short", "training", "validation"} <= set(texts(figure.legends[0]))
    [accuracy, _] = figures.overlaid_curves({"run": history(3)}, "CIFAR-100", 12).axes
    assert lines(accuracy, figures.TRAINING) and lines(accuracy, figures.VALIDATION)
    assert accuracy.get_xlim()[1] >= 12
    [legend] = figures.overlaid_curves({"run": history(3, False)}, "CIFAR-100").legends
    assert texts(legend) == ["training"]
    with pytest.raises(ValueError, match="'killed'"):
        figures.overlaid_curves({"killed": history(0)}, "CIFAR-100")


def range_table(losses):
    rates = np.geomspace(1e-6, 1, len(losses))
    smoothed = pd.Series(losses).ewm(alpha=0.02).mean()
    return pd.DataFrame({"learning_rate": rates, "loss": losses, "smoothed": smoothed})


@pytest.mark.parametrize("last", [1e6, np.nan])
def test_range_test_marks_the_suggestion_and_keeps_the_descent_visible(last):
    losses = np.append(np.linspace(4.6, 3.8, 99), last)
    figure = figures.range_test(range_table(losses), 3e-4, "CIFAR-100: range test")
    [axes] = figure.axes
    assert axes.get_xscale() == "log"
    [mark] = lines(axes, "black")
    assert list(mark.get_xdata()) == [3e-4, 3e-4]
    low, high = axes.get_ylim()
    assert low < 3.8 and 4.6 < high < 5
    assert {"CIFAR-100: range test", "suggestion, 0.0003", "learning rate"} <= set(texts(figure))


def test_range_test_without_a_suggestion_marks_none():
    figure = figures.range_test(range_table(np.full(20, 4.6)), None, "CIFAR-100")
    assert not lines(figure.axes[0], "black")
    assert not any("suggestion" in text for text in texts(figure))


def test_range_test_refuses_nothing():
    with pytest.raises(ValueError, match="none of 2 losses is finite"):
        figures.range_test(range_table(np.array([np.nan, np.inf])), None, "CIFAR-100")


def test_confusion_matrix_is_ordered_by_superclass():
    confusion = evaluation.confusion(random_probabilities(3000), np.arange(3000) % 100)
    figure = figures.confusion_matrix(
        confusion, FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF, "CIFAR-100: confusion"
    )
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[:6] == ["class 0", "class 20", "class 40", "class 60", "class 80", "class 1"]
    assert names == [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert set(COARSE_NAMES) <= set(texts(figure))
    drawn = figure.axes[0].collections[0].get_array().filled(0)
    assert drawn[1, 3] == pytest.approx(confusion[20, 60] / 30)


def test_confusion_labels_are_legible_at_half_size():
    confusion = np.eye(100, dtype=int)
    figure = figures.confusion_matrix(
        confusion, FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF, "CIFAR-100"
    )
    figure.canvas.draw()
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert min(box.height for box in labels) / 2 >= 7
    assert all(below.y1 <= above.y0 + 1 for above, below in itertools.pairwise(labels))


def test_confusion_matrix_of_a_class_subset_shows_only_that():
    confusion = np.zeros((100, 100), int)
    confusion[3, 3], confusion[3, 7], confusion[23, 23] = 5, 1, 4
    figure = figures.confusion_matrix(
        confusion, FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF, "CIFAR-100"
    )
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["class 3", "class 23", "class 7"]


def test_confusion_matrix_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        figures.confusion_matrix(np.eye(3), FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF, "CIFAR-100")
    with pytest.raises(ValueError, match="no image"):
        figures.confusion_matrix(
            np.zeros((100, 100), int), FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF, "CIFAR-100"
        )


@pytest.mark.parametrize("classes", [100, 7, 1])
def test_bars_of_classes(classes):
    labels = np.arange(500) % classes
    probabilities = random_probabilities(500)
    table = evaluation.per_class(probabilities, labels, FINE_NAMES, COARSE_NAMES, SUPERCLASS_OF)
    figure = figures.per_class_bars(table, "CIFAR-100: accuracy of each class")
    widths = {
        label.get_text(): bar.get_width()
        for axes in figure.axes
        for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)
    }
    assert widths == pytest.approx(dict(zip(table["class"], table["recall"], strict=True)))
    assert_text_is_inside(figure)


def test_bars_of_superclasses_are_sorted():
    labels = np.arange(2000) % 100
    table = evaluation.per_superclass(
        random_probabilities(2000), labels, COARSE_NAMES, SUPERCLASS_OF
    )
    figure = figures.per_superclass_bars(table, "CIFAR-100")
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches[20:]]
    assert ends == pytest.approx(sorted(table["recall"]))


def test_reliability_diagram_skips_empty_bins():
    probabilities = np.full((4, 100), 0.3 / 99)
    probabilities[:, 0] = 0.7
    table = evaluation.reliability(probabilities, np.array([0, 0, 0, 1]))
    figure = figures.reliability_diagram(table, 0.05, "CIFAR-100: reliability")
    assert any("5.00%" in text for text in texts(figure))
    assert [bar.get_height() for bar in figure.axes[1].patches] == [4]


def test_every_pixel_of_a_picture_is_a_square_of_equal_size():
    images = random_images(5)
    figure = figures.picture_grid(images, list("abcde"), 3, "CIFAR-100: five")
    picture = rendered(figure)
    for image in images:
        enlarged = image.repeat(4, axis=0).repeat(4, axis=1)
        starts = np.argwhere((picture[:-127, :-127] == enlarged[0, 0]).all(axis=-1))
        assert any((picture[y : y + 128, x : x + 128] == enlarged).all() for y, x in starts)


def test_float_and_uint8_pictures_look_the_same():
    images = random_images(2)
    one = rendered(figures.picture_grid(images, None, 2, "CIFAR-100"))
    other = rendered(figures.picture_grid((images / 255).astype(np.float32), None, 2, "CIFAR-100"))
    assert np.abs(one.astype(int) - other).max() <= 1


def test_a_long_title_fits_over_few_pictures():
    title = "synthetic stand-in, not CIFAR-100: the first test image of each class"
    assert_text_is_inside(figures.picture_grid(random_images(1), ["a"], 8, title))


def test_augmentation_grid_puts_originals_first():
    originals, draws = random_images(2), random_images(2, 3)
    figure = figures.augmentation_grid(
        originals, draws, "CIFAR-100", row_labels=["a", "b"], column_labels=["x", "y", "z"]
    )
    shown = [image.get_array() for image in figure.axes[0].get_images()]
    np.testing.assert_array_equal(shown[0], originals[0])
    np.testing.assert_array_equal(shown[5], draws[1, 0])
    assert {"original", "a", "b", "x", "y", "z"} <= set(texts(figure))


def test_prediction_cards_say_right_and_wrong_in_words():
    probabilities = np.zeros((3, 100))
    probabilities[:, [4, 5, 6]] = 0.6, 0.3, 0.1
    figure = figures.prediction_cards(
        random_images(3),
        ["class 4", "class 5", None],
        probabilities,
        FINE_NAMES,
        "CIFAR-100: examples",
        notes=["first", "second", "third"],
    )
    found = texts(figure)
    assert "✓ class 4" in found
    assert "✗ class 5, taken for class 4" in found
    assert "predicted class 4" in found
    assert found.count("60%") == 3
    assert "second" in found


def test_network_diagram_draws_and_adds_up_every_layer():
    summary = pd.DataFrame(
        {
            "layer": ["a", "b", "c"],
            "kind": ["Conv2D 3x3 same", "GlobalAveragePooling2D", "Dense softmax"],
            "output_shape": [(16, 16, 8), (8,), (100,)],
            "parameters": [1000, 0, 234],
            "multiply_adds": [50_000, 0, 1],
            "receptive_field": [3, 32, 32],
        }
    )
    figure = figures.network_diagram(summary, (32, 32, 3), "A network, CIFAR-100")
    found = texts(figure)
    assert {"input", "16 x 16 x 8", "Dense softmax", "1,234", "50,001"} <= set(found)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([2.5, 1.25, 2.5 * 8**0.5 / 32, 2.5 * 10 / 32])
    with pytest.raises(ValueError, match="no layer"):
        figures.network_diagram(summary[:0], (32, 32, 3), "A network, CIFAR-100")


def trials(**columns):
    """A table of trials, complete unless said otherwise."""
    table = pd.DataFrame(columns)
    usual = {"trial": range(len(table)), "state": "complete", "val_loss": 2.0}
    return table.assign(**{name: value for name, value in usual.items() if name not in table})


def xs(axes, marker):
    return [x for line in axes.get_lines() if line.get_marker() == marker for x in line.get_xdata()]


def test_a_calibration_curve_shows_every_seed_the_mean_and_the_optimum():
    rates = [1e-4, 1e-3, 1e-2, 1e-3, 3e-3]
    table = trials(learning_rate=rates, val_accuracy=[0.2, 0.3, 0.01, 0.34, 0.5])
    table.loc[4, "state"] = "pruned"
    table.loc[2, "val_loss"] = 1e6
    figure = figures.calibration_curve(table, "learning_rate", "Rates, CIFAR-100")
    accuracy, loss = figure.axes
    assert accuracy.get_xscale() == "log"
    means = next(line for line in accuracy.get_lines() if line.get_label() == "mean")
    np.testing.assert_allclose(means.get_xydata(), [[1e-4, 0.2], [1e-3, 0.32], [1e-2, 0.01]])
    assert sorted(xs(accuracy, "o")) == sorted(rates)
    # The pruned trial is not the best, though its last value is.
    assert xs(accuracy, "*") == [1e-3]
    hollow = [line for line in accuracy.get_lines() if line.get_markerfacecolor() == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[3e-3]]
    # A loss that diverged does not press the others into a line.
    assert xs(loss, "^") == [1e-2]
    assert loss.get_ylim()[1] < 11
    found = texts(figure)
    assert "32.00% at learning rate 0.001" in found
    assert {"Rates, CIFAR-100", "learning rate", "validation accuracy"} <= set(found)
    assert {"one trial", "pruned, at its last epoch", "loss above 10"} <= set(found)
    assert_text_is_inside(figure)


@pytest.mark.parametrize(
    ("values", "log", "scale", "base"),
    [
        ([16, 32, 64], False, "log", 2),
        ([1e-4, 2e-4], True, "log", 10),
        ([1e-4, 2e-4], False, "linear", None),
        ([0.0, 10.0, 20.0], True, "linear", None),
        ([5, 60], False, "log", 10),
    ],
)
def test_a_calibration_curve_chooses_its_scale(values, log, scale, base):
    table = trials(batch_size=values, val_accuracy=0.1)
    figure = figures.calibration_curve(table, "batch_size", "CIFAR-100", log=log)
    axis = figure.axes[-1].xaxis
    assert axis.get_scale() == scale
    assert getattr(axis.get_transform(), "base", None) == base
    assert {f"{value:.3g}" for value in values} <= set(texts(figure))


def test_a_calibration_curve_of_batch_sizes_shows_time():
    table = trials(batch_size=[32, 64], val_accuracy=[0.3, 0.2], epoch_seconds=[50.0, 40.0])
    figure = figures.calibration_curve(
        table, "batch_size", "CIFAR-100", metrics=("val_accuracy", "epoch_seconds")
    )
    assert "50 s at batch size 32" in texts(figure)
    assert "training seconds an epoch" in texts(figure)


def test_a_calibration_curve_of_text_has_no_line():
    table = trials(optimizer=["sgd", "adam", "sgd"], val_accuracy=[0.3, 0.2, 0.4])
    figure = figures.calibration_curve(table, "optimizer", "CIFAR-100")
    means = next(line for line in figure.axes[0].get_lines() if line.get_label() == "mean")
    assert means.get_linestyle() == "None"
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["adam", "sgd"]
    assert "35.00% at optimizer sgd" in texts(figure)


def test_an_epochs_curve_marks_epochs_and_shades_the_gap():
    table = pd.concat([history(9).assign(trial=n) for n in (0, 1)])
    marks = {"best epoch": 6, "first within one standard error": 5}
    figure = figures.epochs_curve(table, marks, "Epochs, CIFAR-100")
    (axes,) = figure.axes
    assert (xs(axes, "*"), xs(axes, "D")) == ([6], [5])
    assert {"best epoch, 6: 50.00%", "training, mean of 2 seeds"} <= set(texts(figure))
    accuracies = table["accuracy"]
    (gap,) = axes.collections
    height = gap.get_paths()[0].get_extents().height
    assert height == pytest.approx(max(accuracies.max(), 0.5) - min(accuracies.min(), 0.495))
    assert xs(figures.epochs_curve(history(1).assign(trial=0), {"best epoch": 1}, "").axes[0], "o")


def test_a_search_history_shows_the_best_so_far():
    table = trials(val_accuracy=[0.2, 0.5, 0.1, np.nan, 0.3, 0.25, np.nan])
    table["state"] = ["complete", "pruned", "complete", "failed", "complete", "complete", "waiting"]
    figure = figures.search_history(table, "Search, CIFAR-100")
    (axes,) = figure.axes
    best = next(line for line in axes.get_lines() if line.get_label() == "best so far")
    assert list(best.get_ydata()) == [0.2, 0.2, 0.2, 0.2, 0.3, 0.3]
    assert (xs(axes, "*"), xs(axes, "x")) == ([4], [3])
    assert {"best, trial 4: 30.00%", "pruned, at its last epoch", "failed"} <= set(texts(figure))
    figure.canvas.draw()
    (legend,) = figure.legends
    assert 0 <= legend.get_window_extent().x0 < legend.get_window_extent().x1 <= figure.bbox.x1


def test_learning_curves_tell_the_pruned_and_colour_by_value():
    table = trials(learning_rate=[1e-4, 1e-2, 1e-4, 1e-3], val_accuracy=0.1)
    table["state"] = ["complete", "pruned", "complete", "running"]
    lengths = enumerate((4, 2, 4, 1))
    histories = pd.concat([history(length).assign(trial=n) for n, length in lengths])
    figure = figures.learning_curves(histories, table, "CIFAR-100", parameter="learning_rate")
    (axes,) = figure.axes
    drawn = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    curves = {(line.get_linestyle(), line.get_color()) for line in drawn if len(line.get_xdata())}
    assert {style for style, _ in curves} >= {"-", "--", ":"}
    assert len({color for _, color in curves}) == 3
    assert xs(axes, "x") == [2]
    assert {"learning rate", "0.0001", "0.01", "pruned", "not ended, or failed"} <= set(
        texts(figure)
    )
    plain = figures.learning_curves(histories, table, "CIFAR-100")
    assert "learning rate" not in texts(plain)


def test_learning_curves_of_many_values_have_a_colour_bar():
    table = trials(learning_rate=np.geomspace(1e-4, 1e-2, 9), val_accuracy=0.1)
    histories = pd.concat([history(3).assign(trial=n) for n in range(9)])
    figure = figures.learning_curves(histories, table, "CIFAR-100", parameter="learning_rate")
    _, bar = figure.axes
    assert bar.get_yscale() == "log"
    assert bar.get_ylabel() == "learning rate"


def test_parallel_coordinates_respect_scales_and_states():
    table = trials(
        learning_rate=[1e-4, 1e-3, 1e-2, 1e-3],
        optimizer=["adam", "sgd", "adam", "sgd"],
        val_accuracy=[0.1, 0.3, 0.2, 0.15],
    )
    table.loc[3, "state"] = "pruned"
    figure = figures.parallel_coordinates(
        table, ["learning_rate", "optimizer"], "Search, CIFAR-100"
    )
    axes, bar = figure.axes
    drawn = {line.get_ydata()[-1]: line for line in axes.get_lines() if len(line.get_xdata()) == 3}
    # From the least accuracy to the highest; rates a decade apart are as far from each other.
    assert sorted(drawn) == pytest.approx([0, 0.25, 0.5, 1])
    starts = [drawn[height].get_ydata()[0] for height in sorted(drawn)]
    assert starts == pytest.approx([0, 0.5, 1, 0.5], abs=0.05)
    assert [drawn[height].get_linestyle() for height in sorted(drawn)] == ["-", "--", "-", "-"]
    # Where a line meets the colour bar, it has its colour.
    assert drawn[1].get_color() == figures.COLORS(1.0)
    assert bar.get_ylabel() == "validation accuracy"
    assert {"0.0001", "0.01", "adam", "sgd", "optimizer"} <= set(texts(figure))
    assert_text_is_inside(figure)


def test_parallel_coordinates_name_what_is_true_and_false():
    table = trials(whitening=[True, False], mixing=["none", "mixup"], val_accuracy=[0.1, 0.2])
    figure = figures.parallel_coordinates(table, ["whitening", "mixing"], "CIFAR-100")
    assert {"True", "False", "none", "mixup"} <= set(texts(figure))


def test_parallel_coordinates_of_one_trial_are_drawn():
    table = trials(learning_rate=[1e-3], optimizer=["adam"], val_accuracy=[0.1])
    figure = figures.parallel_coordinates(table, ["learning_rate", "optimizer"], "CIFAR-100")
    assert {"0.001", "adam"} <= set(texts(figure))
    rendered(figure)


def test_importances_are_sorted_and_named():
    shares = pd.Series({"batch_size": 0.3, "learning_rate": 0.7})
    figure = figures.importances(shares, "CIFAR-100")
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.3, 0.7]
    named = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert named == ["batch size", "learning rate"]
    assert "70%" in texts(figure)


def test_training_speed_has_a_bar_for_each_recipe_backend_and_precision():
    rows = [
        (recipe, backend, precision, rate, 1.25 * rate)
        for recipe, rate in (("seed", 200.0), ("fast", 1234.0))
        for backend in ("tensorflow", "jax", "torch")
        for precision in ("bfloat16", "float32")
    ]
    columns = ["recipe", "backend", "precision"]
    columns += ["images_per_second", "trained_images_per_second"]
    figure = figures.training_speed(pd.DataFrame(rows, columns=columns), "2 threads")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [200.0] * 6 + [1234.0] * 6
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, True] * 6
    (marks,) = axes.get_lines()
    assert marks.get_xdata().tolist() == [250.0] * 6 + [1542.5] * 6
    assert axes.get_xlim()[1] > 1542.5
    assert {"seed", "fast", "tensorflow", "torch", "1,234", "2 threads"} <= set(texts(figure))
    rendered(figure)
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_step_times_stack_the_kinds_of_operations():
    times = {"convolution": 3.0, "filter gradient": 1.0, "the rest": 0.02}
    table = pd.DataFrame(
        {
            "network": network,
            "precision": precision,
            "kind": kind,
            "milliseconds_per_image": factor * time,
            "share": time / 4.02,
        }
        for network, precision, factor in (
            ("seed", "bfloat16", 1),
            ("seed", "float32", 2),
            ("airbench", "bfloat16", 0.5),
        )
        for kind, time in times.items()
    )
    figure = figures.step_times(table, "Where the time goes")
    (axes,) = figure.axes
    named = [label.get_text() for label in axes.get_yticklabels()]
    assert named == ["seed, bfloat16", "seed, float32", "airbench, bfloat16"]
    stacks = {
        bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars]
        for bars in axes.containers
    }
    assert set(stacks) == set(figures.KIND_COLORS)
    assert stacks["convolution"] == [(0, 3), (0, 6), (0, 1.5)]
    assert stacks["filter gradient"] == [(3, 1), (6, 2), (1.5, 0.5)]
    np.testing.assert_allclose(stacks["the rest"], [(4, 0.02), (8, 0.04), (2, 0.01)])
    assert axes.yaxis_inverted(), "the first is on top"
    assert texts(figure).count("75%") == 3
    assert "0%" not in texts(figure), "of parts that have no room"
    rendered(figure)
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    with pytest.raises(ValueError, match="no network"):
        figures.step_times(table[:0], "CIFAR-100")


def test_accuracy_by_minutes_has_a_point_a_run_and_an_entry_a_recipe():
    runs = pd.DataFrame(
        {
            "recipe": ["fast", "fast", "accurate"],
            "minutes": [2.5, 2.6, 13.0],
            "accuracy": [0.63, 0.64, 0.76],
        }
    )
    runs["accuracy_low"], runs["accuracy_high"] = runs["accuracy"] - 0.01, runs["accuracy"] + 0.01
    figure = figures.accuracy_by_minutes(runs, {"the deck": 0.6187}, "CIFAR-100")
    (axes,) = figure.axes
    points = [
        line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() != "None"
    ]
    assert [[2.5, 0.63], [2.6, 0.64]] in points
    assert {"fast, 2 seeds", "accurate", "the deck, 61.87%"} <= set(texts(figure))
    assert axes.get_xlim()[0] < 2.5
    assert axes.get_xlim()[1] > 13
    rendered(figure)
    with pytest.raises(ValueError, match="no run"):
        figures.accuracy_by_minutes(runs[:0], {}, "CIFAR-100")


def test_variants_are_ordered_by_their_mean_beside_the_first():
    table = trials(
        variant=["all", "less", "all", "more", "broken"],
        val_accuracy=[0.50, 0.40, 0.52, 0.60, np.nan],
        state=["complete"] * 4 + ["failed"],
    )
    figure = figures.variants(table, "CIFAR-100")
    axes, distances = figure.axes[0], figure.axes[0].child_axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["less", "all", "more"]
    labels = [label.get_text() for label in distances.get_yticklabels()]
    assert labels == ["-11.0", "", "+9.0"]
    dots, means, first = axes.get_lines()
    assert sorted(map(tuple, dots.get_xydata())) == [(0.4, 0), (0.5, 1), (0.52, 1), (0.6, 2)]
    assert means.get_xdata() == pytest.approx([0.4, 0.51, 0.6])
    assert first.get_xdata() == pytest.approx([0.51, 0.51])
    rendered(figure)


def test_variants_stand_alone_where_the_first_failed():
    table = trials(
        variant=["all", "less", "more"],
        val_accuracy=[np.nan, 0.40, 0.60],
        state=["failed", "complete", "complete"],
    )
    (axes,) = figures.variants(table, "CIFAR-100").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["less", "more"]
    assert not axes.child_axes
    assert len(axes.get_lines()) == 2


def test_figures_of_a_study_refuse_nothing():
    table = trials(learning_rate=[1e-3], val_accuracy=[0.1], state=["pruned"])
    for draw in (
        lambda: figures.calibration_curve(table, "learning_rate", "t"),
        lambda: figures.search_history(table, "t"),
        lambda: figures.variants(table.assign(variant="all"), "t"),
        lambda: figures.parallel_coordinates(table, ["learning_rate"], "t"),
    ):
        with pytest.raises(ValueError, match="no trial is complete"):
            draw()
    empty = pd.DataFrame({"trial": [], "epoch": [], "accuracy": [], "val_accuracy": []})
    with pytest.raises(ValueError, match="no epoch"):
        figures.epochs_curve(empty, {"best epoch": 1}, "t")
    with pytest.raises(ValueError, match="no epoch"):
        figures.learning_curves(empty, table, "t")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figures.picture_grid(random_images(), None, 3, "t"), r"\(32, 32, 3\)"),
        (lambda: figures.picture_grid(random_images(0), None, 3, "t"), r"\(0, 32, 32, 3\)"),
        (lambda: figures.picture_grid(random_images(2), ["a"], 3, "t"), "1 labels for 2 images"),
        (
            lambda: figures.picture_grid(random_images(2), None, 1, "t", row_labels=["a"]),
            "1 row_labels, expected 2",
        ),
        (
            lambda: figures.augmentation_grid(random_images(2), random_images(3, 4), "t"),
            "2 originals, but draws of 3",
        ),
        (
            lambda: figures.augmentation_grid(
                random_images(2), random_images(2, 4), "t", row_labels=["a"]
            ),
            "1 row_labels, expected 2",
        ),
        (
            lambda: figures.prediction_cards(
                random_images(2), ["a", "b"], np.ones((2, 3)), FINE_NAMES, "t"
            ),
            r"\(2, 3\)",
        ),
    ],
)
def test_bad_input_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_notebook_shows_a_figure_as_it_is_saved():
    figure = figures.picture_grid(random_images(2), None, 2, "CIFAR-100")
    shown, _ = DisplayFormatter().format(figure)
    picture = np.asarray(Image.open(io.BytesIO(shown["image/png"])).convert("RGB"))
    np.testing.assert_array_equal(picture, rendered(figure))


def test_figures_are_150_dpi_and_leave_pyplot_alone():
    assert figures.training_curves({"run": history(2)}, "CIFAR-100").dpi == 150
    assert plt.get_fignums() == []


def test_evaluation_and_figures_do_not_load_tensorflow():
    program = (
        "import sys, cifar_lib.evaluation, cifar_lib.figures;"
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
