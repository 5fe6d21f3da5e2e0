"""The parameters of a notebook: what it declares, and the check of what papermill injects."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

from cifar_lib.recipes import RecipeError, unknown

# papermill writes this above what it injects, in a cell right after the `parameters` cell.
INJECTED = "# Parameters\n"


def check(cells: Sequence[str]) -> None:
    """Refuse injected parameters that the notebook does not have, or of another type.

    papermill itself only logs "Passed unknown parameter" and goes on.

    Args:
        cells: the code cells run so far: IPython's `In`. The first one with code is the notebook's
            `parameters` cell.

    Raises:
        RecipeError: a parameter is unknown or of a wrong type.
    """
    ran = [cell for cell in cells if cell.strip()]
    if len(ran) < 2 or not ran[1].startswith(INJECTED):
        return
    declared, injected = _assignments(ran[0]), _assignments(ran[1])
    for name, value in injected.items():
        if name not in declared:
            raise RecipeError(unknown("notebook parameter", name, declared))
        default = declared[name]
        allowed = {type(default), int} if isinstance(default, float) else {type(default)}
        if default is not None and value is not None and type(value) not in allowed:
            raise RecipeError(
                f"notebook parameter {name} is {value!r}, of type {type(value).__name__}; it must "
                f"be of type {type(default).__name__}, as its default {default!r}."
            )


def declared(notebook: Path) -> dict[str, object]:
    """The parameters of a notebook, with their defaults."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            return _assignments("".join(cell["source"]))
    return {}


def _assignments(cell: str) -> dict[str, object]:
    values = {}
    for statement in ast.parse(cell).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                values[ast.unparse(target)] = _literal(statement.value)
    return values


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        # papermill writes float("nan") and float("inf"), which are no literals.
        return float(node.args[0].value) if isinstance(node, ast.Call) else None
