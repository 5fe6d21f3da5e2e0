"""What papermill injects into a notebook is checked against the notebook's own parameters."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import papermill
import pytest

from cifar_lib import parameters
from cifar_lib.recipes import RecipeError

PARAMETERS = """\
recipe: str = "seed"  # a named recipe
learning_rate: float = 1e-4  # at the first step
epochs: int = 3  # passes over the training images
shuffle: bool = True  # a switch
train_size: int = None  # None: all
offset = -1.5
classes: list = None  # None: all
"""
SETUP = "from cifar_lib import parameters\n\nparameters.check(In)"


@pytest.fixture
def run_cells(tmp_path: Path) -> Callable[[dict], list[str]]:
    """Makes IPython's `In` as it is when the setup cell of a notebook run by papermill asks."""

    def run(injected: dict) -> list[str]:
        notebook = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_markdown_cell("# A title"),
                nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                nbformat.v4.new_code_cell(SETUP),
            ],
            metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": ""}},
        )
        nbformat.write(notebook, tmp_path / "in.ipynb")
        prepared = papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", injected, prepare_only=True
        )
        return ["", *(cell.source for cell in prepared.cells if cell.cell_type == "code")]

    return run


@pytest.mark.parametrize(
    "injected",
    [
        {},
        {"recipe": "quick"},
        {"learning_rate": 0.01},
        {"learning_rate": 1},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"epochs": 4, "shuffle": False},
        {"epochs": None},
        {"train_size": 1000},
        {"train_size": None},
        {"offset": 2.5},
        {"classes": ["bee", 'it\'s "odd"\n']},
    ],
    ids=str,
)
def test_what_fits_is_taken(injected, run_cells):
    cells = run_cells(injected)
    assert len(cells) == (4 if injected else 3), "papermill adds a cell"
    parameters.check(cells)


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        (
            {"learning_rte": 0.01},
            "notebook parameter 'learning_rte' is unknown. Did you mean 'learning_rate'",
        ),
        ({"epochs": 4, "Epochs": 4}, "notebook parameter 'Epochs' .* Did you mean 'epochs'"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3', of type str; .* of type float"),
        ({"epochs": 1.5}, r"epochs is 1\.5, of type float; .* of type int, as its default 3"),
        ({"epochs": True}, "epochs is True, of type bool; .* of type int"),
        ({"learning_rate": True}, "learning_rate is True, of type bool"),
        ({"shuffle": 1}, "shuffle is 1, of type int; .* of type bool"),
        ({"recipe": ["seed"]}, r"recipe is \['seed'\], of type list; .* of type str"),
        ({"epochs": float("nan")}, "epochs is nan, of type float"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(injected, message, run_cells):
    with pytest.raises(RecipeError, match=message):
        parameters.check(run_cells(injected))


def test_cells_that_a_person_runs_twice_are_no_injection():
    parameters.check(["", PARAMETERS, PARAMETERS.replace("epochs", "more"), SETUP, SETUP])
    parameters.check(["", PARAMETERS, "unrelated = 1", SETUP])
    parameters.check(["", "", PARAMETERS])
