"""Studies: what a calibration varies, how it searches and what it may cost, read from a YAML file.

A study is checked whole when it is read: each point that is known by then must make a recipe, and
so must each value that a search may draw, by itself. Nothing here imports TensorFlow, Optuna or
Dask, so a bad study is refused at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cifar_lib import ROOT, parameters, recipes
from cifar_lib.recipes import Recipe, RecipeError

NOTEBOOK = ROOT / "notebooks" / "04_train.ipynb"
SEARCHES = ("grid", "random", "tpe")
PRUNERS = ("median", "percentile", "successive_halving", "hyperband", "patient", "threshold")
NAME = re.compile(r"\w[\w.-]*")
#: What decides what the accuracy of a trial is measured on, so is the same for all.
MEASURE = ("dataset", "protocol", "validation_size", "test_size")

#: A value of one choice of a recipe.
Value = int | float | str | bool | None


class StudyError(RecipeError):
    """A study asks for something that does not exist or cannot be."""


@dataclass(frozen=True)
class Values:
    """A list of values to try.

    Attributes:
        values: at least one, each once.
    """

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise StudyError(f"the values are {list(self.values)}; name each value once.")

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.values

    def grid(self) -> tuple[Value, ...]:
        return self.values

    def draw(self, random: np.random.Generator) -> Value:
        return self.values[random.integers(len(self.values))]


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, whole ones if both ends are.

    Attributes:
        low: the least value.
        high: the greatest value, above `low`.
        log: equal ratios count alike, rather than equal differences.
        points: how many values a grid takes from it, both ends among them.
    """

    low: float
    high: float
    log: bool = False
    points: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise StudyError(f"{name} is {value!r}; it must be a finite number.")
        if self.low >= self.high:
            raise StudyError(f"low is {self.low} and high {self.high}; low must be less.")
        if type(self.log) is not bool:
            raise StudyError(f"log is {self.log!r}; write true or false.")
        if self.log and self.low <= 0:
            raise StudyError(f"low is {self.low}; with log: true it must be above 0.")
        if self.points is not None and (type(self.points) is not int or self.points < 2):
            raise StudyError(f"points is {self.points!r}; it must be a whole number, 2 or more.")

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.low, self.high

    @property
    def integer(self) -> bool:
        return type(self.low) is int and type(self.high) is int

    def grid(self) -> tuple[Value, ...]:
        if self.points is None:
            raise StudyError("a grid needs to know how many values to take: add points, 2 or more.")
        space = np.geomspace if self.log else np.linspace
        return tuple(dict.fromkeys(map(self._value, space(self.low, self.high, self.points))))

    def draw(self, random: np.random.Generator) -> Value:
        # Rounding would give the ends of whole numbers half the weight of the others.
        half = 0.5 if self.integer else 0
        low, high = self.low - half, self.high + half
        if self.log:
            number = math.exp(random.uniform(math.log(low), math.log(high)))
        else:
            number = random.uniform(low, high)
        return min(max(self._value(number), self.low), self.high)

    def _value(self, number: float) -> Value:
        if self.integer:
            return round(number)
        # Three digits are as fine as anyone calibrates, and read well; the ends stay what they are.
        number = float(min(max(number, self.low), self.high))
        rounded = float(f"{number:.3g}")
        inside = self.low < number < self.high and self.low <= rounded <= self.high
        return rounded if inside else number


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is tried, in which order, and what it may cost.

    Attributes:
        name: also the folder's, under `runs/studies/`.
        description: what the study is to answer.
        recipe: the name of the recipe that is varied.
        choices: what every trial has that the recipe has not.
        follows: names of studies whose best values are taken: as `choices` if this study does not
            vary them, else as the first point.
        found: those values, by study, once they are known.
        parameters: what is varied, by the name of the recipe's field.
        variants: sets of choices by name, instead of `parameters`, which then has their names as
            the values of "variant".
        search: one of `SEARCHES`; "grid" tries all combinations.
        search_options: for Optuna's sampler of that name.
        search_seed: decides what "random" and "tpe" draw.
        trials: points that "random" or "tpe" tries; None: until `minutes` are over.
        seeds: runs of each point, with the seeds 0, 1, ...
        repeat_best: so many runs, in all, of so many of the best points, as (points, seeds).
        pruner: one of `PRUNERS`, which ends trials that are clearly losing; None lets all go on.
        pruner_options: for Optuna's pruner of that name.
        cores_per_trial: cores of a machine for each trial; None: all, one trial at a time. On a
            machine with GPUs each trial has one of them.
        minutes: no trial starts after so much time, counted over all sittings.
        trial_minutes: a trial that takes longer is stopped and has failed.

    Raises:
        StudyError: a value is impossible, or a point makes no recipe.
    """

    name: str
    description: str = ""
    recipe: str
    choices: Mapping[str, Value] = field(default_factory=dict)
    follows: tuple[str, ...] = ()
    found: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    parameters: Mapping[str, Values | Range]
    variants: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    search: str = "grid"
    search_options: Mapping[str, Value] = field(default_factory=dict)
    search_seed: int = 0
    trials: int | None = None
    seeds: int = 1
    repeat_best: tuple[int, int] | None = None
    pruner: str | None = None
    pruner_options: Mapping[str, Value] = field(default_factory=dict)
    cores_per_trial: int | None = None
    minutes: float | None = None
    trial_minutes: float = 720.0

    def base(self) -> Recipe:
        """The recipe of every trial, before the varied choices are set.

        What the recipe has in their place may not go with the rest, a batch of 1,000 images with
        200 to train on: then they have their first values.
        """
        found = {name: value for best in self.found.values() for name, value in best.items()}
        choices = {**found, **self.choices}
        try:
            return recipes.get(self.recipe, **choices)
        except RecipeError:
            first = {name: space.ends[0] for name, space in self.parameters.items()}
            first = choices_at(self.variants, first)
            with contextlib.suppress(RecipeError, TypeError):
                return recipes.get(self.recipe, **{**first, **choices})
            raise

    def at(self, point: Mapping[str, Value], **choices: Value) -> Recipe:
        """The recipe of a point, with some choices more."""
        return self.base().replace(**choices_at(self.variants, point), **choices)

    def start(self) -> dict[str, Value] | None:
        """The first point of a search that follows others; None without such."""
        if not self.follows or self.search == "grid":
            return None
        base = self.base()
        values = {name: getattr(base, name) for name in self.parameters}
        return {name: recipes.NONE if value is None else value for name, value in values.items()}

    def points(self) -> list[dict[str, Value]]:
        """The points that are known beforehand, in order; none with "tpe" but its start."""
        start = self.start()
        first = [] if start is None else [start]
        if self.search == "tpe":
            return first
        if self.search == "grid":
            grids = [space.grid() for space in self.parameters.values()]
            return [
                dict(zip(self.parameters, values, strict=True))
                for values in itertools.product(*grids)
            ]
        random = np.random.default_rng(self.search_seed)
        drawn = [
            {name: space.draw(random) for name, space in self.parameters.items()}
            for _ in range(self.trials - len(first))
        ]
        return first + drawn

    def planned(self) -> list[tuple[dict[str, Value], int]]:
        """The trials that are known beforehand, in order, as point and seed."""
        return [(point, seed) for seed in range(self.seeds) for point in self.points()]

    def to_json(self) -> str:
        """What was asked for, as `study.json` keeps it."""
        content = dataclasses.asdict(self)
        if not self.variants:
            del content["variants"]
        if self.repeat_best is not None:
            content["repeat_best"] = dict(zip(("points", "seeds"), self.repeat_best, strict=True))
        options = content.pop("pruner_options")
        content["pruner"] = self.pruner and {self.pruner: options}
        content["cores_per_trial"] = self.cores_per_trial or "all"
        return json.dumps(content, indent=2) + "\n"


def choices_at(
    variants: Mapping[str, Mapping[str, Value]], point: Mapping[str, Value]
) -> Mapping[str, Value]:
    """The choices of a recipe that a point of a study is, which has these variants or none."""
    return variants[point["variant"]] if variants else point


def load(path: Path | str) -> Study:
    """Read a study file.

    Raises:
        StudyError: the file is not there or asks for what cannot be; the line and the remedy are
            named.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(str(file) for file in path.parent.glob("*.yaml"))) or "none"
        raise StudyError(f"{path} cannot be read: {error}. Studies there: {known}.") from error
    try:
        content = YAML(typ="rt").load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise StudyError(f"{path}{line}: {getattr(error, 'problem', error)}.") from error
    if not isinstance(content, Mapping):
        raise StudyError(f"{path} is no study: write `recipe:` and `parameters:` at least.")
    return _Reader(path, content).study()


class _Reader:
    """Reads the parts of a study file, and names the line of what it refuses."""

    def __init__(self, path: Path, content: Mapping) -> None:
        self.path, self.content = path, content

    def study(self) -> Study:
        top = self.content
        known = [name for name in Study.__dataclass_fields__ if name != "found"]
        written = [name for name in known if not name.endswith("_options")]
        for key in top:
            if key not in written:
                raise self.error(top, key, recipes.unknown("study field", key, written))
        if "recipe" not in top:
            raise StudyError(f"{self.path}: the field recipe is missing; add it.")
        if ("parameters" in top) == ("variants" in top):
            message = "write the field parameters, or variants in its place."
            raise self.error(top, "recipe", message)
        for key in ("parameters", "variants", "choices", "repeat_best"):
            if key in top and not isinstance(top[key], Mapping):
                raise self.error(top, key, f"{key} is {_plain(top[key])!r}; it must be a mapping.")
        fields: dict = {"name": self.path.stem, "trial_minutes": Study.trial_minutes}
        for key, kind, least in (
            ("name", str, None),
            ("description", str, None),
            ("recipe", str, None),
            ("search_seed", int, 0),
            ("trials", int, 1),
            ("seeds", int, 1),
            ("cores_per_trial", int, 1),
            ("minutes", float, 0),
            ("trial_minutes", float, 0),
        ):
            if key in top and not (key == "cores_per_trial" and top[key] == "all"):
                fields[key] = self.scalar(top, key, kind, least)
        if not NAME.fullmatch(fields["name"]):
            raise self.error(top, "name", f"name is {fields['name']!r}; use letters, digits, _ . -")
        fields["follows"] = self.names("follows")
        for key, names in (("search", SEARCHES), ("pruner", PRUNERS)):
            if top.get(key) is not None:
                fields[key], fields[f"{key}_options"] = self.named(key, names)
        fields["choices"] = self.choices()
        if "variants" in top:
            fields["variants"] = self.variants()
            fields["parameters"] = {"variant": Values(tuple(fields["variants"]))}
        else:
            fields["parameters"] = self.parameters()
        if "repeat_best" in top:
            fields["repeat_best"] = self.repeat_best(fields.get("seeds", 1))
        study = Study(**fields)
        self.check(study)
        return study

    def error(self, mapping: Mapping, key: str, message: str) -> StudyError:
        line = mapping.lc.key(key)[0] + 1 if key in mapping else 1
        return StudyError(f"{self.path}, line {line}: {message}")

    def scalar(self, mapping: Mapping, key: str, kind: type, least: float | None) -> Value:
        value = _plain(mapping[key])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            wanted = {int: "a whole number", float: "a number", str: "text"}[kind]
            raise self.error(mapping, key, f"{key} is {value!r}; it must be {wanted}.")
        # Whole numbers have a least value; a time must be above it.
        if least is not None and (value < least if kind is int else not value > least):
            bound = f"{least} or more" if kind is int else f"above {least}"
            raise self.error(mapping, key, f"{key} is {value!r}; it must be {bound}.")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        names = _plain(self.content.get(key, []))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self.error(
                self.content, key, f"{key} is {names!r}; it must be a list of names of studies."
            )
        return tuple(names)

    def named(self, key: str, names: tuple[str, ...]) -> tuple[str, dict]:
        """What is written as `key: name` or as `key: {name: {option: value}}`."""
        value = _plain(self.content[key])
        name, options = value, {}
        if isinstance(value, dict) and len(value) == 1:
            [(name, options)] = value.items()
        if not isinstance(name, str) or name not in names:
            raise self.error(self.content, key, recipes.unknown(key, name, names))
        if not isinstance(options, dict):
            raise self.error(
                self.content, key, f"the options of {name} are {options!r}; write option: value."
            )
        return name, options

    def field(self, mapping: Mapping, name: str, *, varied: bool = False) -> None:
        """Refuse a choice that the notebook does not have, or that is not a study's to make."""
        if varied and name in MEASURE:
            message = f"{name} decides what is measured: write it in choices, the same for all."
            raise self.error(mapping, name, message)
        if name == "seed":
            raise self.error(mapping, name, "the seeds are chosen by the field `seeds`.")
        declared = parameters.declared(NOTEBOOK)
        known = [name for name in Recipe.__dataclass_fields__ if name in declared]
        if name not in known:
            known.remove("seed")
            raise self.error(mapping, name, recipes.unknown("notebook parameter", name, known))

    def choices(self) -> dict[str, Value]:
        recipe = str(self.content["recipe"])
        if recipe not in recipes.RECIPES:
            message = recipes.unknown("recipe", recipe, recipes.RECIPES)
            raise self.error(self.content, "recipe", message)
        written = self.content.get("choices", {})
        for name in written:
            self.field(written, name)
            if name in self.content.get("parameters", {}):
                raise self.error(written, name, f"{name} is varied, too; take it out here.")
        # Test images are for the end, not for choosing.
        return {"test_size": 0, **_plain(written)}

    def variants(self) -> dict[str, dict[str, Value]]:
        written, variants = self.content["variants"], {}
        if self.content.get("search", "grid") != "grid":
            raise self.error(self.content, "search", "variants are all tried: take search out.")
        if not written:
            raise self.error(self.content, "variants", "name at least one variant.")
        for name, choices in written.items():
            if not isinstance(choices, Mapping):
                message = f"{name} is {_plain(choices)!r}; write its choices as a mapping."
                raise self.error(written, name, message)
            for key in choices:
                self.field(choices, key, varied=True)
            variants[str(name)] = _plain(choices)
        return variants

    def parameters(self) -> dict[str, Values | Range]:
        written, spaces = self.content["parameters"], {}
        if not written:
            raise self.error(self.content, "parameters", "name at least one parameter to vary.")
        for name in written:
            self.field(written, name, varied=True)
            value = _plain(written[name])
            try:
                if isinstance(value, list):
                    value = [recipes.NONE if item is None else item for item in value]
                    if recipes.NONE in value and not all(isinstance(item, str) for item in value):
                        raise StudyError(
                            f"{name} has none beside other values than text: compare these as "
                            "variants."
                        )
                    spaces[name] = Values(tuple(value))
                elif isinstance(value, dict):
                    for key in value:
                        if key not in Range.__dataclass_fields__:
                            fields = Range.__dataclass_fields__
                            raise StudyError(recipes.unknown("range field", key, fields))
                    for key in ("low", "high"):
                        if key not in value:
                            raise StudyError(f"the range has no {key}; add it.")
                    spaces[name] = Range(**value)
                else:
                    raise StudyError(
                        f"{name} is {value!r}; write a list of values, or a range as "
                        "{low: ..., high: ..., log: true}."
                    )
                if self.content.get("search", "grid") == "grid":
                    spaces[name].grid()
            except (RecipeError, TypeError) as error:
                raise self.error(written, name, str(error)) from error
        return spaces

    def repeat_best(self, seeds: int) -> tuple[int, int]:
        written = self.content["repeat_best"]
        for key in written:
            if key not in ("points", "seeds"):
                message = recipes.unknown("field", key, ("points", "seeds"))
                raise self.error(written, key, message)
        for key in ("points", "seeds"):
            if key not in written:
                raise self.error(self.content, "repeat_best", f"{key} is missing; add it.")
        points = self.scalar(written, "points", int, 1)
        return points, self.scalar(written, "seeds", int, seeds + 1)

    def base(self, study: Study) -> Recipe:
        written = self.content.get("choices", {})
        try:
            base = study.base()
        except RecipeError as error:
            key = next((name for name in written if name in str(error)), None)
            place = (self.content, "recipe") if key is None else (written, key)
            raise self.error(*place, str(error)) from error
        if base.protocol == "final":
            message = (
                "the protocol 'final' has no validation images to choose by: add protocol: holdout "
                "to choices."
            )
            raise self.error(self.content, "recipe", message)
        return base

    def check(self, study: Study) -> None:
        """Refuse what only the parts together show."""
        top = self.content
        base = self.base(study)
        written = top["variants" if study.variants else "parameters"]
        for name in written:
            if study.variants:
                alone = [study.variants[str(name)]]
            else:
                alone = [{name: value} for value in study.parameters[name].ends]
            try:
                for choices in alone:
                    base.replace(**choices)
            except (RecipeError, TypeError) as error:
                raise self.error(written, name, str(error)) from error
        if study.search == "grid" and "trials" in top:
            raise self.error(top, "trials", "a grid has as many trials as points; take it out.")
        if study.search == "random" and study.trials is None:
            raise self.error(top, "search", "random needs to know how many points: add trials.")
        if study.search == "tpe" and study.trials is None and study.minutes is None:
            raise self.error(top, "search", "tpe needs an end: add trials, or minutes.")
        if study.search == "tpe" and study.repeat_best and study.trials is None:
            message = "the best points are repeated after a number of trials: add trials."
            raise self.error(top, "repeat_best", message)
        if study.name in study.follows:
            raise self.error(top, "follows", f"{study.name} cannot follow itself.")
        for point in study.points():
            try:
                study.at(point)
            except RecipeError as error:
                raise self.error(top, "parameters", f"the point {point}: {error}") from error


def resolve(study: Study, best: Mapping[str, Mapping[str, Value]]) -> Study:
    """The study with what the studies found that it follows.

    Args:
        study: as read from its file.
        best: the best point of each study in `study.follows`.

    Raises:
        StudyError: a value that was found lies outside the range that is searched here.
    """
    resolved = dataclasses.replace(study, found={name: best[name] for name in study.follows})
    for name, value in (resolved.start() or {}).items():
        space = study.parameters[name]
        inside = (
            value in space.values
            if isinstance(space, Values)
            else isinstance(value, int | float) and space.low <= value <= space.high
        )
        if not inside:
            raise StudyError(
                f"The study {study.name} starts from {name} {value!r}, found by "
                f"{', '.join(study.follows)}, which its own parameters leave out: widen them."
            )
    return resolved


def _plain(value: object) -> object:
    """What ruamel.yaml reads, as Python's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
