"""Pictures: arrays and tables in, a matplotlib Figure out; nothing is written and pyplot is unused.

Every title is the caller's, because it must name the data set (`Dataset.title`).
"""

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.path import get_path_collection_extents
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import IdentityTransform
from PIL import Image

from cifar_lib.evaluation import wilson_interval

DPI = 150
_PALETTE = sns.color_palette("colorblind").as_hex()
# The same colour for the same thing in every figure.
TRAINING, VALIDATION, TEST, DECK = _PALETTE[0], _PALETTE[1], _PALETTE[2], _PALETTE[7]
RIGHT, WRONG = _PALETTE[2], _PALETTE[3]
SUPERCLASS_ONLY = _PALETTE[8]
BACKEND_COLORS = {"tensorflow": _PALETTE[5], "jax": _PALETTE[9], "torch": _PALETTE[4]}
# Of the kinds of operations in a step, in the order in which they are stacked.
KIND_COLORS = {
    "convolution": _PALETTE[0],
    "input gradient": _PALETTE[9],
    "filter gradient": _PALETTE[4],
    "matrix products": _PALETTE[3],
    "batch normalisation": _PALETTE[2],
    "activation and its gradient": _PALETTE[8],
    "pooling and its gradient": _PALETTE[5],
    "optimiser": _PALETTE[1],
    "the rest": _PALETTE[7],
}
# What marks the best of something, the next in importance, and a trial that was pruned.
STAR = {"marker": "*", "ms": 14, "mec": "black", "mew": 0.7, "linestyle": "none", "zorder": 4}
DIAMOND = STAR | {"marker": "D", "ms": 8}
PRUNED = {"mfc": "white", "mec": "0.4", "mew": 1.4}
# Of many values in order: without the yellow end of viridis, which is hardly seen on white.
COLORS = LinearSegmentedColormap.from_list("viridis", sns.color_palette("viridis", 256)[:225])
# Ten nats are twice the loss of guessing among 100 classes: what lies beyond has diverged.
LOSS_CEILING = 10
# Of each metric its name, its colour, the highest value that is drawn, and the form of its numbers.
METRICS = {
    "val_accuracy": ("validation accuracy", VALIDATION, np.inf, "{:.2%}"),
    "val_loss": ("validation loss (nats)", VALIDATION, LOSS_CEILING, "{:.3f} nats"),
    "epoch_seconds": ("training seconds an epoch", TRAINING, np.inf, "{:.3g} s"),
}

_STYLE = sns.axes_style("whitegrid") | {
    "axes.edgecolor": "0.6",
    "axes.titlesize": 10.5,
    "figure.titlesize": 12,
    "font.size": 10,
    "grid.color": "0.9",
    "hatch.linewidth": 0.8,
    "legend.framealpha": 0.95,
    "legend.edgecolor": "none",
}


@matplotlib.rc_context(_STYLE)
def training_curves(
    histories: Mapping[str, pd.DataFrame], title: str, deck: Mapping[str, float] | None = None
) -> Figure:
    """Draw accuracy above loss by epoch, for each run, three runs side by side.

    `histories` maps a run's label to its history: columns `epoch` (from 1), `loss`, `accuracy` and,
    where there is a validation set, `val_loss` and `val_accuracy`; then the epoch of the highest
    validation accuracy is marked. `deck` gives the deck's `accuracy` and `loss`, drawn as lines.
    Raises ValueError if there is no run or a run has no epoch.
    """
    _check_histories(histories)
    across = min(len(histories), 3)
    down = -(-len(histories) // across)
    figure = _figure(max(6.5, 4.6 * across), 6.2 * down, layout="constrained")
    first = (None, None)
    for number, (label, history) in enumerate(histories.items()):
        row, column = divmod(number, across)
        place = 2 * row * across + column + 1
        upper = figure.add_subplot(2 * down, across, place, sharey=first[0])
        lower = figure.add_subplot(2 * down, across, place + across, sharex=upper, sharey=first[1])
        first = (upper, lower) if number == 0 else first
        for axes, metric in ((upper, "accuracy"), (lower, "loss")):
            _curves(axes, history, metric)
            if deck:
                axes.axhline(deck[metric], color=DECK, linestyle=":", label=f"deck, {deck[metric]}")
            axes.legend(loc="best")
            axes.tick_params(labelleft=column == 0)
        upper.set_title(label)
        upper.tick_params(labelbottom=False)
        lower.set_xlabel("epoch")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if column == 0:
            upper.set_ylabel("accuracy")
            lower.set_ylabel("loss (nats)")
    first[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def overlaid_curves(
    histories: Mapping[str, pd.DataFrame], title: str, epochs: int | None = None
) -> Figure:
    """Draw accuracy and loss by epoch of any number of runs, all in the same two panels.

    `histories` is as in `training_curves`. Training is dashed, validation solid; each run has a
    colour of its own, and of a single run training and validation have their usual ones. The
    horizontal axis ends with `epochs`, or with the last epoch of any run. Everything has its place
    beforehand, so that it is drawn in a third of the time of `training_curves`.
    Raises ValueError if there is no run or a run has no epoch.
    """
    _check_histories(histories)
    validated = any("val_accuracy" in history for history in histories.values())
    handles, columns = _overlay_handles(list(histories), validated)
    legend = 0.22 * -(-len(handles) // columns)
    figure = _figure(9, 3.3 + legend)
    panels = figure.subplots(1, 2)
    bottom = (0.6 + legend) / figure.get_figheight()
    figure.subplots_adjust(0.075, bottom, 0.985, 1 - 0.6 / figure.get_figheight(), wspace=0.16)
    last = epochs or max(history["epoch"].max() for history in histories.values())
    for axes, metric in zip(panels, ("accuracy", "loss"), strict=True):
        for colors, history in zip(
            _overlay_colors(len(histories)), histories.values(), strict=True
        ):
            training, validation = colors
            # A line through one epoch is invisible, and dots on 200 epochs hide the line.
            look = {"marker": "o" if len(history) <= 30 else None, "ms": 3}
            axes.plot(history["epoch"], history[metric], color=training, linestyle="--", **look)
            if "val_accuracy" in history:
                axes.plot(history["epoch"], history[f"val_{metric}"], color=validation, **look)
        axes.set_xlim(1 - 0.03 * last, 1.03 * last)
        axes.set(xlabel="epoch", title=metric if metric == "accuracy" else "loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(handles=handles, loc="lower center", ncols=columns)
    figure.suptitle(title)
    return figure


def _overlay_colors(runs: int) -> list[tuple[Any, Any]]:
    """Of each run the colours of training and of validation."""
    if runs == 1:
        return [(TRAINING, VALIDATION)]
    palette = _PALETTE if runs <= len(_PALETTE) else COLORS(np.linspace(0, 1, runs))
    return [(color, color) for color in palette[:runs]]


def _overlay_handles(labels: list[str], validated: bool) -> tuple[list[Line2D], int]:
    """What the legend explains, and in how many columns."""
    colors = _overlay_colors(len(labels))
    kinds = {"training": "--", "validation": "-"} if validated else {"training": "--"}
    grey = colors[0] if len(labels) == 1 else ("0.3", "0.3")
    handles = [
        Line2D([], [], color=color, linestyle=line, label=label)
        for color, (label, line) in zip(grey, kinds.items(), strict=False)
    ]
    if len(labels) == 1:
        return handles, 2
    handles += [
        Line2D([], [], color=color, lw=4, label=label)
        for (color, _), label in zip(colors, labels, strict=True)
    ]
    width = max(_text_width(label, 10) for label in labels) + 70
    return handles, max(1, min(len(handles), int(9 * DPI / width)))


def _check_histories(histories: Mapping[str, pd.DataFrame]) -> None:
    if not histories or any(history.empty for history in histories.values()):
        empty = [label for label, history in histories.items() if history.empty]
        raise ValueError(f"nothing to draw: {empty or 'no run given'}, expected runs with epochs")


def _curves(axes: Axes, history: pd.DataFrame, metric: str) -> None:
    # A line through one epoch is invisible, and dots on 200 epochs hide the line.
    marker = "o" if len(history) <= 30 else None
    axes.plot(
        history["epoch"], history[metric], color=TRAINING, marker=marker, ms=4, label="training"
    )
    if "val_accuracy" not in history or history["val_accuracy"].isna().all():
        return
    validation = history[f"val_{metric}"]
    axes.plot(
        history["epoch"], validation, color=VALIDATION, marker=marker, ms=4, label="validation"
    )
    best = history["val_accuracy"].idxmax()
    epoch, value = history["epoch"][best], validation[best]
    axes.axvline(epoch, color=VALIDATION, linestyle="--", linewidth=1)
    label = f"best epoch, {epoch}: {value:.4f}"
    axes.plot([epoch], [value], color=VALIDATION, label=label, **STAR)


@matplotlib.rc_context(_STYLE)
def accuracy_by_minutes(runs: pd.DataFrame, marks: Mapping[str, float], title: str) -> Figure:
    """Draw the test accuracy of runs against the minutes that their training took.

    `runs` has a row a run: `recipe`, `minutes`, `accuracy` with its interval `accuracy_low` to
    `accuracy_high`. `marks` gives accuracies to draw as lines, by what they are called.
    Raises ValueError if there is no run.
    """
    if runs.empty:
        raise ValueError("nothing to draw: no run given")
    figure = _figure(6.5, 4.6, layout="constrained")
    axes = figure.subplots()
    recipes = runs.groupby("recipe", sort=False)
    markers = itertools.cycle("osD^vP")
    for (recipe, of_recipe), color, marker in zip(
        recipes, itertools.cycle(_PALETTE[:7]), markers, strict=False
    ):
        below = of_recipe["accuracy"] - of_recipe["accuracy_low"]
        above = of_recipe["accuracy_high"] - of_recipe["accuracy"]
        seeds = f", {len(of_recipe)} seeds" if len(of_recipe) > 1 else ""
        axes.errorbar(
            of_recipe["minutes"],
            of_recipe["accuracy"],
            yerr=[below, above],
            fmt=marker,
            color=color,
            capsize=3,
            label=f"{recipe}{seeds}",
        )
    for (name, accuracy), style in zip(marks.items(), itertools.cycle((":", "--")), strict=False):
        axes.axhline(accuracy, color=DECK, linestyle=style, label=f"{name}, {accuracy:.2%}")
    axes.set_xscale("log")
    axes.set_xlim(runs["minutes"].min() / 2, runs["minutes"].max() * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="best")
    axes.set_title(title)
    return figure


@matplotlib.rc_context(_STYLE)
def range_test(table: pd.DataFrame, suggestion: float | None, title: str) -> Figure:
    """Draw the loss of a learning-rate range test against the learning rate.

    `table` is what `training.range_test` returns, `suggestion` the learning rate to mark, if any.
    Raises ValueError for a table without a finite loss.
    """
    finite = table[np.isfinite(table["loss"]) & np.isfinite(table["smoothed"])]
    if finite.empty:
        raise ValueError(f"nothing to draw: none of {len(table)} losses is finite")
    figure = _figure(6.5, 4.2, layout="constrained")
    axes = figure.subplots()
    rates, smoothed = finite["learning_rate"], finite["smoothed"]
    axes.plot(
        rates, finite["loss"], ".", color=TRAINING, alpha=0.3, mew=0, label="loss of one batch"
    )
    axes.plot(rates, smoothed, color=TRAINING, linewidth=2, label="running mean")
    if suggestion is not None:
        axes.axvline(
            suggestion, color="black", linestyle="--", label=f"suggestion, {suggestion:.2g}"
        )
    axes.set_xscale("log")
    # A loss that diverges would press all that went before into a line.
    low, high = finite["loss"].min(), finite["loss"].iloc[: -(-len(finite) // 2)].max()
    margin = 0.05 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="learning rate", ylabel="loss (nats)")
    axes.legend(loc="best")
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def confusion_matrix(
    confusion: np.ndarray,
    fine_names: Sequence[str],
    coarse_names: Sequence[str],
    superclass_of: np.ndarray,
    title: str,
) -> Figure:
    """Draw which class (row) was taken for which (column), ordered by superclass.

    `confusion` is (K, K) int, rows true; `superclass_of` (K,) int. The colour is the share of the
    true class's images, the number their count. Classes neither shown nor predicted are left out.
    Raises ValueError if the shapes do not fit or there is no image.
    """
    confusion, superclass_of = np.asarray(confusion), np.asarray(superclass_of)
    expected = (len(fine_names), len(fine_names))
    if confusion.shape != expected or superclass_of.shape != expected[:1]:
        raise ValueError(
            f"confusion has the shape {confusion.shape} and superclass_of {superclass_of.shape}, "
            f"expected {expected} and {expected[:1]} for {len(fine_names)} names"
        )
    seen = np.flatnonzero(confusion.sum(axis=0) + confusion.sum(axis=1))
    if not len(seen):
        raise ValueError("confusion counts no image: nothing to draw")
    order = seen[np.argsort(superclass_of[seen], kind="stable")]
    counts = confusion[np.ix_(order, order)]
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [fine_names[i] for i in order]

    # Inches: cells as small as legible names allow, larger where there are few classes.
    cell = float(np.clip(4 / len(order), 0.175, 0.5))
    side, left, right, top, bottom = cell * len(order), 1.6, 1.8, 0.55, 1.55
    width, height = left + side + right, top + side + bottom
    figure = _figure(width, height)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    # In the corner below the superclass names, which is empty.
    bar = figure.add_axes(((left + side + 0.2) / width, 0.75 / height, 1.3 / width, 0.12 / height))
    sns.heatmap(
        share,
        ax=axes,
        mask=counts == 0,
        cmap="mako_r",
        # Mistakes are a few per cent each: the square root of the share makes them visible.
        norm=PowerNorm(0.5, 0, 1),
        annot=counts,
        fmt="d",
        annot_kws={"size": cell * 28},
        xticklabels=names,
        yticklabels=names,
        cbar_ax=bar,
        cbar_kws={
            "label": "share of the true\nclass's images",
            "format": PercentFormatter(1, decimals=0),
            "ticks": [0, 0.1, 0.5, 1],
            "orientation": "horizontal",
        },
    )
    axes.tick_params(labelsize=8.5, length=0, pad=2)
    axes.tick_params(axis="x", rotation=90)
    axes.tick_params(axis="y", rotation=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    axes.set(xlabel="predicted class", ylabel="true class")
    groups = superclass_of[order]
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1), len(order)]
    for start, stop in itertools.pairwise(edges):
        axes.axhline(stop, color="0.6", linewidth=0.6)
        axes.axvline(stop, color="0.6", linewidth=0.6)
        square = (start, start), stop - start, stop - start
        axes.add_patch(Rectangle(*square, fill=False, ec="black", clip_on=False, zorder=3))
        axes.text(
            len(order) + 0.07 / cell,
            (start + stop) / 2,
            textwrap.fill(coarse_names[groups[start]].replace("_", " "), 20),
            va="center",
            fontsize=9,
        )
    figure.text(
        0.5, 1 - 0.15 / height, title, ha="center", va="top", fontsize=9 + 0.05 * len(order)
    )
    return figure


@matplotlib.rc_context(_STYLE)
def reliability_diagram(table: pd.DataFrame, ece: float, title: str) -> Figure:
    """Draw accuracy against confidence, and below it how many images each bin holds.

    `table` is what `evaluation.reliability` returns, `ece` the expected calibration error (0..1).
    """
    figure = _figure(5.6, 6.8, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = table["confidence_high"] - table["confidence_low"]
    filled = table["images"] > 0
    bar = {"width": width[filled], "align": "edge", "edgecolor": "white", "linewidth": 0.5}
    left = table["confidence_low"][filled]
    accuracy, confidence = table["accuracy"][filled], table["confidence"][filled]
    upper.bar(left, accuracy, color=TEST, label="accuracy", **bar)
    upper.bar(
        left,
        confidence - accuracy,
        bottom=accuracy,
        color="none",
        hatch="////",
        label="gap to confidence",
        **bar | {"edgecolor": WRONG},
    )
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    upper.set(ylabel="accuracy in the bin", xlim=(0, 1), ylim=(0, 1))
    upper.set_title(f"expected calibration error {ece:.2%}")
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(title)
    lower.bar(left, table["images"][filled], color=TEST, **bar)
    lower.set(xlabel="confidence of the prediction", ylabel="images")
    return figure


@matplotlib.rc_context(_STYLE)
def per_class_bars(table: pd.DataFrame, title: str) -> Figure:
    """Draw the accuracy of each class, a panel for each superclass.

    `table` is what `evaluation.per_class` returns. Bars are recall with its 95 % interval, diamonds
    precision; panels come in order of their mean recall, best first.
    """
    means = table.groupby("superclass")["recall"].mean().sort_values(ascending=False)
    columns = min(4, len(means))
    rows = -(-len(means) // columns)
    tallest = table.groupby("superclass").size().max()
    # Inches. Placed by hand: a superclass's name is wider than its panel and begins above the names
    # of its classes, which matplotlib's own layout does not foresee.
    names, bar_width, right, head, panel = 1.55, 1.65, 0.3, 0.3, 0.235 * tallest
    width = max(columns * (names + bar_width + right), 5.2)
    top, bottom = 0.4, 0.75
    height = top + rows * (head + panel) + bottom
    figure = _figure(width, height)
    for i, (superclass, mean) in enumerate(means.items()):
        x = (i % columns) * (names + bar_width + right)
        y = height - top - (i // columns + 1) * (head + panel)
        axes = figure.add_axes(((x + names) / width, y / height, bar_width / width, panel / height))
        figure.text(
            (x + 0.1) / width, (y + panel + 0.07) / height, f"{superclass}: {mean:.0%}", size=10.5
        )
        group = table[table["superclass"] == superclass].sort_values("recall")
        low, high = _intervals(group["recall"], group["images"])
        bars = axes.barh(
            group["class"],
            group["recall"],
            color=TEST,
            xerr=(group["recall"] - low, high - group["recall"]),
            error_kw={"ecolor": "0.25", "elinewidth": 1},
        )
        (points,) = axes.plot(
            group["precision"],
            group["class"],
            "D",
            color="white",
            mec="black",
            ms=4.5,
            clip_on=False,
        )
        axes.set(xlim=(0, 1), ylim=(-0.6, tallest - 0.4), xticks=[0, 0.5, 1])
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.tick_params(labelbottom=i + columns >= len(means))
    figure.legend(
        [bars, points],
        ["accuracy (recall), with 95% interval", "precision"],
        loc="lower center",
        ncols=2,
    )
    figure.text(0.5, 1 - 0.08 / height, title, ha="center", va="top", fontsize=12)
    return figure


@matplotlib.rc_context(_STYLE)
def per_superclass_bars(table: pd.DataFrame, title: str) -> Figure:
    """Draw how often each superclass is found, and how often the very class.

    `table` is what `evaluation.per_superclass` returns. The whole bar is the superclass's recall,
    with its 95 % interval; its solid part the share whose class is right too.
    """
    table = table.sort_values("recall")
    low, high = _intervals(table["recall"], table["images"])
    figure = _figure(7.4, 1.6 + 0.27 * len(table), layout="constrained")
    axes = figure.subplots()
    axes.barh(table["superclass"], table["accuracy"], color=TEST, label="class right")
    axes.barh(
        table["superclass"],
        table["recall"] - table["accuracy"],
        left=table["accuracy"],
        color=SUPERCLASS_ONLY,
        edgecolor="white",
        hatch="////",
        linewidth=0,
        label="only superclass right",
        xerr=(table["recall"] - low, high - table["recall"]),
        error_kw={"ecolor": "0.25", "elinewidth": 1},
    )
    axes.set(xlim=(0, 1), ylim=(-0.6, len(table) - 0.4), xlabel="share of the superclass's images")
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def picture_grid(
    images: np.ndarray,
    labels: Sequence[str] | None,
    columns: int,
    title: str,
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Lay out pictures in rows of `columns`, each with its label below.

    `images` is (N, H, W, 3), uint8 or float in 0..1; `labels` N strings or None.
    Raises ValueError for another shape, no picture, or labels that do not fit.
    """
    images = _checked_images(images, 4)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} images: expected one for each")
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"{len(row_labels)} row_labels, expected {len(rows)}")
    return _mosaic(
        [[images[i] for i in row] for row in rows],
        title,
        captions=None if labels is None else [[labels[i] for i in row] for row in rows],
        row_labels=row_labels,
    )


@matplotlib.rc_context(_STYLE)
def augmentation_grid(
    originals: np.ndarray,
    draws: np.ndarray,
    title: str,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Figure:
    """Lay out each original beside its augmented draws.

    `originals` is (rows, H, W, 3), `draws` (rows, n, H, W, 3), each uint8 or float in 0..1;
    `column_labels` are for the draws. Raises ValueError for shapes or labels that do not fit.
    """
    originals, draws = _checked_images(originals, 4), _checked_images(draws, 5)
    if len(originals) != len(draws):
        raise ValueError(f"{len(originals)} originals, but draws of {len(draws)}: expected as many")
    for name, labels, count in (
        ("row_labels", row_labels, draws.shape[0]),
        ("column_labels", column_labels, draws.shape[1]),
    ):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {name}, expected {count}")
    return _mosaic(
        [[original, *row] for original, row in zip(originals, draws, strict=True)],
        title,
        row_labels=row_labels,
        column_labels=["original", *(column_labels or [""] * draws.shape[1])],
        first_column_apart=True,
    )


def _mosaic(
    pictures: Sequence[Sequence[np.ndarray]],
    title: str,
    *,
    captions: Sequence[Sequence[str]] | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    first_column_apart: bool = False,
) -> Figure:
    # Laid out in whole pixels of the figure, so that every pixel of a picture covers the same
    # number of them; matplotlib's own layout puts pictures at fractions of a pixel.
    side, gap, margin, line = 128, 10, 8, 19
    columns = max(map(len, pictures))
    picture_height = side * pictures[0][0].shape[0] // pictures[0][0].shape[1]
    row_texts = [_wrap(text, 230, 9) for text in row_labels or []]
    label_widths = [_text_width(text, 9) for lines in row_texts for text in lines]
    left = margin + (int(1.03 * max(label_widths)) + gap if label_widths else 0)
    apart = 2 * gap if first_column_apart else 0
    xs = [left + i * (side + gap) + (apart if i else 0) for i in range(columns)]
    title_lines = _wrap(title, max(xs[-1] + side - margin, 300), 12)
    title_width = max(int(_text_width(text, 12)) for text in title_lines)
    width = max(xs[-1] + side, margin + title_width) + margin

    top = margin + 30 * len(title_lines) + (line + 6 if column_labels else 0)
    wrapped = [[_wrap(text, side + gap - 4, 8) for text in row] for row in captions or []]
    ys = [top]
    for i in range(len(pictures)):
        below = line * max(map(len, wrapped[i])) + gap if wrapped else gap
        ys.append(ys[-1] + picture_height + below)
    height = ys.pop()

    figure = _figure(width / DPI, height / DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for row, (y, row_pictures) in enumerate(zip(ys, pictures, strict=True)):
        for column, (x, picture) in enumerate(zip(xs, row_pictures, strict=False)):
            extent = (x, x + side, y + picture_height, y)
            axes.imshow(picture, extent=extent, interpolation="nearest")
            # Line by line, because text of several lines has no baseline of its own.
            for i, text in enumerate(wrapped[row][column] if wrapped else []):
                baseline = y + picture_height + 16 + i * line
                axes.text(x + side / 2, baseline, text, ha="center", va="baseline", fontsize=8)
        if row_texts:
            text = "\n".join(row_texts[row])
            axes.text(left - gap, y + picture_height / 2, text, ha="right", va="center", fontsize=9)
    for x, text in zip(xs, column_labels or [], strict=False):
        axes.text(x + side / 2, top - 4, text, ha="center", va="bottom", fontsize=9)
    axes.text(margin, margin, "\n".join(title_lines), va="top", fontsize=12)
    # Last, because imshow sets the limits to the picture's own.
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


@matplotlib.rc_context(_STYLE)
def network_diagram(summary: pd.DataFrame, input_shape: tuple[int, int, int], title: str) -> Figure:
    """Draw a network from its input down to its classes, a bar for each layer.

    `summary` is what `models.summary` returns. A bar is as wide as the side of the layer's output
    (of a vector: as the square root of its length, at most the picture's side) and as thick as the
    logarithm of its channels.
    Raises ValueError for a network without layers.
    """
    if summary.empty:
        raise ValueError("summary has no layer: nothing to draw")
    widest = input_shape[0]
    rows = [("input", input_shape, 0, 0, 1), *summary.drop(columns="layer").itertuples(index=False)]
    pitch, top = 0.29, 0.75
    height = top + pitch * (len(rows) + 1) + 0.15
    figure = _figure(9.2, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    figure.text(0.1 / 9.2, 1 - 0.1 / height, title, va="top", fontsize=12)
    columns = {"layer": 2.75, "output": 5.75, "parameters": 6.75, "multiply-adds": 7.95}
    columns["receptive field"] = 9.1
    for heading, x in columns.items():
        align = "left" if heading == "layer" else "right"
        axes.text(x, 0.6, heading, ha=align, va="center", color="0.4", fontsize=9)
    axes.plot([1.35, 1.35], [top + pitch / 2, top + pitch * (len(rows) - 0.5)], color="0.25", lw=1)
    for number, (kind, shape, parameters, multiply_adds, field) in enumerate(rows):
        y = top + pitch * (number + 0.5)
        across = shape[0] if len(shape) == 3 else np.sqrt(shape[0])
        width = 2.5 * min(across / widest, 1)
        thickness = min(0.026 * np.log2(shape[-1]) if len(shape) == 3 else 0.05, pitch - 0.04)
        axes.add_patch(
            Rectangle(
                (1.35 - width / 2, y - thickness / 2),
                width,
                thickness,
                facecolor=_layer_color(kind),
                edgecolor="0.25",
                linewidth=0.6,
                zorder=3,
            )
        )
        texts = [
            kind,
            " x ".join(map(str, shape)),
            f"{parameters:,}" if parameters else "",
            f"{multiply_adds:,}" if multiply_adds else "",
            str(field),
        ]
        for (heading, x), text in zip(columns.items(), texts, strict=True):
            align = "left" if heading == "layer" else "right"
            axes.text(x, y, text, ha=align, va="center", fontsize=9)
    y = top + pitch * (len(rows) + 0.5)
    axes.plot(
        [columns["layer"], columns["receptive field"]], [y - pitch / 2] * 2, color="0.6", lw=0.8
    )
    totals = {"layer": "total"}
    totals["parameters"] = f"{summary['parameters'].sum():,}"
    totals["multiply-adds"] = f"{summary['multiply_adds'].sum():,}"
    for heading, text in totals.items():
        align = "left" if heading == "layer" else "right"
        axes.text(columns[heading], y, text, ha=align, va="center", fontsize=9, fontweight="bold")
    axes.set(xlim=(0, 9.2), ylim=(height, 0))
    return figure


def _layer_color(kind: str) -> str:
    for words, color in (
        (("Conv", "Dense", "Whitening"), _PALETTE[0]),
        (("Pool",), _PALETTE[1]),
        (("Dropout",), "0.85"),
    ):
        if any(word in kind for word in words):
            return color
    return "white"


@matplotlib.rc_context(_STYLE)
def prediction_cards(
    images: np.ndarray,
    true_names: Sequence[str | None],
    probabilities: np.ndarray,
    fine_names: Sequence[str],
    title: str,
    notes: Sequence[str] | None = None,
) -> Figure:
    """Show each picture with its true class and the five likeliest classes as bars.

    `images` is (N, H, W, 3), uint8 or float in 0..1; `true_names` N class names, None where the
    truth is unknown; `probabilities` (N, K); `notes` a line for below each picture.
    The true class's bar is hatched and its name bold; a tick or a cross says right or wrong.
    Raises ValueError for shapes that do not fit.
    """
    images, probabilities = _checked_images(images, 4), np.asarray(probabilities)
    expected = (len(images), len(fine_names))
    if probabilities.shape != expected or len(true_names) != len(images):
        raise ValueError(
            f"probabilities of the shape {probabilities.shape} and {len(true_names)} true names, "
            f"expected {expected} and {len(images)}"
        )
    likeliest = np.argsort(-probabilities, axis=1, kind="stable")[:, :5]
    verdicts = []
    for true, best in zip(true_names, likeliest, strict=True):
        predicted = fine_names[best[0]]
        if true is None:
            verdicts.append((f"predicted {predicted}", "black"))
        elif true == predicted:
            verdicts.append((f"✓ {true}", RIGHT))
        else:
            verdicts.append((f"✗ {true}, taken for {predicted}", WRONG))

    # In pixels, as in _mosaic; a picture's pixel covers 6 of the figure's. Bold text is wider than
    # what is measured.
    side, bar_width, foot, margin, bold = 192, 210, 34, 16, 1.2
    longest = max(_text_width(fine_names[j], 9) for j in np.unique(likeliest))
    name_width = max(215, int(bold * longest) + margin)
    verdict_width = (side + name_width + bar_width + margin) / bold
    lines = [_wrap(verdict, verdict_width, 10.5) for verdict, _ in verdicts]
    head = 20 + 24 * max(map(len, lines))
    card = (side + name_width + bar_width + 3 * margin, head + side + foot)
    columns = min(2, len(images))
    rows = -(-len(images) // columns)
    width, top = columns * card[0] + margin, 48
    height = top + rows * card[1]
    figure = _figure(width / DPI, height / DPI)

    def add_axes(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    figure.text(margin / width, 1 - 12 / height, title, va="top", fontsize=12)
    for i, (image, true) in enumerate(zip(images, true_names, strict=True)):
        x = margin + (i % columns) * card[0]
        y = top + (i // columns) * card[1]
        picture = add_axes(x, y + head, side, side)
        picture.imshow(image, interpolation="nearest")
        picture.axis("off")
        figure.text(
            x / width,
            1 - (y + head - 10) / height,
            "\n".join(lines[i]),
            color=verdicts[i][1],
            fontsize=10.5,
            fontweight="bold",
        )
        best = likeliest[i]
        bars = add_axes(x + side + name_width, y + head, bar_width, side)
        _card_bars(bars, [fine_names[j] for j in best], probabilities[i, best], true)
        if notes is not None:
            figure.text(
                x / width, 1 - (y + head + side + 6) / height, notes[i], va="top", fontsize=9
            )
    return figure


def _card_bars(axes: Axes, names: list[str], values: np.ndarray, true: str | None) -> None:
    colors = [RIGHT if name == true else "0.7" for name in names]
    if true is not None and names[0] != true:
        colors[0] = WRONG
    bars = axes.barh(range(len(names)), values, color=colors, edgecolor="white", linewidth=0)
    axes.set(xlim=(0, 1.32), ylim=(len(names) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        axes.text(value + 0.03, i, f"{value:.0%}", va="center", fontsize=9)
        if name == true:
            bars[i].set_hatch("////")
            axes.get_yticklabels()[i].set_fontweight("bold")


@matplotlib.rc_context(_STYLE)
def calibration_curve(
    trials: pd.DataFrame,
    parameter: str,
    title: str,
    *,
    metrics: Sequence[str] = ("val_accuracy", "val_loss"),
    log: bool = False,
) -> Figure:
    """Draw what a study measured against the parameter that it varied, a panel for each metric.

    `trials` is `calibration.Results.trials`: of each trial its `state`, `val_accuracy` (0..1), the
    column `parameter` (numbers or text) and the `metrics`, of `val_accuracy`, `val_loss` (nats) and
    `epoch_seconds`. Complete trials are dots, a line joins their means, and a star stands above the
    value with the highest mean `val_accuracy`. Pruned trials are hollow, at their last value.
    `log` asks for a logarithmic axis; values over more than a decade, and powers of 2, get one
    anyway. Losses beyond `LOSS_CEILING` are triangles at that height.
    Raises ValueError if no trial is complete.
    """
    trials = trials[trials["state"].isin(["complete", "pruned"])]
    if not trials["state"].eq("complete").any():
        raise ValueError(f"no trial is complete: nothing to draw for {parameter}")
    values = sorted(trials[parameter].unique())
    numeric = pd.api.types.is_numeric_dtype(trials[parameter])
    trials = trials.assign(x=trials[parameter] if numeric else trials[parameter].map(values.index))
    complete, pruned = (trials[trials["state"] == state] for state in ("complete", "pruned"))
    best = complete.groupby("x")["val_accuracy"].mean().idxmax()
    figure = _figure(6.5, 1 + 2.6 * len(metrics), layout="constrained")
    panels = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    shown = {}
    for axes, metric in zip(panels, metrics, strict=True):
        name, color, ceiling, form = METRICS[metric]
        means = complete.groupby("x")[metric].mean()
        # Text has no order that a line could follow.
        look = {"linestyle": "-"} if numeric else {"linestyle": "none", "marker": "_", "ms": 24}
        axes.plot(means.clip(upper=ceiling), color=color, label="mean", **look)
        axes.axvline(best, color=color, linestyle="--", linewidth=1)
        _dots(axes, complete, metric, {"color": color, "mec": "white", "mew": 0.6}, "one trial")
        _dots(axes, pruned, metric, PRUNED, "pruned, at its last epoch")
        value = _number(best if numeric else values[best])
        axes.set_title(f"{form.format(means[best])} at {_words(parameter)} {value}")
        axes.set_ylabel(name)
        if "%" in form:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True)) | shown
    # Above the dots, which it would hide.
    above = {"transform": panels[0].get_xaxis_transform(), "label": "highest mean accuracy"}
    (star,) = panels[0].plot([best], [0.93], color=METRICS[metrics[0]][1], **above, **STAR)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, high + 0.14 * (high - low))
    shown[star.get_label()] = star
    if numeric:
        _number_axis(panels[-1], values, log)
    else:
        panels[-1].set_xticks(range(len(values)), values)
        panels[-1].set_xlim(-0.5, len(values) - 0.5)
    panels[-1].set_xlabel(_words(parameter))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def variants(trials: pd.DataFrame, title: str) -> Figure:
    """Draw the validation accuracy of a study's variants, a row each, the best on top.

    `trials` is `calibration.Results.trials`, with the column `variant`. Complete trials are dots, a
    tick is their mean; the dashed line is the mean of the study's first variant, from which the
    rows state their distance in percentage points; it is left out if all of its trials failed.
    Raises ValueError if no trial is complete.
    """
    complete = trials[trials["state"] == "complete"]
    if complete.empty:
        raise ValueError("no trial is complete: nothing to draw of the variants")
    means = complete.groupby("variant", sort=False)["val_accuracy"].mean()
    first = means.get(trials["variant"].iloc[0])
    means = means.sort_values()
    figure = _figure(8, 1.6 + 0.34 * len(means), layout="constrained")
    axes = figure.subplots()
    rows = complete["variant"].map(list(means.index).index)
    color = METRICS["val_accuracy"][1]
    axes.plot(
        complete["val_accuracy"], rows, "o", color=color, mec="white", mew=0.6, label="one trial"
    )
    ticks = {"marker": "|", "ms": 16, "mew": 2, "linestyle": "none", "color": "black"}
    axes.plot(means, range(len(means)), label="mean", **ticks)
    axes.set_yticks(range(len(means)), means.index)
    if first is not None:
        axes.axvline(first, color="0.4", linestyle="--", linewidth=1)
        axes.secondary_yaxis("right").set_yticks(
            range(len(means)),
            ["" if mean == first else f"{100 * (mean - first):+.1f}" for mean in means],
        )
    axes.set_ylim(-0.6, len(means) - 0.4)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("validation accuracy")
    figure.legend(loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


def _dots(axes: Axes, trials: pd.DataFrame, metric: str, look: dict, label: str) -> None:
    ceiling = METRICS[metric][2]
    inside = trials[trials[metric] <= ceiling]
    beyond = trials[trials[metric] > ceiling]
    style = {"marker": "o", "ms": 7, "linestyle": "none", "zorder": 3} | look
    if len(inside):
        axes.plot(inside["x"], inside[metric], label=label, **style)
    if len(beyond):
        label = f"loss above {ceiling:g}"
        axes.plot(beyond["x"], [ceiling] * len(beyond), label=label, **style | {"marker": "^"})


@matplotlib.rc_context(_STYLE)
def epochs_curve(histories: pd.DataFrame, marks: Mapping[str, int], title: str) -> Figure:
    """Draw training and validation accuracy by epoch, means over seeds, and the gap between them.

    `histories` has the columns `trial`, `epoch` (from 1), `accuracy` and `val_accuracy`, and for
    each trial the same epochs; each trial is a faint line. `marks` maps what to mark on the curve
    of the validation accuracy to its epoch, the best epoch first.
    Raises ValueError if there is no epoch.
    """
    if histories.empty:
        raise ValueError("histories has no epoch: nothing to draw")
    figure = _figure(6.5, 4.6, layout="constrained")
    axes = figure.subplots()
    means = histories.groupby("epoch")[["accuracy", "val_accuracy"]].mean()
    trials = histories["trial"].nunique()
    marker = "o" if len(means) <= 30 else None
    for metric, color, label in (
        ("accuracy", TRAINING, "training"),
        ("val_accuracy", VALIDATION, "validation"),
    ):
        if trials > 1:
            for _, history in histories.groupby("trial"):
                axes.plot(history["epoch"], history[metric], color=color, alpha=0.35, linewidth=0.8)
            label = f"{label}, mean of {trials} seeds"
        axes.plot(means[metric], color=color, marker=marker, ms=4, label=label)
    axes.fill_between(
        means.index,
        means["accuracy"],
        means["val_accuracy"],
        color="0.5",
        alpha=0.15,
        linewidth=0,
        label="gap between them",
    )
    for (label, epoch), look in zip(marks.items(), (STAR, DIAMOND), strict=False):
        value = means["val_accuracy"][epoch]
        axes.axvline(epoch, color=VALIDATION, linestyle="--", linewidth=1)
        axes.plot(
            [epoch], [value], color=VALIDATION, label=f"{label}, {epoch}: {value:.2%}", **look
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="epoch", ylabel="accuracy")
    axes.legend(loc="best")
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def search_history(trials: pd.DataFrame, title: str) -> Figure:
    """Draw the validation accuracy of each trial in the order of the search, and the best so far.

    `trials` has a row a trial with its number `trial`, `state` and `val_accuracy` (0..1). Pruned
    trials are hollow, at their last epoch's value; failed ones are crosses at the bottom.
    Raises ValueError if no trial is complete.
    """
    trials = trials.sort_values("trial").assign(x=trials["trial"])
    complete = trials[trials["state"] == "complete"]
    if complete.empty:
        raise ValueError("no trial is complete: nothing to draw")
    figure = _figure(6.5, 4.4, layout="constrained")
    axes = figure.subplots()
    running = complete.set_index("trial")["val_accuracy"].cummax()
    # As far as the search has come, not only to its last complete trial.
    ended = trials.loc[trials["state"].isin(["complete", "pruned", "failed"]), "trial"]
    running = running.reindex(range(running.index[0], ended.max() + 1)).ffill()
    axes.plot(running, color=VALIDATION, drawstyle="steps-post", label="best so far")
    look = {"color": VALIDATION, "mec": "white", "mew": 0.6}
    _dots(axes, complete, "val_accuracy", look, "complete")
    pruned = trials[trials["state"] == "pruned"]
    _dots(axes, pruned, "val_accuracy", PRUNED, "pruned, at its last epoch")
    failed = trials.loc[trials["state"] == "failed", "trial"]
    if len(failed):
        axes.plot(
            failed,
            [0.03] * len(failed),
            "x",
            color=WRONG,
            ms=8,
            mew=2,
            transform=axes.get_xaxis_transform(),
            label="failed",
        )
    best = complete.loc[complete["val_accuracy"].idxmax()]
    label = f"best, trial {best['trial']}: {best['val_accuracy']:.2%}"
    axes.plot([best["trial"]], [best["val_accuracy"]], color=VALIDATION, label=label, **STAR)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="trial", ylabel="validation accuracy")
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def learning_curves(
    histories: pd.DataFrame,
    trials: pd.DataFrame,
    title: str,
    *,
    parameter: str | None = None,
    log: bool = False,
) -> Figure:
    """Draw the validation accuracy of all trials of a study by epoch.

    `histories` has the columns `trial`, `epoch` (from 1) and `val_accuracy` (0..1); `trials` the
    columns `trial`, `state` and `parameter`, whose numbers decide a line's colour. Complete trials
    are solid; pruned ones faint and dashed with a cross at their end; others dotted.
    `log` spreads the colours by ratios, as `calibration_curve` its axis.
    Raises ValueError if there is no epoch.
    """
    trials = trials.set_index("trial")
    histories = histories[histories["trial"].isin(trials.index)]
    if histories.empty:
        raise ValueError("histories has no epoch: nothing to draw")
    figure = _figure(6.5, 4.6, layout="constrained")
    axes = figure.subplots()
    shown = trials.loc[histories["trial"].unique()]
    norm = _number_norm(shown[parameter], log) if parameter else None
    looks = {
        "complete": {"linestyle": "-"},
        "pruned": {"linestyle": "--", "alpha": 0.55, "linewidth": 1.2},
        "not ended, or failed": {"linestyle": ":"},
    }
    handles = {}
    for number, history in histories.groupby("trial"):
        state = trials["state"][number]
        state = state if state in looks else "not ended, or failed"
        color = COLORS(norm(trials[parameter][number])) if parameter else VALIDATION
        epochs, accuracies = history["epoch"], history["val_accuracy"]
        # A line through one epoch is invisible.
        marker = "o" if len(history) == 1 else None
        axes.plot(epochs, accuracies, color=color, marker=marker, ms=4, **looks[state])
        cross = {"marker": "x", "ms": 7, "mew": 1.8} if state == "pruned" else {}
        axes.plot(epochs.iloc[-1:], accuracies.iloc[-1:], color=color, **cross)
        in_general = {"color": "0.3" if parameter else VALIDATION, "label": state}
        handles[state] = Line2D([], [], **looks[state], **in_general, **cross)
    values = sorted(shown[parameter].unique()) if parameter else []
    if len(values) > 8:
        figure.colorbar(ScalarMappable(norm, COLORS), ax=axes, label=_words(parameter))
    elif parameter:
        lines = [Line2D([], [], color=COLORS(norm(v)), label=_number(v), lw=4) for v in values]
        figure.legend(handles=lines, loc="outside right center", title=_words(parameter))
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def parallel_coordinates(
    trials: pd.DataFrame, parameters: Sequence[str], title: str, *, log: Sequence[str] = ()
) -> Figure:
    """Draw each trial as a line over the studied parameters to its validation accuracy.

    `trials` has a row a trial with `state`, `val_accuracy` (0..1) and `parameters`, numbers or
    text; those in `log`, and numbers over more than a decade, have logarithmic scales. The colour
    is the accuracy's; pruned trials are dashed and grey. Others than these two are left out.
    Lines through one value are spread a little, so that each is seen.
    Raises ValueError if no trial is complete or there is no parameter.
    """
    trials = trials[trials["state"].isin(["complete", "pruned"])].sort_values("val_accuracy")
    if not len(parameters) or not trials["state"].eq("complete").any():
        raise ValueError(f"no trial is complete over {list(parameters)}: nothing to draw")
    left, right, top, bottom = 0.85, 1.1, 0.45, 0.75
    width, height = max(6.5, left + right + 1.25 * len(parameters)), 4.4
    figure = _figure(width, height)
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
    axes = figure.add_axes(box)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlim=(0, len(parameters)), ylim=(-0.04, 1.04), yticks=[])
    axes.set_xticks(range(len(parameters)), [_words(name) for name in parameters])
    axes.tick_params(axis="x", length=0, pad=8)
    heights = pd.DataFrame(index=trials.index)
    for i, name in enumerate(parameters):
        heights[name], ticks = _scale(trials[name], name in log)
        shared = trials[name].duplicated(keep=False)
        heights.loc[shared, name] += np.linspace(-0.03, 0.03, shared.sum())
        axes.axvline(i, color="0.3", linewidth=1, zorder=1)
        for label, y in ticks.items():
            axes.plot([i - 0.02, i], [y, y], color="0.3", linewidth=1, clip_on=False)
            axes.text(
                *(i - 0.04, y, label),
                **{"ha": "right", "va": "center", "fontsize": 9, "zorder": 4},
                bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.9},
            )
    # The colour bar is the last of the axes: where a line meets it, it has the bar's colour.
    norm = _padded_norm(trials["val_accuracy"])
    heights["val_accuracy"] = norm(trials["val_accuracy"].to_numpy())
    for index, line in heights.iterrows():
        complete = trials["state"][index] == "complete"
        look = {"color": COLORS(line["val_accuracy"]), "linewidth": 1.8, "zorder": 2}
        if not complete:
            look = {"color": PRUNED["mec"], "linewidth": 1, "linestyle": "--", "zorder": 1}
        axes.plot(range(len(line)), line, **look)
    padding = 0.04 / 1.08 * box[3]
    bar = figure.add_axes((box[0] + box[2], box[1] + padding, 0.18 / width, box[3] - 2 * padding))
    figure.colorbar(
        ScalarMappable(norm, COLORS),
        cax=bar,
        format=PercentFormatter(1),
        label=METRICS["val_accuracy"][0],
    )
    handles = [Line2D([], [], color=COLORS(0.6), lw=1.8, label="complete")]
    if trials["state"].eq("pruned").any():
        pruned = {"color": PRUNED["mec"], "lw": 1, "ls": "--"}
        handles.append(Line2D([], [], **pruned, label="pruned, at its last epoch"))
    figure.legend(handles=handles, loc="lower center", ncols=2)
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def importances(shares: pd.Series, title: str) -> Figure:
    """Draw which share of the accuracy's variance each parameter explains, as bars.

    `shares` has a share (0..1) by parameter, as `calibration.importances` gives it.
    """
    shares = shares.sort_values()
    figure = _figure(6.5, 1.3 + 0.4 * len(shares), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([_words(name) for name in shares.index], shares, color=VALIDATION)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=4)
    axes.set(xlim=(0, 1.08), xticks=np.linspace(0, 1, 6))
    axes.set_xlabel("share of the variance of the validation accuracy")
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def training_speed(table: pd.DataFrame, title: str) -> Figure:
    """Draw the images a second that recipes train on, as bars by backend and precision.

    `table` has a row a bar with `recipe`, `backend` (one of `BACKEND_COLORS`), `precision`
    ("float32" is hatched), `images_per_second` and `trained_images_per_second`, which is marked:
    the rate without making the batches.
    """
    table = table.sort_values("recipe", kind="stable", key=lambda names: pd.factorize(names)[0])
    # A bar is 1 high, and half of that lies between recipes.
    heights = np.arange(len(table)) + 0.5 * pd.factorize(table["recipe"])[0]
    figure = _figure(6.8, 1.7 + 0.27 * (heights[-1] + 1), layout="constrained")
    axes = figure.subplots()
    colors = table["backend"].map(BACKEND_COLORS)
    hatches = ["////" if precision == "float32" else "" for precision in table["precision"]]
    rates = table["images_per_second"]
    axes.barh(heights, rates, 0.86, color=colors, hatch=hatches, ec="white", linewidth=0)
    marked = {"marker": "|", "ms": 9, "mew": 1.6, "color": "black", "linestyle": "none"}
    axes.plot(table["trained_images_per_second"], heights, **marked)
    ends = np.maximum(rates, table["trained_images_per_second"])
    for end, rate, height in zip(ends, rates, heights, strict=True):
        text = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(f"{rate:,.0f}", (end, height), (5, 0), **text)
    middles = pd.Series(heights).groupby(table["recipe"].to_numpy(), sort=False).mean()
    axes.set_yticks(middles, middles.index)
    axes.set(xlabel="training images a second", xlim=(0, 1.14 * ends.max()))
    axes.set_ylim(heights[-1] + 0.75, -0.75)
    axes.grid(axis="y", visible=False)
    shown = [backend for backend in BACKEND_COLORS if backend in set(table["backend"])]
    handles = [Patch(color=BACKEND_COLORS[backend], label=backend) for backend in shown]
    if any(hatches):
        handles.append(Patch(fc="0.7", ec="white", hatch="////", label="in float32"))
    handles.append(Line2D([], [], **marked, label="without making the batches"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


@matplotlib.rc_context(_STYLE)
def step_times(table: pd.DataFrame, title: str) -> Figure:
    """Draw where the time of a training step goes, a stacked bar for each network and precision.

    `table` has a row for each kind of operation of each bar: `network`, `precision`, `kind` (one of
    `KIND_COLORS`), `milliseconds_per_image`, and `share` (0..1) of the bar, which is written into
    parts that have room for it. Raises ValueError if there is no row.
    """
    if table.empty:
        raise ValueError("nothing to draw: no network was measured")
    bars = table["network"] + ", " + table["precision"]
    names = list(bars.unique())
    figure = _figure(7.2, 1.9 + 0.36 * len(names), layout="constrained")
    axes = figure.subplots()
    ends = np.zeros(len(names))
    longest = table["milliseconds_per_image"].groupby(bars).sum().max()
    for kind, color in KIND_COLORS.items():
        of_kind = table[table["kind"] == kind].set_index(bars[table["kind"] == kind])
        parts = of_kind["milliseconds_per_image"].reindex(names, fill_value=0.0)
        drawn = axes.barh(names, parts, 0.8, ends, color=color, ec="white", lw=0.5, label=kind)
        shares = of_kind["share"].reindex(names, fill_value=0.0)
        room = parts > 0.05 * longest
        texts = [f"{share:.0%}" if fits else "" for share, fits in zip(shares, room, strict=True)]
        dark = np.dot(to_rgb(color), (0.299, 0.587, 0.114)) < 0.45
        ink = "white" if dark else "black"
        axes.bar_label(drawn, texts, label_type="center", fontsize=8.5, color=ink)
        ends = ends + parts.to_numpy()
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a training step, an image")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


def _is_log(values: Sequence[float], log: bool) -> bool:
    low, high = min(values), max(values)
    return low > 0 and low < high and (log or high / low > 10)


def _number_axis(axes: Axes, values: Sequence[float], log: bool) -> None:
    """Scale the x axis for the values that a study tried, and name these if there is room."""
    doubled = len(values) > 1 and all(value > 0 and np.log2(value) % 1 == 0 for value in values)
    positions = np.array(values, float)
    if doubled or _is_log(values, log):
        axes.set_xscale("log", base=2 if doubled else 10)
        positions = np.log(positions)
    room = np.diff(positions).min(initial=np.inf) / max(np.ptp(positions), 1e-12)
    if len(values) <= 9 and room > 0.09:
        axes.set_xticks(values, [_number(value) for value in values])
        axes.xaxis.set_minor_locator(NullLocator())


def _number_norm(values: pd.Series, log: bool) -> Normalize:
    norm = LogNorm if _is_log(values, log) else Normalize
    return norm(values.min(), values.max())


def _padded_norm(values: pd.Series) -> Normalize:
    low, high = values.min(), values.max()
    # A bar from one value to the same has no length.
    margin = 0.005 if low == high else 0
    return Normalize(low - margin, high + margin)


def _scale(values: pd.Series, log: bool) -> tuple[pd.Series, dict[str, float]]:
    """Heights in 0..1 for values, and labels with their heights for the axis beside them."""
    unique = sorted(values.unique())
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        places = {str(value): i for i, value in enumerate(unique)}
        last = max(len(unique) - 1, 1)
        ticks = {value: i / last if len(unique) > 1 else 0.5 for value, i in places.items()}
        return values.astype(str).map(ticks), ticks
    if len(unique) == 1:
        return values * 0.0 + 0.5, {_number(unique[0]): 0.5}
    transform = np.log if _is_log(unique, log) else np.asarray
    low, high = transform(unique[0]), transform(unique[-1])

    def height(value: Any) -> Any:
        return (transform(value) - low) / (high - low)

    marks = unique
    if len(unique) > 5 or np.diff(height(np.array(unique, float))).min() < 0.07:
        rounds = LogLocator(subs=(1, 2, 5)) if transform is np.log else MaxNLocator(4)
        inside = rounds.tick_values(unique[0], unique[-1])
        marks = [mark for mark in inside if unique[0] <= mark <= unique[-1]]
    return height(values), {_number(mark): float(height(mark)) for mark in marks}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _NotebookFigure(Figure):
    """A figure that a notebook shows as it is saved, without pyplot and its cropping."""

    _png: bytes | None = None

    def savefig(self, fname: str | Path | io.BytesIO, **settings: object) -> None:
        """Save; a PNG as small as can be, which for a chart means a palette of 256 colours."""
        to_png = isinstance(fname, io.BytesIO) or Path(fname).suffix.lower() == ".png"
        if settings or not to_png:
            super().savefig(fname, **settings)
        elif isinstance(fname, io.BytesIO):
            fname.write(self._repr_png_())
        else:
            Path(fname).write_bytes(self._repr_png_())

    def _repr_png_(self) -> bytes:
        if self._png is None or self.stale:
            self.canvas.draw()
            image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
            if not any(axes.images for axes in self.axes):
                image = image.quantize(256, dither=Image.Dither.NONE)
            file = io.BytesIO()
            image.save(file, "PNG", optimize=True, dpi=(DPI, DPI))
            # What is changed from now on makes it stale again.
            self._png, self.stale = file.getvalue(), False
        return self._png


def _figure(width: float, height: float, layout: str | None = None) -> Figure:
    figure = _NotebookFigure(figsize=(width, height), dpi=DPI, layout=layout)
    # Without a canvas that draws, matplotlib renders the figure anew for each text it measures,
    # as seaborn does with every label of a heatmap.
    FigureCanvasAgg(figure)
    return figure


def _text_width(text: str, size: float) -> float:
    if not text:
        return 0
    # The path's own `get_extents` finds the same in ten times the time.
    path, unmoved = TextPath((0, 0), text, size=size), IdentityTransform()
    return get_path_collection_extents(unmoved, [path], [], [(0, 0)], unmoved).width * DPI / 72


def _wrap(text: str, width: float, size: float) -> list[str]:
    # By measured width in pixels, unlike textwrap, because "mm" is as wide as "lilil".
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            if lines[-1] and _text_width(f"{lines[-1]} {word}", size) > width:
                lines.append(word)
            else:
                lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _intervals(share: pd.Series, images: pd.Series) -> np.ndarray:
    right = (share * images).round().astype(int)
    return np.array([wilson_interval(*pair) for pair in zip(right, images, strict=True)]).T


def _checked_images(images: np.ndarray, dimensions: int) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != dimensions or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images have the shape {images.shape}, expected {dimensions} dimensions, "
            "none empty, the last 3 (red, green, blue)"
        )
    return images
