"""Notebooks one after the other: the report on some runs, the demo, the reference results."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median

import pandas as pd

from cifar_lib import ROOT, calibration, data, recipes, reports, runs, studies, weights
from cifar_lib.reports import percent

NOTEBOOKS = ROOT / "notebooks"
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"
DECK = {"run": "the deck, 2018", "epochs": 139, "accuracy": 0.6187, "loss": 1.5597}

#: The runs whose results the repository holds, one a seed, by the name that its pages give them;
#: the pages show the first of each.
REFERENCE = {
    "seed-provisional, 14 of 139 epochs": [recipes.get("seed-provisional", epochs=14)],
    "seed-onecycle": [recipes.get("seed-onecycle")],
    "fast": [recipes.get("fast", seed=seed) for seed in range(3)],
    "fast in float32, without AVX-512": [recipes.get("fast", precision="float32")],
    "accurate": [recipes.get("accurate", seed=seed) for seed in range(3)],
}

#: The networks that `weights/` publishes, by name: the recipe of each one's run.
WEIGHTS = {"accurate": REFERENCE["accurate"][0]}

#: The studies whose results the repository holds, in the order in which they follow each other.
STUDIES = ("learning_rate", "batch_size", "epochs", "maximum_accuracy")

#: The study of what each technique is worth.
ABLATIONS = "ablations"

#: The recipe whose range of learning rates is tested beside them.
RANGE_TEST = recipes.get("seed", train_size=10_000, validation_size=1_000)

RUN_FILES = ("recipe.json", "history.csv", "metrics.json", "environment.json")
# Of the files that a notebook reads or writes, those that a reader can open.
NUMBERS = (".csv", ".json")
STUDY_FILES = ("study.json", "trials.csv", "histories.csv", "journal.log")


def train(recipe: recipes.Recipe, runs_dir: Path, output_dir: Path) -> runs.Run:
    """Train by the notebook `04_train`, which stays in the run folder, executed.

    Raises:
        NotebookError: the notebook failed.
    """
    run = runs.Run(runs_dir / recipe.run_name)
    executed = run.path / "notebook.ipynb"
    if not (run.finished and executed.exists() and reports.complete(executed)):
        parameters = {
            "recipe": recipe.name,
            "runs_dir": str(runs_dir),
            "output_dir": str(output_dir),
        }
        reports.execute(
            NOTEBOOKS / "04_train.ipynb", executed, parameters | recipe.changes, echo=True
        )
    return run


def report(
    shown: Sequence[runs.Run],
    out: Path,
    *,
    title: str = "CIFAR-100 report",
    introduction: str = "",
    training: Sequence[Path] = (),
    published: bool = False,
    executed_dir: Path,
    output_dir: Path,
    tables_dir: Path,
    studies_dir: Path | None = None,
    range_test: Path | None = None,
    compared: Sequence[runs.Run] = (),
    tried: Path | None = None,
    ablations: Path | None = None,
    operations: Path | None = None,
    readme: bool = False,
    fresh: bool = False,
) -> Path:
    """Run the notebooks on finished runs, and on studies, and make pages of them.

    A notebook that would give what it gave the last time is not run again.

    Args:
        shown: the runs, all of one data set.
        out: the folder of the pages.
        title: of the report.
        introduction: Markdown for the top of the index.
        training: the executed notebook of each run's training, by default that in its folder.
        published: show the predictions of the best published network, not of the last run.
        executed_dir: where the executed notebooks go.
        output_dir: where pictures go.
        tables_dir: where the numbers behind the pictures go.
        studies_dir: the folder of the studies' folders; those on the same data set are shown, but
            for the ablations, which stand with the comparison.
        range_test: the table of a range test, shown with them.
        compared: the runs that are compared, where they are more than those shown.
        tried: a table of what else was tried, shown with the comparison.
        ablations: the folder of the study of variants that is shown with it.
        operations: what `benchmarks/operations.py` wrote, shown with it, if it is there.
        readme: also write the index as `README.md`.
        fresh: run every notebook again.

    Returns:
        the path of the report's index.

    Raises:
        RunError: the runs are of several data sets, or one was not tested.
        NotebookError: a notebook failed; it stands in the report with its error.
    """
    names = {run.recipe.dataset for run in shown}
    if len(names) != 1:
        raise runs.RunError(
            f"The runs are of several data sets ({', '.join(sorted(names))}): name runs of one."
        )
    for run in shown:
        run.require_test()
    dataset = data.load(names.pop())
    compared = compared or shown
    operations = operations if operations and operations.exists() else None
    studied = [] if studies_dir is None else _studies_on(dataset.title, studies_dir)
    studied = [name for name in studied if ablations != studies_dir / name]
    places = {"output_dir": str(output_dir)}
    of_data = places | {"dataset": dataset.name}
    of_runs = places | {"runs_dir": str(shown[-1].path.parent), "tables_dir": str(tables_dir)}
    plan = {
        "01_dataset": of_data,
        "02_augmentation": of_data,
        "03_network": of_data | {"model": shown[-1].recipe.model},
        "05_results": of_runs | {"runs": [run.name for run in shown]},
        "06_predictions": of_runs | {"run": "" if published else shown[-1].name},
        "07_calibration": places
        | {
            "studies": studied,
            "studies_dir": str(studies_dir),
            "range_test": str(range_test or ""),
            "links_from": str(out),
        },
        "08_beyond": places
        | {
            "runs_dir": str(compared[0].path.parent),
            "runs": [run.name for run in compared],
            "tried": str(tried or ""),
            "ablations": str(ablations or ""),
            "operations": str(operations or ""),
        },
    }
    if not studied:
        del plan["07_calibration"]
    inputs = {
        "05_results": _files([run.path for run in shown], (*RUN_FILES, "predictions.npz")),
        "06_predictions": _files([weights.FOLDER], ("index.json", "*.npz"))
        if published
        else _files([shown[-1].path], (*RUN_FILES, "predictions.npz")),
        # Its table of trials links to those that left their notebook.
        "07_calibration": _files(
            [studies_dir / name for name in studied], (*STUDY_FILES, "trials/*/notebook.ipynb")
        )
        | ({"range_test.csv": range_test} if range_test else {}),
        "08_beyond": _files([run.path for run in compared], RUN_FILES)
        | _files([ablations] if ablations else [], STUDY_FILES)
        | {path.name: path for path in (tried, operations) if path},
    }
    executed, numbers, failures = [], {}, []
    for name, parameters in plan.items():
        path = executed_dir / f"{name}.ipynb"
        print(f"{name} ...", end=" ", flush=True)
        began = time.monotonic()
        read = inputs.get(name, {})
        try:
            ran = reports.execute_if_changed(
                NOTEBOOKS / path.name,
                path,
                parameters,
                inputs=read.values(),
                digests=dataset.digests,
                written_to=(output_dir, tables_dir),
                fresh=fresh,
            )
            print(f"executed in {time.monotonic() - began:.0f} s" if ran else "unchanged")
        except reports.NotebookError as error:
            print("failed")
            failures.append(str(error))
        executed.append(path)
        files = read | {
            file.relative_to(tables_dir).as_posix(): file
            for file in reports.written(path)
            if file.is_relative_to(tables_dir)
        }
        numbers[path] = {name: file for name, file in files.items() if file.suffix in NUMBERS}
    training = training or [run.path / "notebook.ipynb" for run in shown]
    trained = {path: run for path, run in zip(training, shown, strict=True) if path.exists()}
    labels = dict(zip(training, runs.labels(shown), strict=True))
    failures += [f"{path}: {why}" for path in trained if (why := reports.failure(path))]
    executed[3:3] = trained
    for path, run in trained.items():
        numbers[path] = {name: run.path / name for name in RUN_FILES if (run.path / name).exists()}
    index = reports.render(
        executed,
        out,
        title=title,
        dataset_title=dataset.title,
        introduction=introduction,
        headline=headline(shown),
        runs=all_runs(compared),
        numbers=numbers,
        labels=labels,
        environment=shown[-1].environment,
        readme=readme,
    )
    if failures:
        raise reports.NotebookError("\n".join([*failures, f"The report is {index}"]))
    return index


def _files(folders: Iterable[Path], patterns: Iterable[str]) -> dict[str, Path]:
    """The files of run folders and studies, each by its name and its folder's."""
    patterns = list(patterns)
    return {
        path.relative_to(folder.parent).as_posix(): path
        for folder in folders
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
    }


def _studies_on(dataset_title: str, studies_dir: Path) -> list[str]:
    """The names of the studies that have begun on a data set, in the order in which they did."""
    if not any(studies_dir.glob("*/trials.csv")):
        return []
    return [
        results.name
        for results in calibration.find(studies_dir)
        if results.dataset_title == dataset_title
    ]


def range_test(recipe: recipes.Recipe, runs_dir: Path, **choices: float) -> tuple[Path, float]:
    """Do a range test, and write its table and its picture to `<runs_dir>/range_tests/`.

    Args:
        recipe: every choice but the learning rate.
        runs_dir: the folder of the run folders.
        choices: `lowest`, `highest` and `steps`, as in `training.range_test`.

    Returns:
        the path of the table, beside which the picture lies, and the suggested learning rate.

    Raises:
        TrainingError: the loss never fell, so none is suggested; table and picture are there.
        DataError: the data set is not there or is not what it should be.
    """
    from cifar_lib import figures, training

    dataset = data.load(recipe.dataset)
    table = training.range_test(recipe, dataset=dataset, **choices)
    path = runs_dir / "range_tests" / f"{recipe.run_name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(path, table.to_csv(index=False).encode())
    suggestion = None
    try:
        suggestion = training.suggested_rate(table)
    finally:
        # Where there is no suggestion, the picture says why.
        title = f"{recipe.name}: learning-rate range test, {dataset.title}"
        figures.range_test(table, suggestion, title).savefig(path.with_suffix(".png"))
    return path, suggestion


def headline(shown: Sequence[runs.Run]) -> pd.DataFrame:
    """One row a run, and the deck's: the numbers that an index shows first."""
    rows = [DECK]
    for label, run in zip(runs.labels(shown), shown, strict=True):
        test = run.metrics["test"]
        rows.append(
            {
                "run": label,
                "protocol": run.recipe.protocol,
                "epochs": run.metrics["epochs_run"],
                "accuracy": test["accuracy"],
                "95 % interval": f"{test['accuracy_low']:.4f} to {test['accuracy_high']:.4f}",
                "loss": test["loss"],
                "top-5": f"{test['top5_accuracy']:.4f}",
            }
        )
    columns = ["run", "protocol", "epochs", "accuracy", "95 % interval", "loss", "top-5"]
    return pd.DataFrame(rows)[columns].fillna("")


def all_runs(compared: Sequence[runs.Run]) -> pd.DataFrame:
    """One row a run: what it was and what it reached on the test images, shares in 0..1."""
    return pd.DataFrame(
        {
            "run": run.name,
            "recipe": run.recipe.name,
            "protocol": run.recipe.protocol,
            "seed": run.recipe.seed,
            "epochs": run.metrics["epochs_run"],
            "accuracy": test["accuracy"],
            "95 % interval": f"{test['accuracy_low']:.4f} to {test['accuracy_high']:.4f}",
            "mirrored accuracy": run.metrics.get("test_flip", {}).get("accuracy"),
            "top-5": test["top5_accuracy"],
            "loss": test["loss"],
            "training minutes": f"{run.metrics['train_seconds'] / 60:.1f}",
            "precision": run.environment["precision"],
        }
        for run in compared
        for test in [run.metrics["test"]]
    )


def demo(runs_dir: Path) -> Path:
    """Do all of it small, and return the path of the report's index.

    Takes CIFAR-100 if it is on the machine or can be downloaded, else the stand-in, and says so.
    """
    try:
        dataset = data.load().name
    except data.DataError as error:
        if os.environ.get("CIFAR100_DIR") or data.find():
            raise  # what is there is not right, and nothing else is taken in its place
        print(f"{error}\nThe demo goes on with the {data.SYNTHETIC_TITLE}.", flush=True)
        dataset = "synthetic"
    output_dir = runs_dir / "figures"
    run = train(recipes.get("quick", dataset=dataset), runs_dir, output_dir)
    introduction = "A few minutes' training, to show how everything works."
    return report(
        [run],
        runs_dir / "report",
        title="CIFAR-100 demo",
        introduction=introduction,
        executed_dir=runs_dir / "executed",
        output_dir=output_dir,
        tables_dir=runs_dir / "tables",
    )


def reference(runs_dir: Path) -> Path:
    """Make `results/` and `weights/`, and of them all that `pages` makes.

    Returns the path of the report's index.

    Finished runs and trials in `runs_dir` are not trained again. Needs the real CIFAR-100.
    """
    from cifar_lib import sweeps

    trained = {
        name: [train(recipe, runs_dir, FIGURES) for recipe in of_seeds]
        for name, of_seeds in REFERENCE.items()
    }
    for run in itertools.chain(*trained.values()):
        _copy(RUN_FILES, run.path, RESULTS / run.name)
    # The pages look at the images of the last one.
    detailed = list(trained.values())[-1][0]
    _copy(["predictions.npz"], detailed.path, RESULTS / detailed.name)
    for name, recipe in WEIGHTS.items():
        weights.export(train(recipe, runs_dir, FIGURES), name)
    for name in (*STUDIES, ABLATIONS):
        study = studies.load(ROOT / "studies" / f"{name}.yaml")
        done = sweeps.run(study, runs_dir / "studies")
        _copy(STUDY_FILES, done, RESULTS / "studies" / name)
    table = runs_dir / "range_tests" / f"{RANGE_TEST.run_name}.csv"
    if not table.exists():
        # The network is slow to start: the usual 300 steps are over before its loss falls.
        range_test(RANGE_TEST, runs_dir, lowest=1e-5, highest=1e-2, steps=1000)
    shutil.copyfile(table, RESULTS / "range_test.csv")
    return pages(runs_dir)


def pages(runs_dir: Path) -> Path:
    """Make `figures/`, `reports/` and the README's tables of `results/` and `weights/`.

    Returns the path of the report's index. Nothing is trained: the pages of runs that are not in
    `runs_dir` are those that `reports/` has. Needs the real CIFAR-100.
    """
    readme = ROOT / "README.md"
    tables = readme_tables(RESULTS)
    runs.write_atomically(readme, with_tables(readme.read_text("utf-8"), tables).encode())
    shown = {name: runs.load(RESULTS / first.run_name) for name, (first, *_) in REFERENCE.items()}
    introduction = "\n".join(f"- `{run.name}`: {name}" for name, run in shown.items())
    out = ROOT / "reports"
    trained = [
        [runs_dir / run.name / "notebook.ipynb", out / "notebooks" / f"{run.name}.ipynb"]
        for run in shown.values()
    ]
    return report(
        list(shown.values()),
        out,
        title="CIFAR-100 reference report",
        introduction=introduction,
        training=[next(filter(Path.exists, places), places[0]) for places in trained],
        published=True,
        executed_dir=runs_dir / "executed",
        output_dir=FIGURES,
        tables_dir=RESULTS,
        studies_dir=RESULTS / "studies",
        range_test=RESULTS / "range_test.csv",
        compared=[
            runs.load(RESULTS / recipe.run_name) for recipe in itertools.chain(*REFERENCE.values())
        ],
        tried=RESULTS / "tried.csv",
        ablations=RESULTS / "studies" / ABLATIONS,
        operations=RESULTS / "benchmarks" / "operations.json",
        readme=True,
    )


def _copy(names: Sequence[str], source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def readme_tables(results: Path) -> dict[str, str]:
    """The README's tables in Markdown, by name, made from the files in `results`."""
    rows = [
        {
            "network": DECK["run"],
            "protocol": "",
            "epochs": DECK["epochs"],
            "accuracy": percent(DECK["accuracy"]),
            "loss": f"{DECK['loss']:.4f}",
        }
    ]
    rows += [_results_row(name, of_seeds, results) for name, of_seeds in REFERENCE.items()]
    tables = {"results": pd.DataFrame(rows).fillna("")}

    tables["calibration"] = pd.DataFrame(
        _calibration_row(calibration.read(results / "studies" / name)) for name in STUDIES
    )
    tables["ablations"] = _ablations(calibration.read(results / "studies" / ABLATIONS))
    tables["sweep cost"] = _sweep_costs(results / "benchmarks" / "sweeps.json")
    speed = json.loads((results / "benchmarks" / "throughput.json").read_text("utf-8"))
    tables["training speed"] = pd.DataFrame(
        {
            "what": {"recipe": "the seed's recipe", "bare": "bare `model.fit`"}[row["what"]],
            "precision": row["precision"],
            "batch size": row["batch_size"],
            "images/s": round(row["images_per_second"]),
            "lowest": round(row["lowest"]),
            "highest": round(row["highest"]),
        }
        for row in speed["throughput"]
    )
    beside_pytorch = results / "benchmarks" / "pytorch.json"
    if beside_pytorch.exists():  # PyTorch is no dependency: it may never have been measured
        tables["speed"] = _beside_pytorch(beside_pytorch)
    augmentation = json.loads((results / "benchmarks" / "augmentation.json").read_text("utf-8"))
    tables["augmentation speed"] = pd.DataFrame(augmentation["throughput"]).rename(
        columns={"images_per_second": "images/s"}
    )
    loading = json.loads((results / "benchmarks" / "data_loading.json").read_text("utf-8"))
    tables["loading speed"] = pd.DataFrame(
        {
            "what": name,
            "seconds": f"{row['load']:.3f}",
            "with a sum over every pixel": f"{row['load_and_sum']:.3f}",
            "lowest with the sum": f"{row['lowest']:.3f}",
            "highest with the sum": f"{row['highest']:.3f}",
        }
        for name, row in loading["seconds"].items()
    )
    return {name: reports.markdown_table(table) for name, table in tables.items()}


def _results_row(name: str, of_seeds: Sequence[recipes.Recipe], results: Path) -> dict[str, object]:
    """What the runs of a recipe reached, in a row of the README."""
    metrics, environments = (
        [json.loads((results / recipe.run_name / file).read_text("utf-8")) for recipe in of_seeds]
        for file in ("metrics.json", "environment.json")
    )
    accuracies = [run["test"]["accuracy"] for run in metrics]
    minutes = [run["train_seconds"] / 60 for run in metrics]
    duration = f"{mean(minutes):.1f} minutes"
    if len(of_seeds) > 1:
        spread = f"{percent(min(accuracies))} to {percent(max(accuracies))}, {len(of_seeds)} seeds"
        duration += f" ({min(minutes):.1f} to {max(minutes):.1f})"
    else:
        test = metrics[0]["test"]
        spread = f"{percent(test['accuracy_low'])} to {percent(test['accuracy_high'])}"
    row = {
        "network": name,
        "protocol": of_seeds[0].protocol,
        "epochs": metrics[0]["epochs_run"],
        "accuracy": f"{percent(mean(accuracies))} ({spread})",
        "loss": f"{mean(run['test']['loss'] for run in metrics):.4f}",
        "top-5": percent(mean(run["test"]["top5_accuracy"] for run in metrics)),
        "training": f"{duration} on {environments[0]['threads']} cores in "
        f"{environments[0]['precision']}",
    }
    if "test_flip" in metrics[0]:
        row["with mirror images"] = percent(mean(run["test_flip"]["accuracy"] for run in metrics))
    return row


def _calibration_row(found: calibration.Results) -> dict[str, object]:
    """What a study found, in a row of the README."""
    first, *others = calibration.points(found).to_dict("records")
    images, epochs = found.trials["train_images"].max(), found.trials["epochs"].max()
    row = {
        "study": found.name,
        "trials": ", ".join(f"{count} {state}" for state, count in found.counts.items()),
        "images, epochs": f"{images:,.0f}, {epochs:.0f}",
        "best": calibration.describe(calibration.best_point(found)),
        "validation accuracy": percent(first["val_accuracy"]),
        "seeds": int(first["seeds"]),
    }
    if set(found.varied) <= {"epochs"}:
        best = calibration.best_epoch(found)
        row["best"] = f"epoch {best.best}; epoch {best.enough} is within a standard error"
        row["validation accuracy"] = percent(best.accuracy)
    if others:
        second = {name: others[0][name] for name in found.parameters}
        row["second"] = f"{calibration.describe(second)}: {percent(others[0]['val_accuracy'])}"
    return row


def _ablations(found: calibration.Results) -> pd.DataFrame:
    """What a training loses without a technique, the first variant of a study having all."""
    points = calibration.points(found).set_index("variant")
    first, *others = found.study["variants"]
    loss = points["val_accuracy"] - points.at[first, "val_accuracy"]
    others = [name for name in others if name in points.index]  # the others have no complete trial
    return pd.DataFrame(
        {
            "training": name,
            "validation accuracy": percent(points.at[name, "val_accuracy"]),
            "lowest": percent(points.at[name, "lowest"]),
            "highest": percent(points.at[name, "highest"]),
            "seeds": int(points.at[name, "seeds"]),
            "points": "" if name == first else f"{100 * loss[name]:+.1f}",
        }
        for name in (first, *sorted(others, key=loss.get))
    )


def _sweep_costs(path: Path) -> pd.DataFrame:
    cost = json.loads(path.read_text("utf-8"))
    notebook, empty, waiting = cost["notebook"], cost["empty"], cost["waiting"]
    return pd.DataFrame(
        {
            "a trial of the notebook, papermill alone": f"{median(notebook['papermill']):.2f} s",
            "the same in a sweep": f"{median(notebook['sweep']):.2f} s",
            f"each of {empty['trials']:,} trials that do nothing": (
                f"{empty['milliseconds_a_trial']:.1f} ms"
            ),
            f"share of {waiting['threads']} threads' time spent in trials of "
            f"{waiting['seconds_a_trial']:.0f} s": percent(waiting["efficiency"]),
        }.items(),
        columns=["what", "cost"],
    )


def _beside_pytorch(path: Path) -> pd.DataFrame:
    measured = json.loads(path.read_text("utf-8"))["throughput"]
    rates = pd.DataFrame(measured).pivot_table(
        "images_per_second", ["network", "precision", "pixels"], "side", sort=False
    )
    ratios = rates["tensorflow"] / rates["PyTorch"]
    table = rates[["tensorflow", "PyTorch"]].round().astype(int)
    table.columns = ["images/s, Keras on TensorFlow", "images/s, PyTorch"]
    return table.assign(ratio=ratios.map("{:.2f}".format)).reset_index()


def with_tables(text: str, tables: dict[str, str]) -> str:
    """Put each table between its markers, `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: a table's markers are not in the text.
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"The text has no {begin} ... {end} for the table {name!r}.")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text
