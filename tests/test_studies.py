"""Studies: what a file may ask for, which points it means, and how what it gets wrong is named."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar_lib import ROOT, recipes, studies, workflows
from cifar_lib.studies import Range, StudyError, Values

SHIPPED = sorted((ROOT / "studies").glob("*.yaml"))
GRID = """\
recipe: seed
parameters:
  learning_rate: [0.001, 0.01]
"""
VARIANTS = """\
recipe: fast
choices: {protocol: holdout, epochs: 2, image_sizes: [16, 20]}
variants:
  all: {}
  without Muon: {optimizer: sgd}
"""
DRAWN = """\
recipe: seed
parameters:
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  batch_size: {low: 16, high: 128}
  decay: {low: 0.0, high: 1.0}
  optimizer: [adam, sgd]
search: random
search_seed: 7
trials: 40
"""


@pytest.fixture
def load(tmp_path: Path):
    """Reads a study from its text."""

    def read(text: str) -> studies.Study:
        path = tmp_path / "example.yaml"
        path.write_text(text, encoding="utf-8")
        return studies.load(path)

    return read


def test_the_shipped_studies_answer_the_questions_in_their_order():
    loaded = {path.stem: studies.load(path) for path in SHIPPED}
    assert set(loaded) == {*workflows.STUDIES, workflows.ABLATIONS}
    for name, study in loaded.items():
        assert study.name == name and study.description
        # What is chosen on test images says nothing of new ones.
        assert study.base().test_size == 0 and study.base().protocol == "holdout"
        assert set(study.follows) < set(loaded)
    assert [point["learning_rate"] for point in loaded["learning_rate"].points()] == [
        *(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ]
    assert [point["batch_size"] for point in loaded["batch_size"].points()] == [16, 32, 64, 128]
    assert [point["epochs"] for point in loaded["epochs"].points()] == [30]
    assert loaded["maximum_accuracy"].search == "tpe"
    assert loaded["maximum_accuracy"].points() == [loaded["maximum_accuracy"].start()]


WRONG = {
    "unknown field": (GRID + "serch: grid\n", 4, "'serch' is unknown. Did you mean 'search'?"),
    "found is not written": (GRID + "found: {}\n", 4, "study field 'found' is unknown"),
    "unknown recipe": (
        GRID.replace("seed", "quik"),
        1,
        "recipe 'quik' is unknown. Did you mean 'quick'?",
    ),
    "unknown parameter": (
        GRID.replace("learning_rate", "learning_rat"),
        3,
        "'learning_rat' is unknown. Did you mean 'learning_rate'?",
    ),
    "not in the notebook": (
        GRID + "  runs_dir: [here]\n",
        4,
        "notebook parameter 'runs_dir' is unknown",
    ),
    "unknown choice": (
        GRID + "choices:\n  epochs: 3\n  bach_size: 4\n",
        6,
        "Did you mean 'batch_size'?",
    ),
    "unknown search": (GRID + "search: gird\n", 4, "'gird' is unknown. Did you mean 'grid'?"),
    "unknown pruner": (
        GRID + "pruner:\n  medain: {n_startup_trials: 3}\n",
        4,
        "'medain' is unknown. Did you mean 'median'? Known: median, percentile",
    ),
    "two pruners": (GRID + "pruner: {median: {}, patient: {}}\n", 4, "is unknown. Known: median"),
    "pruner's options": (GRID + "pruner: {median: 3}\n", 4, "the options of median are 3"),
    "seed varied": (GRID + "  seed: [0, 1]\n", 4, "the seeds are chosen by the field `seeds`"),
    "seed chosen": (GRID + "choices:\n  seed: 3\n", 5, "the seeds are chosen by the field `seeds`"),
    "no recipe": (
        GRID.replace("0.01]", "-1]"),
        3,
        "learning_rate is -1.0; it must be a finite number above 0",
    ),
    "end of a range makes no recipe": (
        GRID + "  batch_size: {low: 0, high: 64, points: 3}\n",
        4,
        "batch_size is 0; it must be 1 or more",
    ),
    "values make no recipe together": (
        GRID + "  train_size: [40, 1000]\n  batch_size: [30, 50]\n",
        2,
        "the point {'learning_rate': 0.001, 'train_size': 40, 'batch_size': 50}: batch_size is 50, "
        "more than the 40",
    ),
    "choice makes no recipe": (
        GRID + "choices:\n  epochs: 3\n  optimizer: adma\n",
        6,
        "optimizer 'adma' is unknown. Did you mean 'adam'?",
    ),
    "varied and chosen": (
        GRID + "choices:\n  learning_rate: 0.1\n",
        5,
        "learning_rate is varied, too; take it out here",
    ),
    "value twice": (GRID.replace("0.01", "0.001"), 3, "name each value once"),
    "no value": (GRID.replace("0.001, 0.01", ""), 3, "name each value once"),
    "field twice": (GRID + "recipe: quick\n", 4, 'duplicate key "recipe"'),
    "parameter twice": (
        GRID + "  learning_rate: [0.1]\n",
        4,
        'duplicate key "learning_rate"',
    ),
    "text for a number": (GRID + "seeds: two\n", 4, "seeds is 'two'; it must be a whole number"),
    "number for text": (GRID + "description: 3\n", 4, "description is 3; it must be text"),
    "truth for a number": (GRID + "seeds: true\n", 4, "seeds is True; it must be a whole number"),
    "half a core": (
        GRID + "cores_per_trial: 0.5\n",
        4,
        "cores_per_trial is 0.5; it must be a whole number",
    ),
    "no seeds": (GRID + "seeds: 0\n", 4, "seeds is 0; it must be 1 or more"),
    "no time": (GRID + "trial_minutes: 0\n", 4, "trial_minutes is 0.0; it must be above 0"),
    "value is no list": (
        GRID.replace("[0.001, 0.01]", "0.001"),
        3,
        "learning_rate is 0.001; write a list of values, or a range as {low: ",
    ),
    "parameters are no mapping": (
        "recipe: seed\nparameters: [learning_rate]\n",
        2,
        "parameters is ['learning_rate']; it must be a mapping",
    ),
    "follows is no list": (
        GRID + "follows: learning_rate\n",
        4,
        "follows is 'learning_rate'; it must be a list",
    ),
    "follows itself": (GRID + "follows: [example]\n", 4, "example cannot follow itself"),
    "name of a folder above": (GRID + "name: ../up\n", 4, "name is '../up'; use letters"),
    "variants and parameters": (
        VARIANTS + "parameters:\n  epochs: [1]\n",
        1,
        "write the field parameters, or variants in its place",
    ),
    "no variant": ("recipe: seed\nvariants: {}\n", 2, "name at least one variant"),
    "variant without choices": (
        VARIANTS.replace("{}", "3"),
        4,
        "all is 3; write its choices as a mapping",
    ),
    "variant makes no recipe": (
        VARIANTS.replace("sgd}", "sgd, filter_learning_rate: 0.1}"),
        5,
        "filter_learning_rate is 0.1, but the optimizer 'sgd' has one rate for all",
    ),
    "unknown choice of a variant": (
        VARIANTS + "  other:\n    bach_size: 4\n",
        7,
        "Did you mean 'batch_size'?",
    ),
    "variants are drawn": (VARIANTS + "search: tpe\n", 6, "variants are all tried"),
    "nothing varied": ("recipe: seed\nparameters: {}\n", 2, "name at least one parameter"),
    "low above high": (
        DRAWN.replace("1e-4", "1"),
        3,
        "low is 1 and high 0.01; low must be less",
    ),
    "low is high": (DRAWN.replace("16", "128"), 4, "low is 128 and high 128; low must be less"),
    "log from 0": (
        DRAWN.replace("1e-4", "0.0"),
        3,
        "low is 0.0; with log: true it must be above 0",
    ),
    "log is a word": (DRAWN.replace("log: true", "log: yes"), 3, "log is 'yes'; write true"),
    "endless range": (DRAWN.replace("1.0}", ".inf}"), 5, "high is inf; it must be a finite number"),
    "range of text": (DRAWN.replace("16", "few"), 4, "low is 'few'; it must be a finite number"),
    "range without an end": (
        DRAWN.replace(", high: 128", ""),
        4,
        "the range has no high; add it",
    ),
    "unknown range field": (
        DRAWN.replace("log:", "logs:"),
        3,
        "range field 'logs' is unknown. Did you mean 'log'?",
    ),
    "one point": (DRAWN.replace("16,", "16, points: 1,"), 4, "points is 1; it must be a whole"),
    "grid over a range": (
        "recipe: seed\nparameters:\n  learning_rate: {low: 0.1, high: 0.2}\n",
        3,
        "add points, 2 or more",
    ),
    "random without number": (DRAWN.replace("trials: 40\n", ""), 7, "random needs to know how"),
    "tpe without end": (
        DRAWN.replace("random", "tpe").replace("trials: 40\n", ""),
        7,
        "tpe needs an end: add trials, or minutes",
    ),
    "trials with grid": (GRID + "trials: 3\n", 4, "a grid has as many trials as points"),
    "repeats without seeds": (GRID + "repeat_best: {points: 2}\n", 4, "seeds is missing; add it"),
    "repeats that repeat nothing": (
        GRID + "seeds: 2\nrepeat_best:\n  points: 1\n  seeds: 2\n",
        7,
        "seeds is 2; it must be 3 or more",
    ),
    "unknown field of repeats": (
        GRID + "repeat_best:\n  points: 1\n  seed: 2\n",
        6,
        "field 'seed' is unknown. Did you mean 'seeds'?",
    ),
    "repeats without an end": (
        DRAWN.replace("random", "tpe").replace("trials: 40", "minutes: 5")
        + "repeat_best: {points: 1, seeds: 2}\n",
        10,
        "repeated after a number of trials: add trials",
    ),
    "no validation images": (
        VARIANTS.replace("protocol: holdout", "test_size: 100"),
        1,
        "add protocol: holdout to choices",
    ),
    "what the accuracy is measured on": (
        GRID + "  validation_size: [1000, 5000]\n",
        4,
        "validation_size decides what is measured: write it in choices",
    ),
    "variants of other data": (
        VARIANTS + "  drawn: {dataset: synthetic}\n",
        6,
        "dataset decides what is measured: write it in choices",
    ),
    "none beside numbers": (
        GRID + "  early_stopping_patience: [null, 3]\n",
        4,
        "early_stopping_patience has none beside other values than text: compare these as variants",
    ),
    "a name that leaves the folder": (GRID + "name: ..\n", 4, "name is '..'; use letters"),
    "syntax": (GRID + "search: [grid\nseeds: 1\n", 5, "expected ',' or ']'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_line_and_the_remedy(name, load):
    text, line, message = WRONG[name]
    with pytest.raises(StudyError) as caught:
        load(text)
    assert f"example.yaml, line {line}: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: seed\n", "write the field parameters, or variants in its place"),
        ("parameters:\n  epochs: [1]\n", "the field recipe is missing; add it"),
        ("", "is no study: write `recipe:` and `parameters:`"),
        ("- seed\n", "is no study: write `recipe:` and `parameters:`"),
    ],
)
def test_what_is_missing_is_named(text, message, load):
    with pytest.raises(StudyError, match=r"example\.yaml") as caught:
        load(text)
    assert message in str(caught.value)


def test_a_missing_file_names_those_that_are_there(tmp_path, load):
    load(GRID)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("exmaple.yaml", "binary.yaml"):
        with pytest.raises(StudyError, match=rf"{name} cannot be read.*example\.yaml"):
            studies.load(tmp_path / name)


def test_a_variant_is_a_set_of_choices(load):
    study = load(VARIANTS)
    assert study.planned() == [({"variant": "all"}, 0), ({"variant": "without Muon"}, 0)]
    whole, without = (study.at(point, seed=3) for point in study.points())
    assert whole == recipes.get(
        "fast", protocol="holdout", epochs=2, image_sizes=(16, 20), test_size=0, seed=3
    )
    assert without == whole.replace(optimizer="sgd", filter_learning_rate=None)
    written = json.loads(study.to_json())
    assert written["variants"]["without Muon"] == {"optimizer": "sgd"}
    assert "variants" not in json.loads(load(GRID).to_json()), "as before there were any"


@pytest.mark.parametrize(
    "varied",
    [
        "parameters: {batch_size: [50, 200]}",
        "parameters: {batch_size: {low: 50, high: 200, points: 2}}",
        "variants: {small: {batch_size: 50}, large: {batch_size: 200}}",
    ],
)
def test_what_is_varied_need_not_go_with_the_choices_as_the_recipe_has_it(varied, load):
    few = "recipe: fast\nchoices: {protocol: holdout, train_size: 200}\n"
    study = load(few + varied)
    assert recipes.get("fast").batch_size > 200
    assert [study.at(point).batch_size for point in study.points()] == [50, 200]
    with pytest.raises(StudyError, match=r"line 3: .*batch_size is 300, more than the 200"):
        load(few + varied.replace("200", "300"))
    with pytest.raises(StudyError, match=r"line 1: batch_size is .*, more than the 200"):
        load(few + "parameters: {learning_rate: [0.1]}")


def test_numbers_are_numbers_however_they_are_written(load):
    text = "recipe: seed\nparameters:\n  learning_rate: [1e-4, 2E-3, 0.00_5, 1]\n  epochs: [1_0]\n"
    study = load(text)
    assert study.parameters["learning_rate"].values == (1e-4, 2e-3, 5e-3, 1)
    assert study.parameters["epochs"].values == (10,)
    for value in [*study.parameters["learning_rate"].values, *study.parameters["epochs"].values]:
        assert type(value) in (int, float)
    drawn = load(DRAWN)
    assert drawn.parameters["learning_rate"] == Range(0.0001, 0.01, log=True)
    assert json.loads(drawn.to_json())["parameters"]["learning_rate"]["low"] == 1e-4


def test_a_grid_over_a_logarithmic_range_is_geometric_with_exact_ends():
    values = Range(1e-5, 1e-1, log=True, points=5).grid()
    assert values == (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    odd = Range(3.14159e-4, 2.71828e-1, log=True, points=7).grid()
    assert odd[0] == 3.14159e-4 and odd[-1] == 2.71828e-1
    ratios = [b / a for a, b in itertools.pairwise(odd)]
    assert max(ratios) / min(ratios) < 1.02
    assert Range(0.0, 1.0, points=5).grid() == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_a_grid_over_whole_numbers_is_of_whole_numbers():
    values = Range(16, 128, log=True, points=4).grid()
    assert values == (16, 32, 64, 128) and all(type(value) is int for value in values)
    # More points than numbers give each number once.
    assert Range(1, 3, points=10).grid() == (1, 2, 3)


def test_a_grid_is_every_combination_with_every_seed(load):
    study = load(GRID + "  optimizer: [adam, sgd, rmsprop]\nseeds: 2\n")
    points = [(point["learning_rate"], point["optimizer"]) for point in study.points()]
    assert len(points) == len(set(points)) == 6
    assert study.points()[0] == {"learning_rate": 0.001, "optimizer": "adam"}
    planned = study.planned()
    assert len(planned) == 12
    # The first seed of all points is done before the second of any.
    assert [seed for _, seed in planned] == [0] * 6 + [1] * 6


def test_every_whole_number_is_drawn_alike():
    random = np.random.default_rng(0)
    for log in (False, True):
        drawn = [Range(1, 3, log=log).draw(random) for _ in range(3000)]
        found = [drawn.count(value) for value in (1, 2, 3)]
        # Equal ratios count alike, from a half below to a half above.
        ratios = np.diff(np.log([0.5, 1.5, 2.5, 3.5])) / math.log(7)
        expected = 3000 * ratios if log else [1000] * 3
        assert sum(found) == 3000
        assert found == pytest.approx(expected, abs=150)


def test_no_value_is_a_value_by_its_name(load):
    study = load(GRID + "  mixing: [null, mixup]\n")
    assert [point["mixing"] for point in study.points()[:2]] == [recipes.NONE, "mixup"]
    assert study.at(study.points()[0]).mixing is None


def test_random_points_lie_inside_and_are_the_same_everywhere(load, tmp_path):
    study = load(DRAWN)
    points = study.points()
    assert len(points) == 40
    for point in points:
        assert 1e-4 <= point["learning_rate"] <= 1e-2
        assert 16 <= point["batch_size"] <= 128 and type(point["batch_size"]) is int
        assert 0 <= point["decay"] <= 1
        assert point["optimizer"] in ("adam", "sgd")
    # Equal ratios count alike: about half lie below the geometric mean.
    assert 10 < sum(point["learning_rate"] < 1e-3 for point in points) < 30
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom cifar_lib import studies\n"
        "print(json.dumps(studies.load(Path(sys.argv[1])).points()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "example.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == points
    assert load(DRAWN.replace("search_seed: 7", "search_seed: 8")).points() != points
    # Asking for more keeps those that were drawn before.
    assert load(DRAWN.replace("trials: 40", "trials: 50")).points()[:40] == points


def test_ends_of_a_range_are_never_passed_by_rounding():
    narrow = Range(0.0012341, 0.0012344)
    random = np.random.default_rng(0)
    for value in [narrow.draw(random) for _ in range(100)]:
        assert narrow.low <= value <= narrow.high
    for value in Range(0.0012341, 0.0012344, points=3).grid():
        assert narrow.low <= value <= narrow.high


FOLLOWS = """\
recipe: seed
follows: [first, second]
choices: {epochs: 3}
parameters:
  batch_size: {low: 8, high: 64}
search: random
trials: 5
"""
BEST = {"first": {"learning_rate": 0.003, "batch_size": 16}, "second": {"epochs": 9}}


def test_a_study_takes_the_best_of_those_it_follows(load):
    study = studies.resolve(load(FOLLOWS), BEST)
    # Not varied here: taken. Chosen here: as chosen. Varied here: the first point.
    assert study.base().learning_rate == 0.003
    assert study.base().epochs == 3
    assert study.start() == {"batch_size": 16}
    assert study.points()[0] == {"batch_size": 16} and len(study.points()) == 5
    assert json.loads(study.to_json())["found"] == BEST

    later = studies.resolve(load(FOLLOWS), BEST | {"second": {"learning_rate": 0.1}})
    assert later.base().learning_rate == 0.1, "of two studies the later one counts"


def test_a_search_by_tpe_starts_from_what_was_found(load):
    study = studies.resolve(load(FOLLOWS.replace("random", "tpe")), BEST)
    assert study.points() == [{"batch_size": 16}]
    assert study.planned() == [({"batch_size": 16}, 0)]
    assert load(DRAWN.replace("random", "tpe")).points() == []


def test_a_grid_that_follows_tries_its_own_points(load):
    text = FOLLOWS.replace("random\ntrials: 5", "grid").replace("64}", "64, points: 2}")
    study = studies.resolve(load(text), BEST)
    assert study.start() is None
    assert study.points() == [{"batch_size": 8}, {"batch_size": 64}]
    assert study.base().learning_rate == 0.003


@pytest.mark.parametrize("space", ["{low: 32, high: 64}", "[8, 32]"])
def test_what_was_found_outside_the_range_is_refused(space, load):
    study = load(FOLLOWS.replace("{low: 8, high: 64}", space))
    with pytest.raises(StudyError) as caught:
        studies.resolve(study, BEST)
    message = str(caught.value)
    assert "example starts from batch_size 16, found by first, second" in message
    assert "widen them" in message


def test_values_and_ranges_check_themselves():
    with pytest.raises(StudyError, match="name each value once"):
        Values((1, 1))
    for wrong in (math.nan, math.inf, "1", True, None):
        with pytest.raises(StudyError, match="finite number"):
            Range(wrong, 2)


def test_a_bad_study_is_a_bad_recipe_to_the_command_line(tmp_path):
    assert issubclass(StudyError, recipes.RecipeError)
    path = tmp_path / "example.yaml"
    path.write_text(GRID.replace("0.01]", "a]"))
    command = [sys.executable, "-m", "cifar_lib", "sweep", str(path), "--studies-dir"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"StudyError: {path}, line 3: learning_rate is 'a'")
    assert list(tmp_path.iterdir()) == [path]


def test_reading_a_study_imports_nothing_slow():
    code = (
        "import sys\nfrom cifar_lib import studies\n"
        f"studies.load({str(SHIPPED[0])!r}).points()\n"
        "slow = {'tensorflow', 'keras', 'optuna', 'distributed', 'dask', 'pandas'}\n"
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
