"""Notebooks one after the other: the report on some runs, the demo, the reference results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cifar_lib import ROOT, data, recipes, reports, runs

NOTEBOOKS = ROOT / "notebooks"
DECK = {"run": "the deck, 2018", "epochs": 139, "accuracy": 0.6187, "loss": 1.5597}

#: The runs whose results the repository holds, by the name that its pages give them.
REFERENCE = {"seed recipe (provisional), 14 of 139 epochs": recipes.get("seed", epochs=14)}

RUN_FILES = ("recipe.json", "history.csv", "metrics.json", "environment.json")


def train(recipe: recipes.Recipe, runs_dir: Path, output_dir: Path) -> runs.Run:
    """Train by the notebook `04_train`, which stays in the run folder, executed.

    Raises:
        NotebookError: the notebook failed.
    """
    run = runs.Run(runs_dir / recipe.run_name)
    executed = run.path / "notebook.ipynb"
    if not (run.finished and executed.exists()):
        usual = json.loads(recipes.get(recipe.name).to_json())
        choices = {
            field: value
            for field, value in json.loads(recipe.to_json()).items()
            if value != usual[field]
        }
        parameters = {
            "recipe": recipe.name,
            "runs_dir": str(runs_dir),
            "output_dir": str(output_dir),
        }
        reports.execute(NOTEBOOKS / "04_train.ipynb", executed, parameters | choices, echo=True)
    return run


def report(
    shown: Sequence[runs.Run],
    out: Path,
    *,
    title: str = "CIFAR-100 report",
    introduction: str = "",
    executed_dir: Path,
    output_dir: Path,
    tables_dir: Path,
    readme: bool = False,
) -> Path:
    """Run the notebooks on finished runs and make pages of them.

    Args:
        shown: the runs, all of one data set.
        out: the folder of the pages.
        title: of the report.
        introduction: Markdown for the top of the index.
        executed_dir: where the executed notebooks go.
        output_dir: where pictures go.
        tables_dir: where the numbers behind the pictures go.
        readme: also write the index as `README.md`.

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
        if run.recipe.test_size == 0:
            raise runs.RunError(
                f"{run.name} was not tested: its test_size is 0, and a report is about the test "
                "images. Leave it out, or train its recipe with another test_size."
            )
    dataset = data.load(names.pop())
    places = {"output_dir": str(output_dir)}
    of_data = places | {"dataset": dataset.name}
    of_runs = places | {"runs_dir": str(shown[-1].path.parent), "tables_dir": str(tables_dir)}
    plan = {
        "01_dataset": of_data,
        "02_augmentation": of_data,
        "03_network": of_data | {"model": shown[-1].recipe.model},
        "05_results": of_runs | {"runs": [run.name for run in shown]},
        "06_predictions": of_runs | {"run": shown[-1].name},
    }
    executed, failures = [], []
    for name, parameters in plan.items():
        path = executed_dir / f"{name}.ipynb"
        print(f"{name} ...", flush=True)
        try:
            reports.execute(NOTEBOOKS / path.name, path, parameters)
        except reports.NotebookError as error:
            failures.append(str(error))
        executed.append(path)
    training = [run.path / "notebook.ipynb" for run in shown]
    executed[3:3] = [path for path in training if path.exists()]
    index = reports.render(
        executed,
        out,
        title=title,
        dataset_title=dataset.title,
        introduction=introduction,
        headline=headline(shown),
        environment=shown[-1].environment,
        readme=readme,
    )
    if failures:
        raise reports.NotebookError("\n".join([*failures, f"The report is {index}"]))
    return index


def headline(shown: Sequence[runs.Run]) -> pd.DataFrame:
    """One row a run, and the deck's: the numbers that an index shows first."""
    rows = [DECK]
    for run in shown:
        test = run.metrics["test"]
        rows.append(
            {
                "run": run.name,
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
    """Make `results/`, `figures/`, `reports/` and the README's tables; return the report's index.

    Finished runs in `runs_dir` are not trained again. Needs the real CIFAR-100.
    """
    shown = [train(recipe, runs_dir, ROOT / "figures") for recipe in REFERENCE.values()]
    results = ROOT / "results"
    for run in shown:
        folder = results / run.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            shutil.copyfile(run.path / name, folder / name)
    tables = readme_tables(results)
    readme = ROOT / "README.md"
    runs.write_atomically(readme, with_tables(readme.read_text("utf-8"), tables).encode())
    introduction = "\n".join(f"- `{recipe.run_name}`: {name}" for name, recipe in REFERENCE.items())
    return report(
        shown,
        ROOT / "reports",
        title="CIFAR-100 reference report",
        introduction=introduction,
        executed_dir=runs_dir / "executed",
        output_dir=ROOT / "figures",
        tables_dir=results,
        readme=True,
    )


def readme_tables(results: Path) -> dict[str, str]:
    """The README's tables in Markdown, by name, made from the files in `results`."""
    rows = [
        {
            "network": DECK["run"],
            "epochs": DECK["epochs"],
            "accuracy": f"{DECK['accuracy']:.2%}".replace("%", " %"),
            "loss": f"{DECK['loss']:.4f}",
        }
    ]
    for name, recipe in REFERENCE.items():
        folder = results / recipe.run_name
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        environment = json.loads((folder / "environment.json").read_text("utf-8"))
        test = metrics["test"]
        rows.append(
            {
                "network": name,
                "epochs": metrics["epochs_run"],
                "accuracy": f"{test['accuracy']:.2%} ({test['accuracy_low']:.2%} to "
                f"{test['accuracy_high']:.2%})".replace("%", " %"),
                "loss": f"{test['loss']:.4f}",
                "top-5": f"{test['top5_accuracy']:.2%}".replace("%", " %"),
                "training": f"{metrics['train_seconds'] / 60:.0f} minutes on "
                f"{environment['threads']} cores in {environment['precision']}",
            }
        )
    tables = {"results": pd.DataFrame(rows).fillna("")}

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
    augmentation = json.loads((results / "benchmarks" / "augmentation.json").read_text("utf-8"))
    tables["augmentation speed"] = pd.DataFrame(augmentation["throughput"])
    loading = json.loads((results / "benchmarks" / "data_loading.json").read_text("utf-8"))
    tables["loading speed"] = pd.DataFrame(
        {
            "what": name,
            "seconds": f"{row['load']:.2f}",
            "with a sum over every pixel": f"{row['load_and_sum']:.2f}",
            "lowest": f"{row['lowest']:.2f}",
            "highest": f"{row['highest']:.2f}",
        }
        for name, row in loading["seconds"].items()
    )
    return {name: reports.markdown_table(table) for name, table in tables.items()}


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
