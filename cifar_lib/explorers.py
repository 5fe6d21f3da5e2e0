"""What can be watched and operated in JupyterLab: data, augmentation, training, runs, predictions.

An explorer is the last line of a cell. In a kernel that Jupyter started it shows controls and one
picture that follows them; where a notebook runs without a person, the picture alone, as the
controls would begin. No control is made there. `Training` alone is a context: it stands around the
training that it shows.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import html
import io
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import itables.options
import numpy as np
import pandas as pd
from IPython import display
from itables.javascript import generate_init_offline_itables_html
from matplotlib import colormaps
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

import cifar_lib
from cifar_lib import data, evaluation, figures, runs
from cifar_lib.data import DataError, Dataset, display_name
from cifar_lib.figures import RIGHT, WRONG
from cifar_lib.recipes import Recipe

if TYPE_CHECKING:
    import keras

HINT = "Open this notebook with `make lab` to choose for yourself what is shown."
DRAWS = 12
GENERATOR = "ImageDataGenerator"
#: Of its arguments those that transform pictures, with their defaults.
GENERATOR_ARGUMENTS = {
    "rotation_range": 0,
    "width_shift_range": 0.0,
    "height_shift_range": 0.0,
    "shear_range": 0,
    "zoom_range": (1.0, 1.0),
    "brightness_range": (1.0, 1.0),
    "channel_shift_range": 0,
    "fill_mode": "nearest",
    "cval": 0,
    "interpolation_order": 1,
    "horizontal_flip": False,
    "vertical_flip": False,
}

_GAP, _LINE = 6, 14
# Pixels of the picture for each of an image's.
_LARGE, _SMALL = 3, 2


@dataclass(frozen=True)
class View:
    """What is shown: a line of text, a picture and a table, and how many pages there are.

    Attributes:
        text: HTML.
        png: empty where nothing fits.
        pages: of the pictures that fit.
        table: stands between the text and the picture.
    """

    text: str
    png: bytes = b""
    pages: int = 1
    table: pd.DataFrame | None = None


class Explorer(abc.ABC):
    """Controls above the picture that they decide.

    A subclass sets `initial`: the value that each control begins with, by its name.
    """

    initial: Mapping[str, Any]

    @abc.abstractmethod
    def make_controls(self) -> dict[str, widgets.Widget]:
        """Make a control for each name in `initial`."""

    @abc.abstractmethod
    def view(self, **values: Any) -> View:
        """What is shown for these values of the controls; no control is needed for it."""

    def more(self) -> list[widgets.Widget]:
        """What stands below the picture."""
        return []

    @functools.cached_property
    def controls(self) -> dict[str, widgets.Widget]:
        """The controls by name."""
        controls = self.make_controls()
        for name, control in controls.items():
            control.value = self.initial[name]
            control.style.description_width = "11em"
            control.layout.width = "32em"
            control.observe(self._changed, "value")
        return controls

    @functools.cached_property
    def text(self) -> widgets.HTML:
        return widgets.HTML()

    @functools.cached_property
    def table(self) -> widgets.HTML:
        return widgets.HTML()

    @functools.cached_property
    def picture(self) -> widgets.Image:
        return _picture()

    @functools.cached_property
    def panel(self) -> widgets.Widget:
        """All of it, to be displayed."""
        flow = widgets.Layout(flex_flow="row wrap")
        box = widgets.HBox([*self.controls.values()], layout=flow)
        self._update()
        return widgets.VBox([box, self.text, self.table, self.picture, *self.more()])

    def _ipython_display_(self) -> None:
        if cifar_lib.started_by_jupyter():
            display.display(self.panel)
            return
        view = self.view(**self.initial)
        display.display(display.Markdown(f"{view.text} {HINT}"))
        if view.table is not None:
            display.display(view.table)
        if view.png:
            display.display(display.Image(view.png))

    def _changed(self, change: Mapping[str, Any]) -> None:
        page = self.controls.get("page")
        if page is not None and page.value > 1 and change["owner"] is not page:
            page.value = 1  # which comes here again
        else:
            self._update()

    def _update(self) -> None:
        view = self.view(**{name: control.value for name, control in self.controls.items()})
        self.text.value, self.picture.value = view.text, view.png
        self.table.value = "" if view.table is None else _html(view.table)
        self.picture.layout.display = None if view.png else "none"
        if "page" in self.controls:
            self.controls["page"].max = view.pages


def _html(table: pd.DataFrame) -> str:
    # JupyterLab gives tables of this class the look of those in its outputs.
    return f'<div class="jp-RenderedHTMLCommon">{table.to_html(border=0)}</div>'


def _picture() -> widgets.Image:
    # As narrow as the cell, but no wider than it is drawn, which would blur it.
    layout = {"max_width": "100%", "align_self": "flex-start"}
    layout |= {"object_fit": "contain", "object_position": "top left"}
    return widgets.Image(format="png", layout=layout)


class Images(Explorer):
    """The images of a class or superclass, page by page, above the near duplicates of a page's.

    Args:
        dataset: the data set.
        pairs: (K, 2) int, positions of a training and a test image that are alike, the most alike
            first, as `data.near_duplicates(train.images, test.images)` gives them.
        cosines: (K,), how much alike they are.
        shown: the class or superclass to begin with, in the official spelling.
    """

    page_size = 30

    def __init__(
        self, dataset: Dataset, pairs: np.ndarray, cosines: np.ndarray, shown: str
    ) -> None:
        self.dataset, self.pairs, self.cosines = dataset, pairs, cosines
        self.choices = _choices(dataset)
        self.initial = {
            "split": "train",
            "classes": _ids(dataset, shown),
            "duplicates": False,
            "page": 1,
        }

    def make_controls(self) -> dict[str, widgets.Widget]:
        return {
            "split": widgets.Dropdown(options=["train", "test"], description="split"),
            "classes": widgets.Dropdown(options=self.choices, description="class"),
            "duplicates": widgets.Checkbox(description="only with near duplicates"),
            "page": widgets.BoundedIntText(min=1, max=1, description="page"),
        }

    def view(self, split: str, classes: tuple[int, ...], duplicates: bool, page: int) -> View:
        of_split = getattr(self.dataset, split)
        own = self.pairs[:, ["train", "test"].index(split)]
        rows = np.flatnonzero(np.isin(of_split.fine_labels, classes))
        if duplicates:
            rows = rows[np.isin(rows, own)]
        part = {"train": "training", "test": "test"}[split]
        what = f"{part} images of {_label(self.choices, classes)}"
        if duplicates:
            what = f"{what} with near duplicates"
        if not len(rows):
            return View(f"There are no {what}. Choose another class.")
        shown, pages = _page(rows, page, self.page_size)
        parts = [
            compose(
                of_split.images[shown],
                f"{_capitalized(what)}, {self.dataset.title}",
                [f"{self._name(of_split.fine_labels[i])}\n{split} {i}" for i in shown],
            )
        ]
        text = f"{_capitalized(what)}: {len(rows):,}; page {page} of {pages}."
        alike = np.flatnonzero(np.isin(own, shown))
        if len(alike):
            parts.append(self._duplicates(alike[:10]))
            text = f"{text} Near duplicates of this page's images: {len(alike)}."
        return View(text, _png(parts), pages)

    def _duplicates(self, alike: np.ndarray) -> Image.Image:
        train, test = self.dataset.train, self.dataset.test
        captions = []
        for (first, second), cosine in zip(self.pairs[alike], self.cosines[alike], strict=True):
            labels = dict.fromkeys([train.fine_labels[first], test.fine_labels[second]])
            names = ", ".join(map(self._name, labels))
            captions.append(f"{cosine:.3f}\n{names}\ntrain {first}\ntest {second}")
        both = [train.images[self.pairs[alike, 0]], test.images[self.pairs[alike, 1]]]
        heading = "The most alike near duplicates: training image above, test image below, cosine"
        return compose(np.concatenate(both, axis=1), heading, captions)

    def _name(self, label: int) -> str:
        return display_name(self.dataset.fine_names[label])


class Predictions(Explorer):
    """The test images of a run by what they are and what they were taken for, the surest first.

    Below them the confusion matrix of superclasses: a click on a cell shows its images. Begins with
    the commonest mistake between superclasses.

    Args:
        dataset: the data set.
        probabilities: (N, 100) float, of every class.
        labels: (N,) int, the true classes.
        indices: (N,) int, positions in the official test file.
        title: of the pictures.
    """

    page_size = 20

    def __init__(
        self,
        dataset: Dataset,
        probabilities: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        title: str,
    ) -> None:
        self.dataset, self.labels, self.indices, self.title = dataset, labels, indices, title
        self.predicted = probabilities.argmax(axis=1)
        self.confidence = probabilities.max(axis=1).clip(0, 1)
        self.choices = _choices(dataset)
        superclasses = np.arange(len(dataset.coarse_names))
        cells = dataset.superclass_of[labels], dataset.superclass_of[self.predicted]
        #: (20, 20) int: the images of each superclass (row) that were taken for each (column).
        self.confusion = confusion_matrix(*cells, labels=superclasses)
        mistakes = self.confusion * (superclasses[:, None] != superclasses)
        self.initial = self.of_cell(*np.unravel_index(mistakes.argmax(), mistakes.shape))

    def of_cell(self, true: int, predicted: int) -> dict[str, Any]:
        """The values of the controls that show the images of a cell of the matrix."""
        names = self.dataset.coarse_names
        return {
            "true": _ids(self.dataset, names[true]),
            "predicted": _ids(self.dataset, names[predicted]),
            "outcome": "right or wrong",
            "confidence": (0.0, 1.0),
            "page": 1,
        }

    def make_controls(self) -> dict[str, widgets.Widget]:
        return {
            "true": widgets.Dropdown(options=self.choices, description="true class"),
            "predicted": widgets.Dropdown(options=self.choices, description="predicted class"),
            "outcome": widgets.Dropdown(
                options=["right or wrong", "right", "wrong"], description="right or wrong"
            ),
            "confidence": widgets.FloatRangeSlider(
                min=0, max=1, step=0.01, readout_format=".0%", description="confidence"
            ),
            "page": widgets.BoundedIntText(min=1, max=1, description="page"),
        }

    def more(self) -> list[widgets.Widget]:
        # So high are two rows: the matrix stays where it is while its cells are clicked.
        self.picture.layout.min_height = "350px"
        return [self.matrix]

    def view(
        self,
        true: tuple[int, ...],
        predicted: tuple[int, ...],
        outcome: str,
        confidence: tuple[float, float],
        page: int,
    ) -> View:
        low, high = confidence
        right = self.predicted == self.labels
        fits = np.isin(self.labels, true) & np.isin(self.predicted, predicted)
        fits &= (self.confidence >= low) & (self.confidence <= high)
        if outcome != "right or wrong":
            fits &= right == (outcome == "right")
        rows = np.flatnonzero(fits)
        rows = rows[np.argsort(-self.confidence[rows], kind="stable")]
        pair = f"{_label(self.choices, true)} taken for {_label(self.choices, predicted)}"
        what = f"{pair}, {outcome}, with a confidence of {low:.0%} to {high:.0%}"
        if not len(rows):
            return View(f"There are no test images of {what}. Widen a choice.")
        shown, pages = _page(rows, page, self.page_size)
        names = [display_name(name) for name in self.dataset.fine_names]
        captions, inks = [], []
        for i in shown:
            mistaken = "" if right[i] else f"\nas {names[self.predicted[i]]}"
            verdict = "✓" if right[i] else "✗"
            captions.append(
                f"{verdict} {names[self.labels[i]]}{mistaken}\n{self.confidence[i]:.0%}"
                f"\ntest {self.indices[i]}"
            )
            inks.append(RIGHT if right[i] else WRONG)
        heading = f"{_capitalized(pair)}: {self.title}"
        picture = compose(self.dataset.test.images[self.indices[shown]], heading, captions, inks)
        number = f"{len(rows):,}; page {page} of {pages}, the surest first"
        text = f"Test images of {what}: {number}."
        return View(text, _png([picture]), pages)

    @functools.cached_property
    def cells(self) -> dict[tuple[int, int], widgets.Button]:
        """The buttons of the matrix by row and column; a cell without an image has none to show."""
        names = [display_name(name) for name in self.dataset.coarse_names]
        layout = widgets.Layout(width="2.6em", padding="0", margin="0")
        share = self.confusion / self.confusion.sum(axis=1, keepdims=True).clip(1)
        # In steps, so that cells share the styles; a browser is slow with one for each.
        steps = (np.asarray(PowerNorm(0.5, 0, 1)(share)) * 20).round() / 20
        styles = {step: _cell_style(step) for step in np.unique(steps)}
        cells = {}
        for cell, count in np.ndenumerate(self.confusion):
            row, column = cell
            cells[cell] = widgets.Button(
                description=str(count) if count else "",
                tooltip=f"{names[row]} taken for {names[column]}: {count}",
                disabled=not count,
                layout=layout,
                style=styles[steps[cell]],
            )
            cells[cell].on_click(functools.partial(self._show_cell, cell))
        return cells

    @functools.cached_property
    def matrix(self) -> widgets.Widget:
        """The confusion matrix of superclasses, a button for each cell."""
        names = [display_name(name) for name in self.dataset.coarse_names]
        upright = "writing-mode: vertical-rl; transform: rotate(180deg); margin: auto"
        heads = [widgets.HTML(f'<div style="{upright}">{name}</div>') for name in names]
        corner = widgets.HTML("true superclass below, predicted to the right")
        children = [corner, *heads]
        for row, name in enumerate(names):
            children.append(widgets.Label(name, layout={"margin": "0"}))
            children += [self.cells[row, column] for column in range(len(names))]
        columns = f"17em repeat({len(names)}, 2.6em)"
        return widgets.GridBox(
            children, layout={"grid_template_columns": columns, "align_items": "flex-end"}
        )

    def _show_cell(self, cell: tuple[int, int], _: widgets.Button) -> None:
        for control in self.controls.values():
            control.unobserve(self._changed, "value")
        for name, value in self.of_cell(*cell).items():
            self.controls[name].value = value
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self._update()


def _cell_style(share: float) -> widgets.ButtonStyle:
    color = colormaps["mako_r"](share)
    ink = "white" if share >= 0.5 else "black"  # of the two the one with a contrast above 4.5
    background = to_hex(color) if share else "white"
    return widgets.ButtonStyle(button_color=background, text_color=ink, font_size="0.8em")


class Augmentation(Explorer):
    """Images beside twelve draws of a policy, or of an `ImageDataGenerator` of any arguments.

    The generator gets every argument that transforms pictures; those that normalise
    (`featurewise_...`, `samplewise_...`, `zca_...`) are left out, as what they give is no picture
    in 0..1. It sees pixels in 0..255, for which its brightness is made: given 0..1, that makes
    black pictures. Begins with the deck's arguments. Needs TensorFlow.

    Args:
        images: (N, 32, 32, 3) uint8.
        indices: (N,) int, their positions in the official file.
        title: of the pictures.
    """

    def __init__(self, images: np.ndarray, indices: np.ndarray, title: str) -> None:
        from cifar_lib import augmentation

        self.images, self.indices, self.title = images, indices, title
        self.generator_policy = augmentation.GeneratorPolicy
        self.policy = functools.cache(augmentation.make)
        self.policies = [GENERATOR, *augmentation.BUILDERS]
        self.arguments = {
            name: augmentation.SEED_ARGUMENTS.get(name, default)
            for name, default in GENERATOR_ARGUMENTS.items()
        }
        self.initial = {"policy": GENERATOR, "seed": 0, **self.arguments}

    def make_controls(self) -> dict[str, widgets.Widget]:
        sliders = {
            "rotation_range": widgets.IntSlider(min=0, max=180),
            "width_shift_range": widgets.FloatSlider(min=0, max=0.5, step=0.01),
            "height_shift_range": widgets.FloatSlider(min=0, max=0.5, step=0.01),
            "shear_range": widgets.IntSlider(min=0, max=60),
            "zoom_range": widgets.FloatRangeSlider(min=0.5, max=2, step=0.05),
            "brightness_range": widgets.FloatRangeSlider(min=0, max=2, step=0.05),
            "channel_shift_range": widgets.IntSlider(min=0, max=128),
            "fill_mode": widgets.Dropdown(options=["nearest", "constant", "reflect", "wrap"]),
            "cval": widgets.IntSlider(min=0, max=255),
            "interpolation_order": widgets.IntSlider(min=0, max=5),
            "horizontal_flip": widgets.Checkbox(),
            "vertical_flip": widgets.Checkbox(),
        }
        for name, slider in sliders.items():
            slider.description = name
        return {
            "policy": widgets.Dropdown(options=self.policies, description="policy"),
            "seed": widgets.IntSlider(min=0, max=99, description="seed"),
            **sliders,
        }

    def view(self, policy: str, seed: int, **arguments: Any) -> View:
        # A draw depends on the seed, the epoch and the index: twelve indices make one batch, twelve
        # epochs would take twelve.
        images = self.images.repeat(DRAWS, axis=0)
        indices = (self.indices[:, None] + np.arange(DRAWS)).ravel()
        if policy == GENERATOR:
            given = {k: v for k, v in arguments.items() if v != GENERATOR_ARGUMENTS[k]}
            draws = self._generated(images, seed, indices, given)
            what = f"{GENERATOR}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
        else:
            draws = self.policy(policy)(images, seed, 0, indices)
            what = f'policy "{policy}"'
        draws = (255 * draws.clip(0, 1)).round().astype(np.uint8)
        rows = np.concatenate(
            [self.images[:, None], draws.reshape(-1, DRAWS, *draws.shape[1:])], axis=1
        )
        heading = f"Originals and {DRAWS} draws of each, {self.title}"
        picture = compose(
            rows.reshape(-1, *draws.shape[1:]),
            heading,
            columns=DRAWS + 1,
            scale=_SMALL,
            apart=2 * _GAP,
        )
        return View(f"{DRAWS} draws with the seed {seed} of {what}.", _png([picture]))

    def _generated(
        self, images: np.ndarray, seed: int, indices: np.ndarray, arguments: dict[str, Any]
    ) -> np.ndarray:
        policy = self.generator_policy(**arguments, rescale=1 / 255)
        transforms = policy.draw(seed, 0, indices)
        draws = [
            policy.generator.apply_transform(image, transform)
            for image, transform in zip(images.astype(np.float32), transforms, strict=True)
        ]
        return policy.generator.standardize(np.stack(draws))

    def _update(self) -> None:
        super()._update()
        for name in self.arguments:
            self.controls[name].disabled = self.controls["policy"].value != GENERATOR


class StoppedError(Exception):
    """Training was stopped and can go on; Jupyter says so, without a traceback, and runs no more.

    Args:
        done: finished epochs.
        epochs: of the whole run.
    """

    def __init__(self, done: int, epochs: int) -> None:
        super().__init__(
            f"Stopped after epoch {done} of {epochs}. Run this cell again to continue."
        )

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Training:
    """The curves and the progress of a run while it trains, and a button that stops it.

    A context around `training.train`, whose watcher it is:

        with explorers.Training(recipe, run_dir, dataset.title) as watcher:
            training.train(recipe, run_dir, dataset=dataset, watcher=watcher)

    Stopped, by the button after the epoch that runs, or at once where the kernel is interrupted, it
    raises `StoppedError`; the run is then as after any interruption, and the same cell continues.
    The button works during the cell where JupyterLab sends what widgets say to a subshell of the
    kernel: since version 4.4 with ipykernel 7, unless the setting "Kernel Comms over subshells" is
    disabled. Elsewhere what it says arrives when the cell has ended; interrupt the kernel there.

    Where nobody can operate it, there is no watcher, and nothing is shown.

    Args:
        recipe: every choice of the run.
        run_dir: the run folder.
        title: of the data set.
    """

    #: Between two looks at the progress within an epoch.
    seconds = 0.25

    def __init__(self, recipe: Recipe, run_dir: Path, title: str) -> None:
        self.recipe, self.run_dir, self.title = recipe, run_dir, title
        self.stop = threading.Event()

    @functools.cached_property
    def button(self) -> widgets.Button:
        """Stops training after the epoch that runs."""
        button = widgets.Button(description="Stop after this epoch", icon="stop")
        button.layout.width = "16em"
        button.on_click(self._stop)
        return button

    @functools.cached_property
    def bar(self) -> widgets.IntProgress:
        """The steps of the epoch that runs."""
        return widgets.IntProgress(layout={"width": "20em"})

    @functools.cached_property
    def text(self) -> widgets.HTML:
        return widgets.HTML("Preparing: the network is built and compiled.")

    @functools.cached_property
    def picture(self) -> widgets.Image:
        return _picture()

    @functools.cached_property
    def panel(self) -> widgets.Widget:
        """All of it, to be displayed."""
        row = widgets.HBox([self.button, self.bar, self.text])
        row.layout.flex_flow = "row wrap"
        self._draw(self._stored())
        return widgets.VBox([row, self.picture])

    def __enter__(self) -> Training | None:
        self.live = cifar_lib.started_by_jupyter()
        if not self.live:
            return None
        self.began, self.shown, self.steps_done = time.perf_counter(), 0.0, 0
        display.display(self.panel)
        # ipykernel 7.4 handles a message in the shell through which its widget spoke last: here the
        # one that trains. Forgetting that leaves it to JupyterLab, which names a subshell.
        vars(self.button.comm).pop("_reply_subshell_id", None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not self.live:
            return
        for control in (self.button, self.bar):
            control.layout.display = "none"
        done, epochs = len(self._stored()), self.recipe.epochs
        self.text.value = f"Trained for {done} of {epochs} epochs."
        if isinstance(error, KeyboardInterrupt):
            self.text.value = ""  # the error says it
            raise StoppedError(done, epochs) from None

    def step_ended(self, epoch: int, step: int, steps: int) -> None:
        """Show how far the epoch is; see `training.Watcher`."""
        now = time.perf_counter()
        if not self.steps_done:  # the first step is long: it compiles
            self.began = now
        self.steps_done += 1
        if step < steps and now - self.shown < self.seconds:
            return
        self.shown = now
        self.bar.max, self.bar.value = steps, step
        ahead = self.recipe.epochs * steps - (epoch - 1) * steps - step
        words = f"Epoch {epoch} of {self.recipe.epochs}, step {step:,} of {steps:,}"
        if self.steps_done > 1:
            seconds = (now - self.began) / (self.steps_done - 1) * ahead
            words += f", about {tqdm.format_interval(seconds)} left"
        self.text.value = f"{words}."

    def epoch_ended(self, history: pd.DataFrame) -> None:
        """Show the curves; see `training.Watcher`."""
        self._draw(history)

    def _draw(self, history: pd.DataFrame) -> None:
        self.picture.layout.display = "none" if history.empty else None
        if history.empty:
            return
        title = f"{self.recipe.name}, {self.title}"

        def drawn() -> bytes:
            return _drawn(figures.overlaid_curves({title: history}, title, self.recipe.epochs))

        # By a thread, which no interrupt of the kernel reaches: it would be lost in a callback of
        # matplotlib's, where Python ignores all exceptions.
        with ThreadPoolExecutor(1) as pool:
            self.picture.value = pool.submit(drawn).result()

    def _stored(self) -> pd.DataFrame:
        there = (self.run_dir / "history.csv").exists()
        return runs.Run(self.run_dir).history if there else pd.DataFrame()

    def _stop(self, _: widgets.Button) -> None:
        self.stop.set()
        self.button.disabled = True
        self.button.description = "Stopping after this epoch"


@dataclass(frozen=True)
class _Answer:
    """A picture as the network saw it and larger, and the probabilities of its classes."""

    name: str
    seen: np.ndarray
    large: np.ndarray
    probabilities: np.ndarray


class OwnPicture(Explorer):
    """What a network says of a picture of yours, and what it looked at: `evaluation.GradCam`.

    The drop-down has the five likeliest classes, whose maps are laid over the picture as the
    network saw it and over the picture itself. Begins with `picture`.

    Args:
        model: the network.
        fine_names: its classes.
        title: of the pictures.
        picture: a picture file, or an image, uint8 (32, 32, 3).
        name: what it is called; by default as the file.
    """

    side = 192

    def __init__(
        self,
        model: keras.Model,
        fine_names: Sequence[str],
        title: str,
        picture: Path | str | np.ndarray,
        name: str = "",
    ) -> None:
        self.model, self.title = model, title
        self.names = [display_name(name) for name in fine_names]
        self.grad_cam = evaluation.GradCam(model)
        if isinstance(picture, np.ndarray):
            times = self.side // len(picture)
            large = picture.repeat(times, axis=0).repeat(times, axis=1)
            self.first = self._answered(name, picture, large)
        else:
            self.first = self._read(picture, name or Path(picture).name)
        self.initial = {"upload": (), "rank": 0}

    def make_controls(self) -> dict[str, widgets.Widget]:
        return {
            "upload": widgets.FileUpload(accept="image/*", description="Your picture"),
            "rank": widgets.Dropdown(options=self._options(self.first), description="class"),
        }

    def view(self, upload: Sequence[Mapping[str, Any]], rank: int) -> View:
        try:
            answer = self.answer(upload)
        except DataError as error:
            return View(html.escape(str(error)))
        label = int(_likeliest(answer.probabilities)[rank])
        heat = self.grad_cam(answer.seen, label)
        pictures = [answer.seen, overlaid(answer.seen, heat, self.side)]
        pictures = [np.asarray(_resized(picture, self.side)) for picture in pictures]
        pictures.append(overlaid(answer.large, heat, self.side))
        name = self.names[label]
        seen = "x".join(map(str, answer.seen.shape[:2]))
        captions = [f"what the network saw, {seen} pixels", "the map over it", "over the picture"]
        heading = f"Where it sees {name} (Grad-CAM): the brighter, the more"
        maps = compose(np.stack(pictures), heading, captions, columns=3, scale=1)
        card = figures.prediction_cards(
            answer.seen[None], [None], answer.probabilities[None], self.names, self.title
        )
        best = self.names[int(answer.probabilities.argmax())]
        text = f"{html.escape(answer.name)}: {best}, {answer.probabilities.max():.0%} sure."
        return View(text, _png([Image.open(io.BytesIO(_drawn(card))).convert("RGB"), maps]))

    def answer(self, upload: Sequence[Mapping[str, Any]]) -> _Answer:
        """What the network says of an uploaded file, or, of none, of the first picture.

        Raises:
            DataError: the file is no picture.
        """
        if not upload:
            return self.first
        [file] = upload
        if self._last is None or self._last[0] is not file:
            self._last = file, self._read(bytes(file["content"]), file["name"])
        return self._last[1]

    _last: tuple[Mapping[str, Any], _Answer] | None = None

    def _read(self, source: Path | str | bytes, name: str) -> _Answer:
        seen, large = (data.read_image(source, name=name, side=side) for side in (32, self.side))
        return self._answered(name, seen, large)

    def _answered(self, name: str, seen: np.ndarray, large: np.ndarray) -> _Answer:
        [probabilities] = evaluation.predict(self.model, seen[None])
        return _Answer(name, seen, large, probabilities)

    def _options(self, answer: _Answer) -> list[tuple[str, int]]:
        return [
            (f"{self.names[label]} ({answer.probabilities[label]:.1%})", rank)
            for rank, label in enumerate(_likeliest(answer.probabilities))
        ]

    def _changed(self, change: Mapping[str, Any]) -> None:
        if change["owner"] is self.controls["upload"]:
            self._offer(self.controls["rank"])
        super()._changed(change)

    def _offer(self, control: widgets.Dropdown) -> None:
        try:
            options = self._options(self.answer(self.controls["upload"].value))
        except DataError:
            control.disabled = True
            return
        # Other options set the value, too; the picture is drawn once, after this.
        control.unobserve(self._changed, "value")
        control.options, control.value, control.disabled = options, 0, False
        control.observe(self._changed, "value")


def _likeliest(probabilities: np.ndarray) -> np.ndarray:
    return np.argsort(-probabilities, kind="stable")[:5]


def overlaid(image: np.ndarray, heat: np.ndarray, side: int) -> np.ndarray:
    """An image, uint8 (H, W, 3), under a map, scaled to its highest value, as (side, side, 3)."""
    share = Image.fromarray((heat / (heat.max() or 1)).astype(np.float32))
    share = np.asarray(share.resize((side, side), Image.Resampling.BILINEAR)).clip(0, 1)
    colors = colormaps["inferno"](share)[..., :3] * 255
    under = np.asarray(_resized(image, side))
    return (0.45 * under + 0.55 * colors).round().astype(np.uint8)


def _resized(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)


class Runs(Explorer):
    """The curves of runs in the same panels, the choices in which they differ, and their numbers.

    Below them the numbers of all finished runs on the data set, in a table that sorts by any
    column; where nobody can sort it, those of the runs shown.

    Args:
        runs_dir: the folder of the run folders.
        shown: names of the runs to begin with.
        dataset: the data set.
    """

    def __init__(self, runs_dir: Path, shown: Sequence[str], dataset: Dataset) -> None:
        self.title = f"Training on {dataset.title}"
        self.runs = {
            run.name: run
            for run in runs.find(runs_dir)
            if run.finished and run.recipe.dataset == dataset.name
        }
        self.initial = {"names": tuple(shown)}

    def make_controls(self) -> dict[str, widgets.Widget]:
        rows = min(len(self.runs), 10)
        return {
            "names": widgets.SelectMultiple(options=[*self.runs], rows=rows, description="runs")
        }

    def more(self) -> list[widgets.Widget]:
        # Names of run folders are long.
        self.controls["names"].layout.width = "46em"
        return []

    def view(self, names: Sequence[str]) -> View:
        if not names:
            return View("No run is chosen. Choose one, or several with Ctrl or Shift.")
        chosen = self._labelled(names)
        histories = {label: run.history for label, run in chosen.items()}
        figure = figures.overlaid_curves(histories, self.title)
        table = self.differences(names)
        if len(names) == 1:
            return View(f"The run {html.escape(names[0])}.", _drawn(figure))
        if table.empty:
            return View(f"{len(names)} runs, whose recipes are the same.", _drawn(figure))
        text = f"{len(names)} runs, and the choices in which their recipes differ."
        return View(text, _drawn(figure), table=table)

    def differences(self, names: Sequence[str]) -> pd.DataFrame:
        """The fields in which the recipes of runs differ, a row each, and a column for each run."""
        choices = pd.DataFrame(
            {
                label: pd.Series(dataclasses.asdict(run.recipe))
                for label, run in self._labelled(names).items()
            }
        )
        return choices.map(str)[choices.map(str).nunique(axis=1) > 1]

    def _labelled(self, names: Sequence[str]) -> dict[str, runs.Run]:
        chosen = [self.runs[name] for name in names]
        return dict(zip(runs.labels(chosen), chosen, strict=True))

    def numbers(self, names: Sequence[str]) -> pd.DataFrame:
        """What finished runs reached, a row each: accuracies and losses as in `Run.metrics`."""
        rows = []
        for name in names:
            run = self.runs[name]
            row = {"run": name, "protocol": run.recipe.protocol, "epochs": len(run.history)}
            row["minutes"] = round(run.metrics["train_seconds"] / 60, 1)
            row["parameters"] = run.metrics["parameters"]
            for split in ("test", "validation"):
                for metric in ("accuracy", "loss", "top5_accuracy", "expected_calibration_error"):
                    value = run.metrics.get(split, {}).get(metric, np.nan)
                    row[f"{split} {metric.replace('_', ' ')}"] = round(value, 4)
            rows.append(row)
        return pd.DataFrame(rows).set_index("run").dropna(axis="columns", how="all")

    def _ipython_display_(self) -> None:
        super()._ipython_display_()
        if not cifar_lib.started_by_jupyter():
            display.display(self.numbers(self.initial["names"]).style.format(str, na_rep=""))
            return
        # Its code comes along, so that no network is needed. Not by `init_notebook_mode`: the first
        # script of that wants what its second one brings, and fails.
        bundle = generate_init_offline_itables_html(itables.options.dt_bundle)
        display.display(display.HTML(bundle))
        itables.show(
            self.numbers([*self.runs]).reset_index(),
            connected=False,
            showIndex=False,
            classes="display compact nowrap",
        )


def _drawn(figure: Figure) -> bytes:
    """A figure as PNG, for the screen: in no more time than it takes to draw it."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return file.getvalue()


def compose(
    images: np.ndarray,
    heading: str,
    captions: Sequence[str] | None = None,
    inks: Sequence[str] | None = None,
    *,
    columns: int = 10,
    scale: int = _LARGE,
    apart: int = 0,
) -> Image.Image:
    """Lay out pictures in rows of `columns`, each with its caption below, as one picture.

    In some milliseconds, where `figures.picture_grid` takes more than a hundred.

    Args:
        images: (N, H, W, 3) uint8.
        heading: a line above them.
        captions: N, of any number of lines, or none.
        inks: N colours for the captions; black without.
        columns: as wide is the picture, also with fewer images.
        scale: pixels of the picture for each of an image's.
        apart: pixels between the first column and the others, beside the usual.
    """
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = large.shape
    # A letter of the captions is about 6 pixels wide.
    texts = [_wrapped(caption, width // 6) for caption in captions or [""] * count]
    below = _LINE * max(text.count("\n") + 1 if text else 0 for text in texts)
    across, down = width + _GAP, height + below + _GAP
    whole_width = _GAP + columns * across + apart
    heading = _wrapped(heading, whole_width // 8)
    top = _LINE + 17 * (heading.count("\n") + 1)
    places = [
        (_GAP + column * across + (apart if column else 0), top + row * down)
        for row, column in (divmod(i, columns) for i in range(count))
    ]
    whole_height = top + -(-count // columns) * down
    canvas = np.full((whole_height, whole_width, 3), 255, np.uint8)
    for image, (x, y) in zip(large, places, strict=True):
        canvas[y : y + height, x : x + width] = image
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((_GAP, _GAP), heading, "black", _font(13), spacing=3)
    for (x, y), text, ink in zip(places, texts, inks or ["black"] * count, strict=True):
        where = (x + width / 2, y + height + 2)
        draw.multiline_text(where, text, ink, _font(10), anchor="ma", align="center", spacing=2)
    return picture


def _wrapped(text: str, width: int) -> str:
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def _png(parts: Sequence[Image.Image]) -> bytes:
    """One picture of parts, one above the other."""
    size = max(part.width for part in parts), sum(part.height for part in parts)
    whole, top = Image.new("RGB", size, "white"), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    file = io.BytesIO()
    whole.save(file, "PNG")
    return file.getvalue()


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _page(rows: np.ndarray, page: int, size: int) -> tuple[np.ndarray, int]:
    """The rows of a page, from 1, and how many pages there are."""
    return rows[(page - 1) * size : page * size], -(-len(rows) // size)


def _choices(dataset: Dataset) -> dict[str, tuple[int, ...]]:
    """What a class can be chosen from, and the classes that each choice means."""
    superclasses = {
        f"{display_name(name)} (superclass)": _ids(dataset, name) for name in dataset.coarse_names
    }
    classes = {display_name(name): _ids(dataset, name) for name in dataset.fine_names}
    return {"all classes": tuple(range(len(dataset.fine_names))), **superclasses, **classes}


def _ids(dataset: Dataset, name: str) -> tuple[int, ...]:
    if name in dataset.fine_names:
        return (dataset.fine_names.index(name),)
    members = dataset.superclass_of == dataset.coarse_names.index(name)
    return tuple(np.flatnonzero(members).tolist())


def _label(choices: Mapping[str, tuple[int, ...]], ids: tuple[int, ...]) -> str:
    return next(label for label, chosen in choices.items() if chosen == ids)
