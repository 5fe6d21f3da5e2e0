import os
import re
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

import cifar_lib
from cifar_lib import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BACKENDS = re.compile(r"\b(tensorflow|keras|jax|torch)\b")
WITHOUT_BACKEND = (
    *("data", "recipes", "parameters", "runs", "evaluation", "figures", "reports", "weights"),
    *("studies", "trials", "sweeps", "board", "calibration", "benchmark", "explorers"),
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = (ROOT / "requirements.txt").read_text()
MEGABYTE = 2**20


def pinned() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in REQUIREMENTS.splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.kernelspec.language == "python"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.get("language_info", {})) <= {"name"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, f"metadata of {cell.source[:60]!r}"
        assert not cell.get("outputs"), f"outputs of {cell.source[:60]!r}"
        assert cell.get("execution_count") is None


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Calls a program in a repository of its own, with a notebook and after `make filter`."""
    for program in ("make", "git"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set where a hook runs the tests
        monkeypatch.delenv(name, raising=False)
    for folder in ("notebooks", "reports/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("Makefile", "notebooks/.gitattributes", f"notebooks/{NOTEBOOKS[0].name}"):
        shutil.copy(ROOT / name, tmp_path / name)

    def call(*arguments):
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ready = f"{sys.prefix}/.ready"
    make = ["make", "filter", f"VENV={sys.prefix}", f"--assume-old={ready}"]
    assert "no checkout" in call(*make)
    call("git", "init", "--quiet")
    call("git", "add", ".")
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    call("git", *author, "commit", "--quiet", "--message", "A notebook")
    call(*make)
    return tmp_path, call


def test_outputs_of_notebooks_stay_out_of_git(checkout):
    folder, call = checkout
    assert not call("git", "status", "--porcelain")
    (path,) = folder.glob("notebooks/*.ipynb")
    # Nothing but what Jupyter puts into a notebook that is run and saved.
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.language_info |= {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
        "version": "3.13.1",
    }
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    for number, cell in enumerate(notebook.cells, 1):
        cell.metadata |= {"collapsed": True, "editable": True, "slideshow": {"slide_type": ""}}
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.metadata |= {"scrolled": True, "jupyter": {"source_hidden": True}}
            cell.metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
            cell.outputs = [nbformat.v4.new_output("stream", text="a secret\n")]
    nbformat.write(notebook, path)
    assert not call("git", "diff")
    call("git", "add", ".")
    assert not call("git", "status", "--porcelain")
    path.write_text(path.read_text().replace("# The data set", "# Another title"))
    changes = call("git", "diff", "--unified=0")
    assert "Another title" in changes
    assert "a secret" not in changes


def test_executed_notebooks_of_the_report_keep_their_outputs(checkout):
    folder, call = checkout
    for name in ("notebooks", "reports/notebooks"):
        cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", text="kept\n")])
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / name / "new.ipynb")
    call("git", "add", ".")
    assert "kept" not in call("git", "show", ":notebooks/new.ipynb")
    assert "kept" in call("git", "show", ":reports/notebooks/new.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_begin_with_a_title_and_then_their_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    assert re.match(r"# .+\n\n\S", notebook.cells[0].source), "a title and an abstract"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [code[0]]
    for line in code[0].source.splitlines():
        assert re.match(r"\w+: .+ = .+  # .+|#|\s|[\])}]|$", line), f"type and comment: {line!r}"
    for cell in code:
        assert len(cell.source.splitlines()) <= 40, f"longer than a screen: {cell.source[:60]!r}"


def test_every_direct_dependency_is_pinned():
    pins = pinned()
    for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        found = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(wanted.name)]
        assert found, f"{wanted.name} is not in requirements.txt: compile it again"
        for pin in found:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert wanted.specifier.contains(specifier.version), f"{pin} does not satisfy {line}"


def test_requirements_name_no_local_version_folder_or_extra_backend():
    pins = pinned()
    assert not [str(pin) for pin in pins if pin.url or "+" in str(pin.specifier)]
    assert not {pin.name for pin in pins} & {"tensorflow-cpu", "jax", "jaxlib", "torch"}
    assert not re.search(r"(^|[\s=])(file:|[/~]|[A-Z]:\\|\.\.?/)", REQUIREMENTS, re.M)


def test_environment_uses_requirements():
    environment = YAML(typ="safe").load(ROOT / "environment.yml")
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert [re.split("[=<> ]", item)[0] for item in conda] == ["python", "pip"]
    assert "-r requirements.txt" in pip


def test_citation_names_the_version():
    citation = YAML(typ="safe").load(ROOT / "CITATION.cff")
    assert citation["version"] == cifar_lib.__version__
    assert citation["license"] == PROJECT["license"] == "MIT"


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import cifar_lib"], ["-m", "cifar_lib", "--help"]],
    ids=["import", "help"],
)
def test_the_start_is_quick(arguments):
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    # The time of the processor, which other programs at work do not change.
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    assert seconds < 1
    assert not BACKENDS.findall(done.stderr)


def test_modules_without_a_network_import_no_backend():
    code = f"from cifar_lib import {', '.join(WITHOUT_BACKEND)}"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not BACKENDS.findall(done.stderr)


def test_make_lists_every_target():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"^ +make ([\w-]+)", listed, re.M) == phony.split()


def test_reports_and_figures_stay_small():
    files = [
        path
        for folder in ("reports", "figures")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".html", ".png")
    ]
    assert sum(path.stat().st_size for path in files) <= 15 * MEGABYTE
    pages = [path for path in files if path.suffix == ".html"]
    assert not [path.name for path in pages if path.stat().st_size > 3 * MEGABYTE]
