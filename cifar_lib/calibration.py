"""What a study found: its folder read back, its best point, and how sure that is.

study.json      what was asked: recipe, fixed choices, studied parameters, search, budget
trials.csv      one row a trial
histories.csv   one row an epoch of a trial
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from cifar_lib import recipes
from cifar_lib.runs import RunError

STATES = ("complete", "pruned", "failed", "running", "waiting")
TRIAL_COLUMNS = (
    *("trial", "state", "seed", "val_accuracy", "val_loss", "best_val_accuracy", "best_epoch"),
    *("epochs", "epochs_run", "train_images", "train_seconds", "seconds", "precision", "worker"),
    *("started", "ended", "attempts", "error", "notebook"),
)
HISTORY_COLUMNS = (
    *("trial", "epoch", "accuracy", "loss", "val_accuracy", "val_loss", "learning_rate"),
    *("train_seconds", "validation_seconds"),
)
TEXT_COLUMNS = ("state", "precision", "worker", "started", "ended", "error", "notebook")
# What the protocol "holdout" trains on in a full run.
FULL_TRAINING = recipes.TRAIN_IMAGES - recipes.Recipe().validation_size
# Complete trials, and for each parameter, below which importances are noise.
LEAST_TRIALS, LEAST_TRIALS_PER_PARAMETER = 8, 2
# The share of a searched range at either end that counts as its edge.
EDGE = 0.05


class CalibrationError(RunError):
    """A study cannot be read, or does not hold what was asked of it."""


@dataclass(frozen=True)
class Results:
    """A study as its folder holds it, finished or not.

    Attributes:
        folder: where it was read from.
        study: `study.json`.
        trials: `trials.csv`, and for each trial `epoch_seconds`, the mean training time of an
            epoch, and `images_per_second`. Text that is missing is empty, a number is NaN.
        histories: `histories.csv`.
    """

    folder: Path
    study: dict[str, Any]
    trials: pd.DataFrame
    histories: pd.DataFrame

    @property
    def name(self) -> str:
        return self.study["name"]

    @property
    def dataset_title(self) -> str:
        return self.study["dataset_title"]

    @property
    def synthetic(self) -> bool:
        return self.dataset_title != "CIFAR-100"

    @property
    def parameters(self) -> list[str]:
        """The studied parameters, by their names as recipe fields."""
        return list(self.study["parameters"])

    @property
    def varied(self) -> list[str]:
        """Those of the studied parameters that may take more than one value."""
        return [
            name
            for name, search in self.study["parameters"].items()
            if len(search.get("values", ())) != 1
        ]

    @property
    def logarithmic(self) -> list[str]:
        """The studied parameters whose range is searched on a logarithmic scale."""
        return [name for name, search in self.study["parameters"].items() if search.get("log")]

    @property
    def choices(self) -> dict[str, Any]:
        """All recipe fields that every trial shares, the studied ones left out."""
        shared = dataclasses.asdict(recipes.get(self.study["recipe"]))
        for taken in self.study.get("found", {}).values():
            shared |= taken
        # What the study chooses itself replaces what other studies found.
        shared |= self.study["choices"]
        return {field: value for field, value in shared.items() if field not in self.parameters}

    @property
    def validation_images(self) -> int:
        """How many images a validation accuracy is measured on."""
        if self.choices["protocol"] != "deck":
            return self.choices["validation_size"]
        return self.choices["test_size"] or recipes.TEST_IMAGES

    @property
    def complete(self) -> pd.DataFrame:
        """The complete trials; one that repeats a point and seed, so a result, is left out."""
        complete = self.trials[self.trials["state"] == "complete"]
        return complete.drop_duplicates([*self.parameters, "seed"])

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are in each state, one of `STATES`; states without a trial are absent."""
        found = self.trials["state"].value_counts()
        return {state: int(found[state]) for state in STATES if state in found}

    @property
    def finished(self) -> bool:
        """There are trials, and none is waiting or running."""
        return not self.trials.empty and not {"waiting", "running"} & set(self.counts)


class BestEpoch(NamedTuple):
    """After which epoch a network is best, by its mean validation accuracy over seeds.

    Attributes:
        best: the epoch, from 1, of the highest accuracy.
        accuracy: that accuracy, 0..1.
        enough: the first epoch with an accuracy at most one standard error lower.
        enough_accuracy: the accuracy there.
        standard_error: of `accuracy`, for the choice of the validation images (binomial).
        epochs: the last epoch that all seeds reached.
    """

    best: int
    accuracy: float
    enough: int
    enough_accuracy: float
    standard_error: float
    epochs: int


def read(folder: Path | str) -> Results:
    """The study in a folder, which may still be running.

    Raises:
        CalibrationError: the folder holds no study, or its `study.json` is damaged.
    """
    folder = Path(folder)
    try:
        study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    except OSError:
        beside = sorted(path.parent.name for path in folder.parent.glob("*/study.json"))
        raise CalibrationError(
            f"{folder} holds no study. Studies in {folder.parent}: {', '.join(beside) or 'none'}."
        ) from None
    except ValueError as error:
        raise CalibrationError(
            f"{folder / 'study.json'} is damaged: {error}. Run the study again."
        ) from error
    trials = _table(folder / "trials.csv", dict.fromkeys([*TRIAL_COLUMNS, *study["parameters"]]))
    for column in TEXT_COLUMNS:
        trials[column] = trials[column].astype(object).fillna("")
    for name in study["parameters"]:
        if _is_integer_field(name) and trials[name].notna().all():
            trials[name] = trials[name].astype(int)
    # A trial that ended before its first epoch has no speed.
    epochs_run = trials["epochs_run"].replace(0, np.nan).astype(float)
    trials["epoch_seconds"] = trials["train_seconds"].astype(float) / epochs_run
    trials["images_per_second"] = trials["train_images"] / trials["epoch_seconds"]
    return Results(folder, study, trials, _table(folder / "histories.csv", HISTORY_COLUMNS))


def find(studies_dir: Path | str, names: Sequence[str] = ()) -> list[Results]:
    """The named studies of a folder, or without names all, in the order in which they began.

    Raises:
        CalibrationError: there is none, or a named one is missing.
    """
    studies_dir = Path(studies_dir)
    if names:
        return [read(studies_dir / name) for name in names]
    found = [read(path.parent) for path in studies_dir.glob("*/study.json")]
    if not found:
        raise CalibrationError(
            f"There is no study in {studies_dir}. Run one: "
            "python -m cifar_lib sweep studies/learning_rate.yaml"
        )

    def beginning(results: Results) -> tuple[str, str]:
        # "~" comes after every date: what has not begun is last.
        return min(filter(None, results.trials["started"]), default="~"), results.name

    return sorted(found, key=beginning)


def points(results: Results) -> pd.DataFrame:
    """The points that have a complete trial, the best first.

    Columns: the studied parameters; `val_accuracy`, the mean over seeds, with `lowest` and
    `highest` (0..1); `deviation`, their standard deviation, NaN with one seed; `val_loss` (nats);
    `seeds`; `epoch_seconds`, the mean training time of an epoch; `images_per_second`.
    """
    # Grouped by a constant too, because a study may vary nothing.
    groups = results.complete.assign(every=0).groupby(["every", *results.parameters], dropna=False)
    table = groups.agg(
        val_accuracy=("val_accuracy", "mean"),
        lowest=("val_accuracy", "min"),
        highest=("val_accuracy", "max"),
        deviation=("val_accuracy", "std"),
        val_loss=("val_loss", "mean"),
        seeds=("seed", "size"),
        epoch_seconds=("epoch_seconds", "mean"),
        images_per_second=("images_per_second", "mean"),
    )
    table = table.reset_index().drop(columns="every")
    # Of two equal points the quicker one comes first.
    order = ["val_accuracy", "epoch_seconds"]
    return table.sort_values(order, ascending=[False, True], ignore_index=True)


def best_point(results: Results) -> dict[str, Any]:
    """The parameters' values at the point with the highest mean validation accuracy.

    Raises:
        CalibrationError: no trial is complete.
    """
    return _point(results, _ranked(results).iloc[0])


def best_epoch(results: Results) -> BestEpoch:
    """After which epoch the longest complete trials of a study are best.

    Raises:
        CalibrationError: the study varies something else than `epochs`, or no trial is complete.
    """
    curve = best_epoch_histories(results).groupby("epoch")["val_accuracy"].mean()
    best = int(curve.idxmax())
    error = float(_standard_error(curve[best], results.validation_images))
    enough = int(curve.index[curve >= curve[best] - error][0])
    accuracies = float(curve[best]), float(curve[enough])
    return BestEpoch(best, accuracies[0], enough, accuracies[1], error, int(curve.index[-1]))


def best_epoch_histories(results: Results) -> pd.DataFrame:
    """The histories that `best_epoch` looks at: of the longest trials, as far as all seeds went.

    Raises:
        CalibrationError: as `best_epoch`.
    """
    if set(results.varied) - {"epochs"}:
        raise CalibrationError(
            f"The study {results.name} varies {_listed(results.varied)}: the best epoch is of a "
            "study that varies nothing but epochs."
        )
    _ranked(results)
    complete = results.complete
    longest = complete.loc[complete["epochs"] == complete["epochs"].max(), "trial"]
    histories = results.histories[results.histories["trial"].isin(longest)]
    # Early stopping ends one seed before another; a mean over ever fewer seeds would jump.
    common = histories.groupby("trial")["epoch"].max().min()
    histories = histories[histories["epoch"] <= common]
    if histories["val_accuracy"].isna().all():
        raise CalibrationError(
            f"{results.folder / 'histories.csv'} has no validation accuracy of a complete trial: "
            "the best epoch is not known. Run the study again."
        )
    return histories


def saved_seconds(results: Results) -> float:
    """The training time that pruning saved: the epochs not run, each as long as those before it.

    Validation is left out, so a little more was saved.
    """
    pruned = results.trials[results.trials["state"] == "pruned"]
    left = (pruned["epochs"] - pruned["epochs_run"]) * pruned["epoch_seconds"]
    return float(left.sum())


def importances(results: Results) -> pd.Series:
    """Which share of the validation accuracy's variance each studied parameter explains.

    By Optuna's fANOVA (Hutter, Hoos and Leyton-Brown, 2014) on the complete trials. Sums to 1,
    the largest first.

    Raises:
        CalibrationError: too few trials are complete, or all have one accuracy.
    """
    import optuna

    varied, complete = results.varied, results.complete
    needed = max(LEAST_TRIALS, LEAST_TRIALS_PER_PARAMETER * len(varied))
    if not varied or len(complete) < needed:
        raise CalibrationError(
            f"Importances cannot be told from {_counted(len(complete), 'complete trial')} of "
            f"{results.name}, which varies {_listed(varied) or 'nothing'}: it takes "
            f"{needed} or more, and a parameter that varies."
        )
    verbosity = optuna.logging.get_verbosity()
    # A new study is announced with the time of day, which would change every page.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize")
        distributions = {name: _distribution(results, name) for name in varied}
        for row in complete.to_dict("records"):
            parameters = {name: row[name] for name in varied}
            study.add_trial(
                optuna.create_trial(
                    value=row["val_accuracy"], params=parameters, distributions=distributions
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except RuntimeError as error:
        raise CalibrationError(
            f"Importances cannot be told from the trials of {results.name}: {error}"
        ) from error
    finally:
        optuna.logging.set_verbosity(verbosity)
    return pd.Series(shares).sort_values(ascending=False)


def describe(point: Mapping[str, Any]) -> str:
    """A point in words: "learning rate 0.0003, batch size 32"."""
    return ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in point.items())


def conclusion(results: Results) -> str:
    """What to use, how sure that is and what the budget cannot tell, as a list in Markdown."""
    lines = []
    if results.synthetic:
        lines.append(
            f"The pictures are a {results.dataset_title}: what follows says nothing of CIFAR-100."
        )
    if results.complete.empty:
        states = ", ".join(f"{count} {state}" for state, count in results.counts.items())
        lines.append(
            f"No trial is complete ({states or 'there is none'}): nothing can be concluded yet."
        )
    else:
        lines += [*_recommendation(results), *_edges(results), *_epochs(results)]
        lines += _limits(results)
    lines += _states(results)
    return "\n".join(f"- {line}" for line in lines)


def _recommendation(results: Results) -> list[str]:
    table = _ranked(results)
    best = table.iloc[0]
    seeds, images = int(best["seeds"]), best["images_per_second"]
    spread = f", {best['lowest']:.2%} to {best['highest']:.2%}" if seeds > 1 else ""
    found = (
        f"a {'mean ' if seeds > 1 else ''}validation accuracy of {best['val_accuracy']:.2%} "
        f"({_counted(seeds, 'seed')}{spread}), {images:.0f} images a second in training"
    )
    if len(table) == 1:
        point = describe(_point(results, best)) or "the recipe as it is"
        return [f"One point alone is complete, {point}: {found}. There is nothing to compare with."]
    margins, reason = _margins(results, table)
    second = table.iloc[1]
    difference = best["val_accuracy"] - second["val_accuracy"]
    beyond = difference > margins[1]
    lines = [
        f"Use **{describe(_point(results, best))}**: {found}.",
        f"It is {_in_points(difference)} above the second, {describe(_point(results, second))}. "
        f"{reason} By chance alone these two can differ by up to {_in_points(margins[1])} (95 %): "
        + ("the lead is larger." if beyond else "the second may be as good."),
    ]
    behind = best["val_accuracy"] - table["val_accuracy"]
    alike = int((behind <= margins)[1:].sum())
    if alike > 1:
        lines.append(
            f"By that measure {alike} of the other {len(table) - 1} points may be as good."
        )
    return lines + _caveats(results, table)


def _caveats(results: Results, table: pd.DataFrame) -> list[str]:
    """What speaks against the best point, the first of `table`."""
    lines, best = [], table.iloc[0]
    fallen = results.trials["state"].eq("pruned")
    for name in results.parameters:
        fallen &= results.trials[name].eq(best[name])
    if fallen.any():
        lines.append(
            f"{_counted(int(fallen.sum()), 'trial')} of this best point "
            f"{'was' if fallen.sum() == 1 else 'were'} pruned: its mean is of the others."
        )
    if best["seeds"] < table["seeds"].max():
        lines.append(
            f"It has {_counted(int(best['seeds']), 'seed')} where others have up to "
            f"{table['seeds'].max()}: repeat it before relying on it."
        )
    return lines


def _margins(results: Results, table: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Differences to the first point that chance alone makes in 95 of 100 cases, and by what."""
    repeated = table[table["seeds"] > 1]
    freedom = int((repeated["seeds"] - 1).sum())
    if freedom:
        variance = ((repeated["seeds"] - 1) * repeated["deviation"] ** 2).sum() / freedom
        errors = np.sqrt(variance * (1 / table["seeds"].iloc[0] + 1 / table["seeds"]))
        reason = (
            f"Seeds of one point differ by a standard deviation of "
            f"{_in_points(math.sqrt(variance))} (pooled over "
            f"{_counted(len(repeated), 'point')} with more than one seed)."
        )
        return stdtrit(freedom, 0.975) * errors.to_numpy(), reason
    images = results.validation_images
    errors = _standard_error(table["val_accuracy"].to_numpy(), images)
    reason = (
        "There is only one seed a point, so the spread between seeds is not known; the choice of "
        f"the {images:,} validation images alone gives an accuracy a standard error of "
        f"{_in_points(errors[0])} (binomial)."
    )
    return ndtri(0.975) * np.hypot(errors, errors[0]), reason


def _edges(results: Results) -> list[str]:
    lines = []
    for name, value in best_point(results).items():
        search = results.study["parameters"][name]
        ends = search.get("values") or [search["low"], search["high"]]
        if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
            continue
        if len(set(ends)) == 1:
            continue
        # Values that were listed are tried themselves; in a range the end itself is hardly drawn.
        edge = 0 if "values" in search else EDGE
        scale = math.log if search.get("log") else float
        low, high = scale(min(ends)), scale(max(ends))
        place = (scale(value) - low) / (high - low)
        if edge < place < 1 - edge:
            continue
        side, way = ("lower", "downwards") if place <= edge else ("upper", "upwards")
        lines.append(
            f"The best {name.replace('_', ' ')}, {_text(value)}, lies on the {side} edge of what "
            f"was tried ({_text(min(ends))} to {_text(max(ends))}): the range should be widened "
            f"{way}, since a better value may lie beyond."
        )
    return lines


def _epochs(results: Results) -> list[str]:
    try:
        found = best_epoch(results)
    except CalibrationError:
        return []
    line = (
        f"By epoch the mean validation accuracy is highest after epoch **{found.best}** of "
        f"{found.epochs} ({found.accuracy:.2%})"
    )
    if found.enough < found.best:
        line += (
            f"; epoch **{found.enough}** ({found.enough_accuracy:.2%}) is the first within one "
            f"standard error of it, {_in_points(found.standard_error)} for "
            f"{results.validation_images:,} images"
        )
    if found.best == found.epochs:
        line += ". That is the last epoch: longer training may be better still"
    return [f"{line}."]


def _states(results: Results) -> list[str]:
    lines, counts = [], results.counts
    if "pruned" in counts:
        lines.append(
            f"{_counted(counts['pruned'], 'trial')} of {len(results.trials)} "
            f"{'was' if counts['pruned'] == 1 else 'were'} pruned, which saved about "
            f"{saved_seconds(results) / 60:.1f} minutes of training."
        )
    if "failed" in counts:
        lines.append(
            f"{_counted(counts['failed'], 'trial')} of {len(results.trials)} failed and "
            f"{'is' if counts['failed'] == 1 else 'are'} not counted."
        )
    if not results.finished and not results.complete.empty:
        open_trials = counts.get("running", 0) + counts.get("waiting", 0)
        lines.append(
            f"The study is not finished ({_counted(open_trials, 'trial')} running or waiting): "
            "this may change."
        )
    return lines


def _limits(results: Results) -> list[str]:
    lines = []
    images, epochs = results.trials["train_images"].max(), results.trials["epochs"].max()
    usual = recipes.get(results.study["recipe"]).epochs
    if images < FULL_TRAINING:
        lines.append(
            f"Trials learn from {images:,.0f} images. What is best with so few need not be best "
            f"with {FULL_TRAINING:,}."
        )
    if epochs < usual:
        lines.append(
            f"Trials train for at most {_counted(int(epochs), 'epoch')}. What is best by then need "
            f"not be best after the {usual} of the recipe `{results.study['recipe']}`."
        )
    if results.choices["protocol"] == "deck":
        lines.append("The test images served as validation: the accuracies are optimistic.")
    return lines


def _ranked(results: Results) -> pd.DataFrame:
    table = points(results)
    if table.empty:
        states = ", ".join(f"{count} {state}" for state, count in results.counts.items())
        raise CalibrationError(
            f"The study in {results.folder} has no complete trial ({states or 'none began'}): it "
            "has no best point. Let it run on, or look at why its trials fail."
        )
    return table


def _point(results: Results, row: pd.Series) -> dict[str, Any]:
    """The values of a row's point as plain Python, as a recipe takes them."""

    def plain(name: str) -> Any:
        if pd.isna(row[name]):
            return None
        # A row of numbers has one dtype, which makes a float of a batch size.
        value = int(row[name]) if _is_integer_field(name) else row[name]
        return value.item() if isinstance(value, np.generic) else value

    return {name: plain(name) for name in results.parameters}


def _is_integer_field(name: str) -> bool:
    hint = typing.get_type_hints(recipes.Recipe).get(name)
    return hint is int or int in typing.get_args(hint)


def _distribution(results: Results, name: str) -> Any:
    """Optuna's distribution that holds all values of a parameter, numbers in their order."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    search, values = results.study["parameters"][name], results.complete[name]
    if not pd.api.types.is_numeric_dtype(values):
        return CategoricalDistribution(sorted(set(values)))
    ends = [*(search.get("values") or [search["low"], search["high"]]), *values]
    low, high = min(ends), max(ends)
    log = low > 0 and (bool(search.get("log")) or high / low > 10)
    kind = IntDistribution if pd.api.types.is_integer_dtype(values) else FloatDistribution
    return kind(low, high, log=log)


def _table(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    """A table as far as it is written: a study that has just begun has empty ones or none."""
    try:
        table = pd.read_csv(path)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        table = pd.DataFrame()
    missing = [column for column in columns if column not in table]
    return table.reindex(columns=[*table.columns, *missing])


def _standard_error(accuracy: Any, images: int) -> Any:
    return np.sqrt(accuracy * (1 - accuracy) / images)


def _in_points(difference: float) -> str:
    return f"{100 * difference:.2f} percentage points"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
