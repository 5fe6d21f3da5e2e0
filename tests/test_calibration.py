import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from cifar_lib import ROOT, calibration, reports

STAND_IN = "synthetic stand-in, not CIFAR-100"
CHOICES = {"epochs": 6, "train_size": 10_000, "validation_size": 1_000, "test_size": 0}
RATES = {"learning_rate": {"values": [1e-4, 3e-4, 1e-3]}}


def trial(accuracy=None, *, state="complete", seed=0, epochs=6, epochs_run=None, **more):
    """A row of trials.csv; whole epochs take 20 seconds each."""
    usual = {"complete": epochs, "pruned": 2, "failed": 0, "running": 1, "waiting": 0}
    run = usual[state] if epochs_run is None else epochs_run
    return {
        "state": state,
        "seed": seed,
        "val_accuracy": accuracy,
        "val_loss": None if accuracy is None else 4.6 * (1 - accuracy),
        "best_val_accuracy": accuracy,
        "best_epoch": run or None,
        "epochs": epochs,
        "epochs_run": run,
        "train_images": 10_000,
        "train_seconds": 20.0 * run,
        "seconds": 20.0 * run + 10,
        "worker": "host",
        "started": "2026-05-01T10:00:00+00:00",
        "attempts": 1,
        "error": "",
        "notebook": "",
    } | more


def curve(row, number):
    """Straight lines up to the trial's accuracy, as rows of histories.csv."""
    epochs = row["epochs_run"]
    for epoch in range(1, epochs + 1):
        accuracy = (row["val_accuracy"] or 0.1) * epoch / epochs
        yield {"trial": number, "epoch": epoch, "accuracy": accuracy, "loss": 2.0} | {
            "val_accuracy": accuracy,
            "val_loss": 2.0,
            "learning_rate": 1e-4,
            "train_seconds": 20.0,
            "validation_seconds": 1.0,
        }


def write(folder, parameters, rows, histories=None, **more):
    folder.mkdir(parents=True)
    study = {
        "name": folder.name,
        "description": "Which is best?",
        "recipe": "seed",
        "choices": CHOICES,
        "follows": [],
        "found": {},
        "parameters": parameters,
        "search": "grid",
        "pruner": None,
        "dataset_title": "CIFAR-100",
    }
    (folder / "study.json").write_text(json.dumps(study | more))
    rows = [{"trial": number} | row for number, row in enumerate(rows)]
    if histories is None:
        histories = [epoch for row in rows for epoch in curve(row, row["trial"])]
    pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)
    columns = list(calibration.HISTORY_COLUMNS)
    pd.DataFrame(histories, columns=columns).to_csv(folder / "histories.csv", index=False)
    return calibration.read(folder)


def rates(*accuracies, seed=0):
    values = RATES["learning_rate"]["values"]
    return [
        trial(accuracy, seed=seed, learning_rate=rate)
        for rate, accuracy in zip(values, accuracies, strict=True)
    ]


def waiting():
    return [trial(state="waiting", learning_rate=rate) for rate in RATES["learning_rate"]["values"]]


def test_points_are_means_over_seeds_best_first(tmp_path):
    rows = [*rates(0.20, 0.30, 0.10), *rates(0.22, 0.34, 0.14, seed=1)]
    results = write(tmp_path / "study", RATES, rows)
    table = calibration.points(results)
    assert list(table["learning_rate"]) == [3e-4, 1e-4, 1e-3]
    assert list(table["val_accuracy"]) == pytest.approx([0.32, 0.21, 0.12])
    assert list(table["lowest"]) == [0.30, 0.20, 0.10]
    assert list(table["highest"]) == [0.34, 0.22, 0.14]
    # Of two values the standard deviation is their difference over the square root of 2.
    assert list(table["deviation"]) == pytest.approx(np.array([0.04, 0.02, 0.04]) / 2**0.5)
    assert set(table["seeds"]) == {2}
    assert set(table["epoch_seconds"]) == {20}
    assert set(table["images_per_second"]) == {500}
    assert calibration.best_point(results) == {"learning_rate": 3e-4}
    assert results.finished


def test_only_complete_trials_make_points_and_each_seed_counts_once(tmp_path):
    rows = rates(0.20, 0.30, 0.10)
    rows += [
        trial(0.90, state="pruned", learning_rate=1e-3, seed=1),
        trial(0.30, learning_rate=3e-4),  # the same point and seed again
        trial(state="failed", learning_rate=1e-4, seed=1, error="cell 5: ValueError: no"),
    ]
    table = calibration.points(write(tmp_path / "study", RATES, rows))
    assert list(table["seeds"]) == [1, 1, 1]
    assert list(table["val_accuracy"]) == [0.30, 0.20, 0.10]


def test_of_equal_points_the_quicker_is_the_best(tmp_path):
    rows = [
        trial(0.3, batch_size=32),
        trial(0.3, batch_size=64, train_seconds=90.0),
        trial(0.2, batch_size=128, train_seconds=60.0),
    ]
    results = write(tmp_path / "study", {"batch_size": {"values": [32, 64, 128]}}, rows)
    assert calibration.best_point(results) == {"batch_size": 64}


def test_a_best_point_is_what_a_recipe_takes(tmp_path):
    parameters = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True, "points": None},
        "batch_size": {"values": [32.0, 64.0]},
        "optimizer": {"values": ["adam", "sgd"]},
        "early_stopping_patience": {"values": [None, 5]},
    }
    rows = [
        trial(0.3, learning_rate=0.001, batch_size=64.0, optimizer="sgd"),
        trial(0.2, learning_rate=0.002, batch_size=32.0, optimizer="adam")
        | {"early_stopping_patience": 5},
        # Its values are not chosen yet.
        trial(state="waiting"),
    ]
    best = calibration.best_point(write(tmp_path / "study", parameters, rows))
    assert best == {
        "learning_rate": 0.001,
        "batch_size": 64,
        "optimizer": "sgd",
        "early_stopping_patience": None,
    }
    assert [type(value) for value in best.values()] == [float, int, str, type(None)]


def test_a_running_study_has_no_best_point(tmp_path):
    results = write(tmp_path / "study", RATES, waiting(), dataset_title=STAND_IN)
    assert not results.finished
    assert calibration.points(results).empty
    with pytest.raises(calibration.CalibrationError, match=r"no complete trial \(3 waiting\)"):
        calibration.best_point(results)
    said = calibration.conclusion(results)
    assert "No trial is complete (3 waiting)" in said
    assert f"The pictures are a {STAND_IN}" in said


def test_a_study_without_tables_has_just_begun(tmp_path):
    write(tmp_path / "study", {"epochs": {"values": [40]}}, [])
    for name in ("trials.csv", "histories.csv"):
        (tmp_path / "study" / name).unlink()
    results = calibration.read(tmp_path / "study")
    assert not results.finished
    assert "nothing can be concluded" in calibration.conclusion(results)


def test_a_folder_without_a_study_is_refused(tmp_path):
    write(tmp_path / "batch_size", RATES, [])
    write(tmp_path / "learning_rate", RATES, [])
    with pytest.raises(calibration.CalibrationError, match=r"Studies in .*: batch_size, learning_"):
        calibration.read(tmp_path / "epochs")
    with pytest.raises(calibration.CalibrationError, match="epochs holds no study"):
        calibration.find(tmp_path, ["batch_size", "epochs"])
    with pytest.raises(calibration.CalibrationError, match=r"no study in .*Run one: python -m"):
        calibration.find(tmp_path / "batch_size")
    (tmp_path / "batch_size" / "study.json").write_text('{"name": "bat')
    with pytest.raises(calibration.CalibrationError, match="is damaged"):
        calibration.read(tmp_path / "batch_size")


def test_studies_come_in_the_order_in_which_they_began(tmp_path):
    for name, started in (("b", "2026-05-01T10:00:00+00:00"), ("a", "2026-05-01T11:00:00+00:00")):
        write(tmp_path / name, RATES, [trial(0.1, learning_rate=1e-4, started=started)])
    write(tmp_path / "0", RATES, [])
    assert [results.name for results in calibration.find(tmp_path)] == ["b", "a", "0"]
    assert [results.name for results in calibration.find(tmp_path, ["a"])] == ["a"]


def test_a_conclusion_compares_the_lead_with_the_spread_of_seeds(tmp_path):
    rows = [*rates(0.20, 0.30, 0.28), *rates(0.22, 0.32, 0.30, seed=1)]
    said = calibration.conclusion(write(tmp_path / "study", RATES, rows))
    assert "Use **learning rate 0.0003**: a mean validation accuracy of 31.00%" in said
    assert "(2 seeds, 30.00% to 32.00%), 500 images a second" in said
    assert "2.00 percentage points above the second, learning rate 0.001" in said
    # Each pair of seeds differs by 0.02: a deviation of 0.01414, with 3 degrees of freedom. Then
    # Student's t is 3.182, and the difference of two means of two has the same deviation.
    assert "standard deviation of 1.41 percentage points (pooled over 3 points" in said
    assert "up to 4.50 percentage points (95 %): the second may be as good." in said


def test_a_lead_beyond_the_spread_of_seeds_is_named_so(tmp_path):
    rows = [*rates(0.20, 0.30, 0.25), *rates(0.202, 0.302, 0.252, seed=1)]
    said = calibration.conclusion(write(tmp_path / "study", RATES, rows))
    assert "up to 0.45 percentage points (95 %): the lead is larger." in said
    assert "edge" not in said


def test_with_one_seed_a_conclusion_says_so_and_falls_back_on_the_images(tmp_path):
    said = calibration.conclusion(write(tmp_path / "study", RATES, rates(0.48, 0.50, 0.49)))
    assert "validation accuracy of 50.00% (1 seed)" in said
    assert "only one seed a point" in said
    # sqrt(0.5 * 0.5 / 1000) = 0.0158; 1.96 times the root of twice its square: 0.0438.
    assert "1,000 validation images alone gives an accuracy a standard error of 1.58" in said
    assert "up to 4.38 percentage points (95 %): the second may be as good." in said
    assert "2 of the other 2 points may be as good" in said


def test_images_of_validation_follow_the_protocol(tmp_path):
    some = write(tmp_path / "some", RATES, [], found={"other": {"validation_size": 2_000}})
    assert some.validation_images == 1_000
    found = write(
        tmp_path / "found", RATES, [], choices={}, found={"other": {"validation_size": 2_000}}
    )
    assert found.validation_images == 2_000
    assert write(tmp_path / "usual", RATES, [], choices={}).validation_images == 5_000
    deck = write(tmp_path / "deck", RATES, rates(0.2, 0.3, 0.1), choices={"protocol": "deck"})
    assert deck.validation_images == 10_000
    assert "test images served as validation" in calibration.conclusion(deck)


@pytest.mark.parametrize(
    ("search", "tried", "way"),
    [
        ({"values": [1e-4, 3e-4, 1e-3]}, (1e-3, 3e-4), "upwards"),
        ({"values": [1e-3, 1e-4, 3e-4]}, (1e-4, 3e-4), "downwards"),
        ({"values": [1e-4, 3e-4, 1e-3]}, (3e-4, 1e-4), None),
        # 4 % and 6 % of the way down from the end, on the scale of the search.
        ({"low": 1e-4, "high": 1e-2, "log": True}, (10**-2.08, 1e-3), "upwards"),
        ({"low": 1e-4, "high": 1e-2, "log": True}, (10**-2.12, 1e-3), None),
        ({"low": 0.0, "high": 1.0, "log": False}, (0.04, 0.5), "downwards"),
        ({"low": 0.0, "high": 1.0, "log": False}, (0.06, 0.5), None),
    ],
)
def test_an_optimum_on_the_edge_asks_for_a_wider_range(tmp_path, search, tried, way):
    best, other = tried
    rows = [trial(0.3, learning_rate=best), trial(0.2, learning_rate=other)]
    said = calibration.conclusion(write(tmp_path / "study", {"learning_rate": search}, rows))
    assert re.findall(r"edge of what was tried .*widened (\w+)", said) == ([way] if way else [])


@pytest.mark.parametrize("values", [["adam", "sgd"], [True, False]])
def test_what_is_no_number_has_no_edge(tmp_path, values):
    rows = [trial(0.3, choice=values[0]), trial(0.2, choice=values[1])]
    study = write(tmp_path / "study", {"choice": {"values": values}}, rows)
    said = calibration.conclusion(study)
    assert f"Use **choice {values[0]}**" in said
    assert "edge" not in said


def test_pruned_and_failed_trials_are_counted_and_the_time_saved(tmp_path):
    rows = rates(0.20, 0.30, 0.10)
    rows += [
        trial(0.15, state="pruned", learning_rate=3e-4, seed=1),
        trial(0.15, state="pruned", learning_rate=1e-3, seed=1, epochs_run=3, train_seconds=90.0),
        trial(state="pruned", learning_rate=1e-3, seed=2, epochs_run=0),
        trial(state="failed", learning_rate=1e-4, seed=1, error="cell 5: ValueError: no"),
        trial(state="running", learning_rate=1e-4, seed=2),
    ]
    results = write(tmp_path / "study", RATES, rows)
    # 4 epochs of 20 seconds and 3 of 30; what never ran an epoch has no speed.
    assert calibration.saved_seconds(results) == 170
    said = calibration.conclusion(results)
    assert "3 trials of 8 were pruned, which saved about 2.8 minutes" in said
    assert "1 trial of 8 failed and is not counted" in said
    assert "1 trial of this best point was pruned" in said
    assert "not finished (1 trial running or waiting)" in said


def test_a_best_point_with_fewer_seeds_is_to_be_repeated(tmp_path):
    rows = [*rates(0.20, 0.30, 0.28), trial(0.29, seed=1, learning_rate=1e-3)]
    said = calibration.conclusion(write(tmp_path / "study", RATES, rows))
    assert "It has 1 seed where others have up to 2: repeat it" in said


def test_what_the_budget_cannot_tell_is_said_only_where_true(tmp_path):
    small = calibration.conclusion(write(tmp_path / "small", RATES, rates(0.2, 0.3, 0.1)))
    assert "learn from 10,000 images" in small
    assert "at most 6 epochs" in small
    assert "139" in small
    whole = [row | {"train_images": 45_000, "epochs": 139} for row in rates(0.2, 0.3, 0.1)]
    said = calibration.conclusion(write(tmp_path / "whole", RATES, whole))
    for word in ("need not be best", "pruned", "failed", "not finished", "pictures", "served"):
        assert word not in said


def long_run(folder, *curves, parameters=None):
    """A study of runs with these validation accuracies, one of each seed."""
    rows = [
        trial(values[-1], seed=seed, epochs=len(values)) | {"epochs": len(values)}
        for seed, values in enumerate(curves)
    ]
    histories = [
        {"trial": seed, "epoch": epoch, "accuracy": value + 0.1, "val_accuracy": value}
        for seed, values in enumerate(curves)
        for epoch, value in enumerate(values, start=1)
    ]
    parameters = {"epochs": {"values": [len(curves[0])]}} if parameters is None else parameters
    return write(folder, parameters, rows, histories)


def test_the_best_epoch_is_of_the_mean_over_seeds(tmp_path):
    # Means 0.30, 0.49, 0.50, 0.45: the standard error of 0.50 on 1,000 images is 0.0158.
    results = long_run(tmp_path / "study", [0.28, 0.51, 0.48, 0.45], [0.32, 0.47, 0.52, 0.45])
    found = calibration.best_epoch(results)
    assert (found.best, found.enough, found.epochs) == (3, 2, 4)
    assert (found.accuracy, found.enough_accuracy) == pytest.approx((0.50, 0.49))
    assert found.standard_error == pytest.approx(0.0158, abs=1e-4)
    said = calibration.conclusion(results)
    assert "highest after epoch **3** of 4 (50.00%); epoch **2** (49.00%) is the first" in said
    assert "last epoch" not in said
    assert "One point alone is complete, epochs 4" in said


def test_a_best_last_epoch_asks_for_longer_training(tmp_path):
    results = long_run(tmp_path / "study", [0.1, 0.2, 0.4], parameters={})
    assert calibration.best_epoch(results).best == 3
    said = calibration.conclusion(results)
    assert "longer training may be better still" in said
    assert "One point alone is complete, the recipe as it is" in said


def test_the_best_epoch_looks_at_the_longest_trials_as_far_as_all_went(tmp_path):
    parameters = {"epochs": {"values": [2, 4]}}
    results = long_run(
        tmp_path / "study", [0.9, 0.8], [0.1, 0.2, 0.3, 0.2], [0.1, 0.2, 0.2], parameters=parameters
    )
    # Early stopping ended the third after 3 of its 4 epochs.
    results.trials.loc[2, "epochs"] = 4
    found = calibration.best_epoch(results)
    assert (found.best, found.epochs) == (3, 3)
    assert found.accuracy == pytest.approx(0.25)


def test_the_best_epoch_is_of_no_study_of_other_parameters(tmp_path):
    results = write(tmp_path / "study", RATES, rates(0.2, 0.3, 0.1))
    with pytest.raises(calibration.CalibrationError, match="varies learning rate"):
        calibration.best_epoch(results)


def joint(folder, trials=12):
    """A search in which the learning rate decides alone."""
    parameters = {
        "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True, "points": None},
        "batch_size": {"values": [32, 64]},
        "optimizer": {"values": ["adam", "rmsprop"]},
    }
    rows = [
        trial(0.2 + 0.01 * n, learning_rate=10 ** (-4 + 2 * n / trials))
        | {"batch_size": 32 * (1 + n % 2), "optimizer": ["adam", "rmsprop"][n // 2 % 2]}
        for n in range(trials)
    ]
    rows += [
        trial(0.1, state="pruned", learning_rate=2e-3, batch_size=32, optimizer="adam"),
        trial(state="failed", learning_rate=5e-3, batch_size=64, optimizer="adam")
        | {"error": "cell 7 (In [4]): TrainingError: the loss is nan <b>"},
    ]
    return write(folder, parameters, rows, search="tpe", pruner="median")


def test_importances_find_the_parameter_that_decides(tmp_path, capfd):
    shares = calibration.importances(joint(tmp_path / "study"))
    assert shares.index[0] == "learning_rate"
    assert shares.iloc[0] > 0.7
    assert set(shares.index) == {"learning_rate", "batch_size", "optimizer"}
    assert shares.sum() == pytest.approx(1)
    # Optuna would print when it made a study.
    assert capfd.readouterr() == ("", "")


def test_importances_need_trials_that_differ(tmp_path):
    with pytest.raises(calibration.CalibrationError, match=r"5 complete trials of few.*8 or more"):
        calibration.importances(joint(tmp_path / "few", 5))
    level = joint(tmp_path / "level")
    level.trials["val_accuracy"] = 0.3
    with pytest.raises(calibration.CalibrationError, match="trials of level"):
        calibration.importances(level)


def test_reading_a_study_needs_no_optuna_dask_or_backend():
    program = (
        "import sys, cifar_lib.calibration;"
        "sys.exit(any(n in sys.modules for n in ('optuna', 'dask', 'tensorflow', 'keras')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def said_by(executed):
    """All that a notebook shows as text, and how many pictures."""
    outputs = [
        output.get("data", {})
        for cell in nbformat.read(executed, as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    texts = [data.get(kind, "") for data in outputs for kind in ("text/markdown", "text/html")]
    return "\n".join(texts), sum("image/png" in data for data in outputs)


def run_notebook(tmp_path, **parameters):
    executed = tmp_path / "executed" / "07_calibration.ipynb"
    places = {"studies_dir": str(tmp_path / "studies"), "output_dir": str(tmp_path / "pictures")}
    reports.execute(ROOT / "notebooks" / "07_calibration.ipynb", executed, places | parameters)
    return said_by(executed)


def test_the_notebook_shows_all_four_kinds_of_study(tmp_path):
    studies = tmp_path / "studies"
    write(studies / "rates", RATES, [*rates(0.2, 0.3, 0.1), *rates(0.2, 0.32, 0.1, seed=1)])
    sizes = [trial(accuracy, batch_size=size) for size, accuracy in ((32, 0.3), (64, 0.2))]
    sizes[0]["notebook"] = "trials/0000/notebook.ipynb"
    sizes[1]["notebook"] = "trials/0001/notebook.ipynb"
    write(studies / "sizes", {"batch_size": {"values": [32, 64]}}, sizes)
    there = studies / "sizes" / "trials" / "0000" / "notebook.ipynb"
    there.parent.mkdir(parents=True)
    there.write_text("{}")
    long_run(studies / "long", [0.1, 0.3, 0.2], [0.1, 0.28, 0.2])
    joint(studies / "joint")
    said, pictures = run_notebook(tmp_path, links_from=str(tmp_path / "executed"))
    names = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    assert names == {
        *("rates-curve", "sizes-curve", "long-epochs"),
        *("joint-search", "joint-parallel", "joint-importances"),
        *(f"{name}-learning-curves" for name in ("rates", "sizes", "long", "joint")),
    }
    assert pictures == len(names)
    for name in ("rates", "sizes", "long", "joint"):
        results = calibration.read(studies / name)
        assert calibration.conclusion(results) in said
    assert re.findall('href="([^"]+)"', said) == ["../studies/sizes/trials/0000/notebook.ipynb"]
    assert (tmp_path / "executed" / "../studies/sizes/trials/0000/notebook.ipynb").exists()
    assert "the loss is nan &lt;b&gt;" in said
    assert "No study shown here varies another parameter alone." in said


def test_the_notebook_shows_a_study_that_has_just_begun(tmp_path):
    write(tmp_path / "studies" / "new", RATES, waiting(), dataset_title=STAND_IN)
    said, pictures = run_notebook(tmp_path)
    assert pictures == 0
    for sentence in (
        "The study **new** has no complete trial yet.",
        "No trial of the study **new** has run an epoch yet.",
        "No table of a range test was given.",
        "No study shown here varies the batch size alone.",
        "No trial failed.",
        f"The pictures are a {STAND_IN}",
    ):
        assert sentence in said
    assert not Path(tmp_path / "pictures" / "new-curve.png").exists()
