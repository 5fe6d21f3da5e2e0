import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from cifar_lib import ROOT, reports

STAND_IN = "synthetic stand-in, not CIFAR-100"
PARAMETERS = {"tags": ["parameters"]}
GOOD = [
    new_markdown_cell(
        "# Squares\n\nThe squares of small numbers.\n\nSee [the page that fails](bad.ipynb), "
        "[no page](gone.ipynb) and [the papermill manual](https://papermill.readthedocs.io)."
    ),
    new_code_cell("count: int = 2  # numbers to square", metadata=PARAMETERS),
    new_code_cell("import os\nprint('folder', os.getcwd())\nprint('count', count)"),
    new_markdown_cell("## A figure"),
    new_code_cell(
        "import matplotlib.pyplot as plt\nplt.plot([n**2 for n in range(count)])\nplt.show()"
    ),
    new_markdown_cell("## Other outputs"),
    new_code_cell("import pandas as pd\npd.DataFrame({'n': range(count)})"),
    new_code_cell("pd.DataFrame({'n': range(count)}).style.format('{:.2f}')"),
    new_code_cell("import ipywidgets\nipywidgets.IntSlider()"),
    new_code_cell("from IPython.display import Latex\nLatex('$x^2$')"),
]
BAD = [
    new_markdown_cell("# A page that fails\n\nIt divides by zero."),
    new_code_cell("print('before')"),
    new_code_cell("1 / 0"),
    new_code_cell("print('after')"),
]
RUNS = pd.DataFrame(
    {
        "run": ["good", "<b>", "c"],
        "accuracy": [0.5, 0.61871, 0.3],
        "mirrored": [None, 0.7, 0.4],
        "95 % interval": ["0.4 to 0.6", "0.6 to 0.7", "0.2 to 0.4"],
    }
)
# What a browser fetches by itself; `a href` is followed by the reader alone.
FETCHED = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "link": ["href"],
    "iframe": ["src"],
    "source": ["src", "srcset"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "embed": ["src"],
    "object": ["data"],
}


class Links(HTMLParser):
    """Collects what a page fetches and what it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.followed: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.fetched += [values[name] for name in FETCHED.get(tag, []) if name in values]
        if tag == "a" and "href" in values:
            self.followed.append(values["href"])
        if "id" in values:
            self.ids.add(values["id"])


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("notebooks")
    for name, cells in (("good", GOOD), ("bad", BAD)):
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    outputs = [folder / "executed" / "good.ipynb", folder / "executed" / "bad.ipynb"]
    reports.execute(folder / "good.ipynb", outputs[0], {"count": 7})
    with pytest.raises(reports.NotebookError) as caught:
        reports.execute(folder / "bad.ipynb", outputs[1], {})
    message = str(caught.value)
    assert all(part in message for part in ("bad.ipynb", "cell 3", "In [2]", "ZeroDivisionError"))
    return outputs


@pytest.fixture(scope="module")
def report(executed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "nested"
    squares = tmp_path_factory.mktemp("numbers") / "squares.csv"
    squares.write_text("n,square\n2,4\n")
    return reports.render(
        executed,
        out,
        title="Squares, tested",
        dataset_title=STAND_IN,
        introduction="What this *test* is about.",
        headline=pd.DataFrame({"measure": ["accuracy"], "here": [0.5], "there": [0.61871]}),
        runs=RUNS,
        numbers={executed[0]: {"squares.csv": squares, "more/of them.csv": squares}},
        environment={"versions": {"keras": "3.1"}, "commit": None},
        readme=True,
    )


def outputs_of(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )


def test_execute_injects_parameters_and_runs_in_the_repository(executed):
    assert outputs_of(executed[0]) == f"folder {ROOT}\ncount 7\n"


def test_execute_keeps_what_came_before_the_error(executed):
    assert outputs_of(executed[1]) == "before\n"
    assert reports.failure(executed[0]) is None
    assert reports.failure(executed[1]) == "cell 3 (In [2]): ZeroDivisionError: division by zero"


def test_a_kernel_that_dies_is_a_failure_of_its_cell(tmp_path):
    notebook = new_notebook(
        cells=[new_code_cell("1"), new_code_cell("import os\nos.kill(os.getpid(), 9)")]
    )
    nbformat.write(notebook, tmp_path / "dies.ipynb")
    with pytest.raises(reports.NotebookError, match=r"cell 2\b.*the kernel died"):
        reports.execute(tmp_path / "dies.ipynb", tmp_path / "executed.ipynb", {})
    assert "the kernel died" in reports.failure(tmp_path / "executed.ipynb")


def test_pages_fetch_nothing_from_the_network(report):
    pages = sorted(report.parent.glob("*.html"))
    assert {page.name for page in pages} >= {"index.html", "good.html", "bad.html"}
    for page in pages:
        for target in Links(page).fetched:
            parts = urlsplit(target)
            assert parts.scheme in ("", "data"), f"{page.name} fetches {target}"
            assert not parts.netloc, f"{page.name} fetches {target}"
        assert not re.search(r"require(\.min)?\.js|mathjax|mermaid|cdn", page.read_text(), re.I)
    for style in report.parent.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_every_link_and_file_of_a_page_exists(report):
    for page in report.parent.glob("*.html"):
        links = Links(page)
        for target in links.fetched + links.followed:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            file = page.parent / unquote(parts.path) if parts.path else page
            assert file.is_file(), f"{page.name} links to {target}"
            if parts.fragment and file.suffix == ".html":
                assert parts.fragment in Links(file).ids, f"{page.name} links to {target}"


def test_a_page_folds_code_and_describes_its_figures(report):
    page = (report.parent / "good.html").read_text()
    assert page.count("<details") == 1 + sum(cell.cell_type == "code" for cell in GOOD)
    figure = re.search(r"<a [^>]*href=\"(_images/[^\"]+)\"><img alt=\"([^\"]+)\"", page)
    assert figure and (report.parent / figure[1]).is_file()
    assert figure[2] == "Figure: A figure"
    assert "data:image" not in page


def test_the_index_shows_numbers_pictures_environment_and_the_failure(report):
    for text in (report.read_text(), (report.parent / "README.md").read_text()):
        for part in (
            "0.6187",
            "The squares of small numbers.",
            "pictures/good.png",
            "notebooks/good.ipynb",
            "keras 3.1",
            "not known",
            "cell 3 (In [2]): ZeroDivisionError: division by zero",
        ):
            assert part in text, part


def test_a_page_links_to_the_numbers_behind_its_figures(report):
    folder = report.parent / "numbers" / "good"
    assert (folder / "squares.csv").read_text() == "n,square\n2,4\n"
    links = Links(report.with_name("good.html")).followed
    assert {"numbers/good/squares.csv", "numbers/good/more/of%20them.csv"} <= set(links)
    assert not any("numbers/" in link for link in Links(report.with_name("bad.html")).followed)


def test_the_rows_of_all_runs_are_there_without_scripts(report):
    page = report.read_text()
    table = re.search(r'<table class="sortable">.*?</table>', page, re.S)[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows == [
        ['<a href="good.html">good</a>', "0.5000", "", "0.4 to 0.6"],
        ["&lt;b&gt;", "0.6187", "0.7000", "0.6 to 0.7"],
        ["c", "0.3000", "0.4000", "0.2 to 0.4"],
    ]
    assert table.count('<th scope="col">') == 4
    pd.testing.assert_frame_equal(pd.read_csv(report.parent / "numbers" / "runs.csv"), RUNS)


def test_the_readme_has_the_runs_in_markdown(report):
    readme = (report.parent / "README.md").read_text()
    assert "| good | 0.5000 |  | 0.4 to 0.6 |" in readme
    assert "<table" not in readme and "<script" not in readme


def test_what_scrolls_can_be_reached_by_the_keyboard(report):
    for page in report.parent.glob("*.html"):
        text = page.read_text()
        assert "<pre>" not in text and '<div class="output text_html' not in text, page.name
        assert '<div class="table-wrapper' not in text, page.name
    assert '<pre tabindex="0">' in report.with_name("good.html").read_text()


def test_the_page_of_a_run_is_named_after_its_folder_and_titled_by_its_label(executed, tmp_path):
    run = tmp_path / "seed run 1" / "notebook.ipynb"
    run.parent.mkdir()
    run.write_bytes(executed[0].read_bytes())
    texts = {"title": "T", "dataset_title": "CIFAR-100"}
    index = reports.render([run], tmp_path / "report", **texts)
    assert "<title>Squares: seed-run-1 " in index.with_name("seed-run-1.html").read_text()

    downloaded = index.parent / "notebooks" / "seed-run-1.ipynb"
    labels = {downloaded: "seed, 2 epochs"}
    index = reports.render([downloaded], tmp_path / "another", labels=labels, **texts)
    assert "<title>Squares: seed, 2 epochs " in index.with_name("seed-run-1.html").read_text()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A notebook that reads a file and writes one, run once: what `execute_if_changed` takes."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "in.txt").write_text("2")
    (folder / "written").mkdir()
    (folder / "written" / "earlier.txt").write_text("of someone else")
    cells = [
        new_code_cell("folder: str = ''\nfactor: int = 1", metadata=PARAMETERS),
        new_code_cell(
            "from pathlib import Path\n"
            "number = factor * int(Path(folder, 'in.txt').read_text())\n"
            "Path(folder, 'written', 'out.txt').write_text(str(number))"
        ),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "source.ipynb")
    call = {
        "notebook": folder / "source.ipynb",
        "output": folder / "executed.ipynb",
        "parameters": {"folder": str(folder)},
        "inputs": [folder / "in.txt"],
        "digests": {"train": "12ab"},
        "written_to": [folder / "written"],
    }
    assert reports.execute_if_changed(**call)
    assert reports.written(call["output"]) == [folder / "written" / "out.txt"]
    return call


class RunAgainError(Exception):
    """Stands for the run that would begin."""


@pytest.fixture
def again(recorded, monkeypatch):
    """Says whether a call would run the notebook; whatever a test spoils is mended after it."""

    def run_again(*_):
        raise RunAgainError

    def again(**changes) -> bool:
        try:
            return reports.execute_if_changed(**recorded | changes)
        except RunAgainError:
            return True

    folder = recorded["output"].parent
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(reports, "execute", run_again)
    yield again
    for path, content in kept.items():
        path.write_bytes(content)


def test_a_notebook_is_not_run_again_if_nothing_changed(again, recorded):
    before = recorded["output"].stat().st_mtime_ns
    assert not again()
    assert recorded["output"].stat().st_mtime_ns == before
    assert again(fresh=True)


def test_a_notebook_is_run_again_if_what_it_is_made_from_changed(again, recorded):
    folder = recorded["output"].parent
    assert again(parameters=recorded["parameters"] | {"factor": 2})
    assert again(digests={"train": "34cd"})
    assert again(inputs=[])
    assert not again()
    (folder / "in.txt").write_text("3")
    assert again()


def test_a_notebook_is_run_again_if_it_changed(again, recorded):
    notebook = nbformat.read(recorded["notebook"], as_version=4)
    notebook.cells.append(new_markdown_cell("More."))
    nbformat.write(notebook, recorded["notebook"])
    assert again()


def test_a_notebook_is_run_again_if_the_library_changed(again, tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("")
    monkeypatch.setattr(reports, "CODE", tmp_path)
    assert again()


def test_a_notebook_is_run_again_if_a_package_changed(again, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.1")
    assert again()


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("other")])
def test_a_notebook_is_run_again_if_what_it_wrote_is_gone_or_another_s(again, recorded, spoil):
    spoil(recorded["output"].parent / "written" / "out.txt")
    assert again()


@pytest.mark.parametrize("torn", ['{"cells": [', ""])
def test_a_notebook_is_run_again_if_its_copy_is_torn(again, recorded, torn):
    recorded["output"].write_text(torn)
    assert again()


def test_a_notebook_that_failed_is_run_again(tmp_path):
    nbformat.write(new_notebook(cells=BAD), tmp_path / "bad.ipynb")
    for _ in range(2):
        with pytest.raises(reports.NotebookError, match="ZeroDivisionError"):
            reports.execute_if_changed(tmp_path / "bad.ipynb", tmp_path / "out.ipynb", {})


def test_markdown_tables_show_whole_numbers_fractions_gaps_and_bars():
    table = pd.DataFrame(
        {"run": ["a|b", "deck"], "epochs": [5, None], "accuracy": [0.30001, 0.6187]}
    )
    assert reports.markdown_table(table).splitlines() == [
        "| run | epochs | accuracy |",
        "| --- | ---: | ---: |",
        r"| a\|b | 5 | 0.3000 |",
        "| deck |  | 0.6187 |",
    ]


def test_synthetic_data_is_marked_on_every_page_and_real_data_is_not(report, executed, tmp_path):
    pages = [*report.parent.glob("*.html"), report.parent / "README.md"]
    assert all(f"Made with a {STAND_IN}" in page.read_text() for page in pages)
    real = reports.render(executed[:1], tmp_path, title="Real", dataset_title="CIFAR-100")
    assert all("stand-in" not in page.read_text() for page in tmp_path.glob("*.html"))
    assert "CIFAR-100" in real.read_text()


def test_nothing_is_written_again_unless_it_changed(executed, tmp_path):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def render(notebooks, **options):
        reports.render(notebooks, tmp_path, title="T", dataset_title="CIFAR-100", **options)

    (tmp_path / "mine.html").write_text("a file of someone else")
    render(executed)
    before = times()
    render(executed)
    assert times() == before
    render(executed, introduction="Another introduction.")
    changed = {path.name for path, time in times().items() if before.get(path) != time}
    assert changed == {"index.html", "searchindex.js"}
    render(executed[:1])
    names = {path.name for path in times()}
    assert "bad.html" not in names and {"mine.html", "good.html"} <= names


def test_running_a_notebook_again_changes_no_page(executed, tmp_path):
    source = executed[0].parent.parent / "good.ipynb"
    reports.execute(source, tmp_path / "again" / "good.ipynb", {"count": 7})
    for name, notebook in (("first", executed[0]), ("second", tmp_path / "again" / "good.ipynb")):
        reports.render([notebook], tmp_path / name, title="T", dataset_title="CIFAR-100")
    for path in (tmp_path / "first").rglob("*"):
        twin = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.is_dir() or path.read_bytes() == twin.read_bytes(), path.name


def test_a_downloaded_notebook_names_no_folder_of_this_machine(executed, report):
    assert str(executed[0].parent) not in (report.parent / "notebooks" / "good.ipynb").read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "none was given"),
        (["a.ipynb", "sub/a.ipynb"], "two pages would be called 'a'"),
        (["index.ipynb"], "'index'"),
        (["torn.ipynb"], "torn.ipynb cannot be read as a notebook"),
        (["missing.ipynb"], "missing.ipynb cannot be read as a notebook"),
        (["picture.ipynb"], "picture.ipynb holds a picture that cannot be read"),
    ],
)
def test_what_cannot_be_rendered_is_refused(names, message, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.ipynb", "sub/a.ipynb", "index.ipynb"):
        nbformat.write(new_notebook(cells=BAD[:1]), tmp_path / name)
    (tmp_path / "torn.ipynb").write_text('{"cells": [')
    output = nbformat.v4.new_output("display_data", {"image/png": "bm90IGEgUE5H"})
    cell = new_code_cell("1", outputs=[output])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "picture.ipynb")
    with pytest.raises(reports.ReportError, match=re.escape(message)):
        reports.render(
            [tmp_path / name for name in names],
            tmp_path / "report",
            title="T",
            dataset_title="CIFAR-100",
        )
    assert not (tmp_path / "report").exists()
