import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from PIL import Image

from cifar_lib import ROOT, data, explorers, recipes, reports, runs, workflows

TINY = {"train_size": 100, "validation_size": 100, "test_size": 200, "epochs": 2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="module")
def run(workplace, synthetic):
    recipe = recipes.get("quick", dataset="synthetic", **TINY)
    return workflows.train(recipe, workplace / "runs", workplace / "figures")


@pytest.fixture(scope="module")
def studies_dir(workplace):
    """A study of the reference results, as if it were on the stand-in, and another as it is."""
    folder = workplace / "studies"
    for name in ("learning_rate", "batch_size"):
        shutil.copytree(ROOT / "results" / "studies" / name, folder / name)
    path = folder / "learning_rate" / "study.json"
    content = json.loads(path.read_text("utf-8")) | {"dataset_title": data.SYNTHETIC_TITLE}
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def index(workplace, run, studies_dir):
    return workflows.report(
        [run],
        workplace / "report",
        executed_dir=workplace / "executed",
        output_dir=workplace / "figures",
        tables_dir=workplace / "tables",
        studies_dir=studies_dir,
    )


def test_the_training_notebook_leaves_a_finished_run_and_itself(run):
    assert run.finished
    executed = nbformat.read(run.path / "notebook.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    # A log, not a terminal: one line an epoch.
    assert re.findall(r"^epoch (\d/\d) ", printed, re.M) == ["1/2", "2/2"]
    assert run.name in printed


def test_every_notebook_becomes_a_page_that_names_the_stand_in(index, run):
    pages = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"04_train"}
    for name in ["index", run.name, *pages]:
        page = index.with_name(f"{name}.html").read_text("utf-8")
        assert "synthetic stand-in, not CIFAR-100" in page, name
        assert "Traceback" not in page, name


@pytest.mark.parametrize(
    ("name", "number"),
    [("01_dataset", 1), ("02_augmentation", 1), ("05_results", 2), ("06_predictions", 1)],
)
def test_an_explorer_is_a_picture_in_a_report(index, workplace, name, number):
    page = index.with_name(f"{name}.html").read_text("utf-8")
    assert explorers.HINT.partition("`")[0] in page
    assert "widget-view" not in page
    executed = nbformat.read(workplace / "executed" / f"{name}.ipynb", as_version=4)
    cells = [c for c in executed.cells if re.search(r"^explorers\.[A-Z]", c.source, re.M)]
    assert len(cells) == number
    for cell in cells:
        assert ["image/png" in output.data for output in cell.outputs][:2] == [False, True]


def test_studies_on_another_data_set_are_left_out(index):
    page = index.with_name("07_calibration.html").read_text("utf-8")
    assert "<strong>learning_rate</strong>" in page
    assert "<strong>batch_size</strong>" not in page


def test_pictures_are_legible_files_of_reasonable_size(index, workplace):
    pictures = sorted((workplace / "figures").glob("*.png"))
    assert len(pictures) >= 12
    for path in pictures:
        with Image.open(path) as picture:
            assert min(picture.size) >= 150, path
        assert path.stat().st_size < 1_500_000, path


def test_tables_agree_with_the_metrics(index, run, workplace):
    folder = workplace / "tables" / run.name
    test = run.metrics["test"]
    classes = pd.read_csv(folder / "per_class.csv")
    right = (classes["recall"] * classes["images"]).sum()
    assert right == pytest.approx(test["accuracy"] * test["images"])
    confused = pd.read_csv(folder / "confused.csv")
    assert confused["count"].sum() == pytest.approx(test["images"] - right)
    reliability = pd.read_csv(folder / "reliability.csv")
    assert reliability["images"].sum() == test["images"]
    examples = pd.read_csv(folder / "examples.csv")
    assert len(examples) == 4


def test_a_page_has_the_numbers_that_it_was_made_from(index, run):
    folder = index.parent / "numbers"
    for name in (
        f"05_results/{run.name}/per_class.csv",
        f"05_results/{run.name}/metrics.json",
        f"06_predictions/{run.name}/examples.csv",
        "07_calibration/learning_rate/trials.csv",
        "07_calibration/learning_rate/histories.csv",
        f"08_beyond/{run.name}/history.csv",
        f"{run.name}/history.csv",
        f"{run.name}/metrics.json",
    ):
        assert (folder / name).is_file(), name
        page = name.partition("/")[0]
        assert f'href="numbers/{name}"' in index.with_name(f"{page}.html").read_text("utf-8")
    assert (folder / run.name / "history.csv").read_bytes() == (
        run.path / "history.csv"
    ).read_bytes()


def test_the_same_report_again_runs_no_notebook_and_touches_no_file(
    index, workplace, run, studies_dir, capsys
):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in workplace.rglob("*") if path.is_file()}

    before = times()
    workflows.report(
        [run],
        index.parent,
        executed_dir=workplace / "executed",
        output_dir=workplace / "figures",
        tables_dir=workplace / "tables",
        studies_dir=studies_dir,
    )
    assert times() == before
    assert re.findall(r"^(\d+)_\w+ \.\.\. unchanged$", capsys.readouterr().out, re.M) == [
        "01",
        "02",
        "03",
        "05",
        "06",
        "07",
        "08",
    ]


def test_all_runs_have_a_row(run):
    [row] = workflows.all_runs([run]).to_dict("records")
    assert row["run"] == run.name
    assert row["accuracy"] == run.metrics["test"]["accuracy"]
    assert row["training minutes"] == f"{run.metrics['train_seconds'] / 60:.1f}"


def test_the_headline_puts_the_deck_first(run):
    table = workflows.headline([run])
    assert table.iloc[0][["epochs", "accuracy", "loss"]].tolist() == [139, 0.6187, 1.5597]
    assert table.iloc[1]["accuracy"] == run.metrics["test"]["accuracy"]


def test_runs_of_two_data_sets_make_no_report(run, workplace):
    other = workplace / "other"
    other.mkdir()
    runs.write_atomically(other / "recipe.json", recipes.get("seed").to_json().encode())
    with pytest.raises(runs.RunError, match="cifar100, synthetic"):
        workflows.report(
            [run, runs.Run(other)], other, executed_dir=other, output_dir=other, tables_dir=other
        )


def test_a_notebook_refuses_a_parameter_that_it_does_not_have(tmp_path):
    with pytest.raises(reports.NotebookError, match=r"'epcohs' is unknown\. Did you mean 'epochs'"):
        reports.execute(
            ROOT / "notebooks" / "04_train.ipynb", tmp_path / "executed.ipynb", {"epcohs": 3}
        )


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_checks_its_parameters_first(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert "parameters.check(In)" in code[1].source


@pytest.mark.parametrize("name", ["01_dataset", "02_augmentation"])
def test_notebooks_about_the_data_run_on_the_real_one(name, cifar100, tmp_path):
    executed = tmp_path / f"{name}.ipynb"
    parameters = {"dataset": "cifar100", "output_dir": str(tmp_path)}
    reports.execute(ROOT / "notebooks" / executed.name, executed, parameters)
    assert data.SYNTHETIC_TITLE not in executed.read_text("utf-8")


def test_the_readme_s_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text("utf-8")
    assert workflows.with_tables(text, workflows.readme_tables(ROOT / "results")) == text


def test_a_table_without_its_place_is_refused():
    with pytest.raises(ValueError, match="<!-- speed -->"):
        workflows.with_tables("no place", {"speed": "| 1 |"})


def test_the_results_hold_what_the_pages_are_made_of():
    for of_seeds in workflows.REFERENCE.values():
        for recipe in of_seeds:
            run = runs.load(workflows.RESULTS / recipe.run_name)
            assert run.finished and run.recipe == recipe
    predictions = runs.load(workflows.RESULTS / of_seeds[0].run_name).predictions()
    right = predictions["test_probabilities"].argmax(axis=1) == predictions["test_labels"]
    assert len(right) == 10_000
    # Tested again on another machine, single images may round to another class.
    expected = json.loads((workflows.RESULTS / of_seeds[0].run_name / "metrics.json").read_text())
    assert right.mean() == pytest.approx(expected["test"]["accuracy"], abs=1e-3)


def test_the_repository_s_pictures_and_pages_stay_small():
    files = [p for folder in ("figures", "reports") for p in (ROOT / folder).rglob("*")]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 15_000_000
