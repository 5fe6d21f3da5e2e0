"""Run notebooks without a person, and make web pages of them that open from disk, offline.

papermill runs the notebooks; Sphinx with MyST-NB and the theme furo makes the pages.
"""

import base64
import contextlib
import copy
import hashlib
import html
import io
import json
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from nbformat import NotebookNode
from PIL import Image

from cifar_lib import ROOT, installed
from cifar_lib.runs import write_atomically

KERNEL = "python3"
STYLE = Path(__file__).with_suffix(".css")
# A notebook may call any module of the library, and each of these packages shows in its results.
CODE = Path(__file__).parent
PACKAGES = (
    *("keras", "tensorflow", "jax", "torch", "numpy", "scipy", "scikit-learn", "pandas"),
    *("pillow", "matplotlib", "seaborn", "optuna", "ipython"),
)
# Where the metadata of an executed notebook say what it was made from and what it wrote.
RECORD = "cifar_lib"
# The list of what the last rendering wrote, so that the next one deletes nothing else.
MANIFEST = ".files.json"
# Pictures of the index, in pixels; the pages show the full ones.
PICTURE_SIZE = (800, 600)
# Documents of Sphinx itself, which no page may be named after.
RESERVED = {"index", "search", "genindex"}
WIDGET = "application/vnd.jupyter.widget-view+json"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
# pandas names a styled table at random.
STYLED_TABLE = re.compile(r'<table id="(?P<name>T_[0-9a-f]+)"')
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
RUNS_LINK = '<a href="numbers/runs.csv" download>Download the table as CSV</a>'
# papermill puts cells with this tag before the title and before the cell that failed.
ERROR_MARKER = "papermill-error-cell-tag"

SPHINX = {
    "extensions": ["myst_nb"],
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_render_markdown_format": "gfm",
    "nb_code_prompt_show": "Show the code",
    "nb_code_prompt_hide": "Hide the code",
    # What draws widgets and formulas would come from the network.
    "nb_ipywidgets_js": {},
    "nb_mime_priority_overrides": [("*", "text/latex", None)],
    "myst_update_mathjax": False,
    # Headings that skip a level, and outputs that only a kernel can show, are no fault.
    "suppress_warnings": ["myst.header", "mystnb.mime_type"],
    "html_theme": "furo",
    "html_css_files": ["report.css"],
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "html_show_search_summary": False,
    "html_show_copyright": False,
    "html_show_sphinx": False,
    "html_use_index": False,
    # The contrast of these is WCAG's AA and better.
    "pygments_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

# Browsers import no module from a file that was opened from disk, but do import one from a blob.
SORTABLE_SCRIPT = """\
import(URL.createObjectURL(new Blob([%s], { type: "text/javascript" }))).then(
  ({ default: DataTable }) => {
    for (const table of document.querySelectorAll("table.sortable")) {
      new DataTable(table, {
        autoWidth: false,
        info: false,
        order: [],
        paging: false,
        searching: false,
      });
    }
  },
);
"""


class NotebookError(Exception):
    """A notebook failed while it ran; its executed copy holds the error."""


class ReportError(Exception):
    """No report can be made of these notebooks."""


@dataclass(frozen=True)
class _Page:
    """An executed notebook as the report shows it, without what changes from run to run."""

    name: str
    notebook: NotebookNode
    title: str
    abstract: str
    picture: bytes | None
    failure: str | None
    numbers: Mapping[str, Path]


def execute(
    notebook: Path, output: Path, parameters: Mapping[str, Any], *, echo: bool = False
) -> None:
    """Run a notebook from top to bottom in a fresh kernel, with the repository as its folder.

    Args:
        notebook: the notebook; it is not changed.
        output: where the executed notebook goes. It is written after every cell, so that it shows
            how far a run came that was killed.
        parameters: what papermill injects after the cell tagged `parameters`.
        echo: print what the cells print, as it comes.

    Raises:
        NotebookError: a cell failed or the kernel died; `output` holds the error.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            notebook,
            output,
            dict(parameters),
            kernel_name=KERNEL,
            language="python",
            cwd=ROOT,
            progress_bar=False,
            # What the kernel says about its own sockets tells the reader nothing.
            extra_arguments=["--log-level=50"],
            stdout_file=sys.stdout if echo else None,
            stderr_file=sys.stderr if echo else None,
        )
    except papermill.PapermillExecutionError:
        pass
    except DeadKernelError:
        _record_death(output)
    except KeyboardInterrupt:
        # nbclient leaves a task behind, whose end asyncio would report with a traceback.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    error = failure(output)
    if error:
        raise NotebookError(f"{notebook} failed in {error}\nIts executed copy is {output}")


def execute_if_changed(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, Any],
    *,
    inputs: Iterable[Path] = (),
    digests: Mapping[str, str] | None = None,
    written_to: Iterable[Path] = (),
    fresh: bool = False,
) -> bool:
    """Run a notebook, unless its executed copy is what another run would give.

    It is run again if its last run failed, if it, a parameter, an input, this library or the
    version of a package changed, or if a file that it wrote is gone or has changed since.

    Args:
        notebook: as in `execute`.
        output: as in `execute`.
        parameters: as in `execute`.
        inputs: the files that it reads.
        digests: SHA-256 of the data that it reads and whose files are not among the inputs.
        written_to: the folders in which it writes; nothing else may write there meanwhile.
        fresh: run it in any case.

    Returns:
        whether it was run.

    Raises:
        NotebookError: as in `execute`.
    """
    fingerprint = _fingerprint(notebook, parameters, inputs, digests or {})
    if not fresh and _is_current(output, fingerprint):
        return False
    before = _stamps(written_to)
    execute(notebook, output, parameters)
    files = [path for path, stamp in _stamps(written_to).items() if before.get(path) != stamp]
    executed = nbformat.read(output, as_version=4)
    executed.metadata[RECORD] = {
        "fingerprint": fingerprint,
        "written": {str(path): _digest(path) for path in sorted(files)},
    }
    write_atomically(output, nbformat.writes(executed).encode())
    return True


def written(executed: Path) -> list[Path]:
    """The files that a notebook wrote when `execute_if_changed` ran it; none if it failed."""
    record = nbformat.read(executed, as_version=4).metadata.get(RECORD, {})
    return [Path(name) for name in record.get("written", {})]


def failure(executed: Path) -> str | None:
    """The error that ended an executed notebook, with its cell; None if there is none.

    Raises:
        ReportError: the file is not a notebook.
    """
    return _failure(_read(executed))


def complete(executed: Path) -> bool:
    """Whether an executed notebook ran without error to the output of its last code cell.

    Raises:
        ReportError: the file is not a notebook.
    """
    notebook = _read(executed)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    started = all(cell.metadata.get("papermill", {}).get("start_time") for cell in code)
    return started and bool(code[-1].outputs) and _failure(notebook) is None


def render(
    executed: Sequence[Path],
    out: Path,
    *,
    title: str,
    dataset_title: str,
    introduction: str = "",
    headline: pd.DataFrame | None = None,
    runs: pd.DataFrame | None = None,
    numbers: Mapping[Path, Mapping[str, Path]] | None = None,
    labels: Mapping[Path, str] | None = None,
    environment: Mapping[str, Any] | None = None,
    readme: bool = False,
) -> Path:
    """Make a folder of web pages: an index, and a page for each executed notebook.

    The pages load nothing from the network. A page that would not change is not written again;
    pages of an earlier report in the same folder that are no longer in it are deleted.

    Args:
        executed: executed notebooks, in the order of the index; a page is named after its file, or
            after the run folder if the file is called `notebook.ipynb`.
        out: the folder of the report.
        title: the name of the report.
        dataset_title: `Dataset.title`. If it is not "CIFAR-100", a banner on every page shows it.
        introduction: Markdown for the top of the index.
        headline: the numbers that the index shows first; fractions are shown with four digits.
        runs: one row a run, with its name in the column "run", for a table on the index that a
            click on a heading sorts. The name of a run that has a page is a link to it.
        numbers: for each executed notebook the files that hold the numbers behind its figures, by
            the name that they get. The report has copies, to which the page links.
        labels: what titles tell pages by that come from one notebook; without, a page of a run
            folder has that folder's name in its title.
        environment: what the results were made with, as in a run's `environment.json`: values are
            text, numbers, None or a mapping of these.
        readme: also write the index as `README.md`, which a code host shows.

    Returns:
        the path of `index.html`.

    Raises:
        ReportError: there is no notebook, a file is not a notebook, two pages have one name, or
            Sphinx failed.
    """
    if not executed:
        raise ReportError("a report needs at least one executed notebook; none was given")
    numbers, labels = numbers or {}, labels or {}
    pages = [_page(path, numbers.get(path, {}), labels.get(path)) for path in executed]
    for page, path in zip(pages, executed, strict=True):
        if page.name in RESERVED or [other.name for other in pages].count(page.name) > 1:
            raise ReportError(f"two pages would be called {page.name!r}: rename {path}")
    banner = "" if dataset_title == "CIFAR-100" else f"Made with a {dataset_title}"
    sections = {
        "Headline numbers": None if headline is None else markdown_table(headline),
        "All runs": None if runs is None else _sortable_table(runs, pages),
    }
    described = (title, dataset_title, banner, introduction)
    overview = _overview(pages, *described, sections, environment)
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "source"), Path(folder, "built")
        _write_source(source, pages, overview, dataset_title, runs)
        _run_sphinx(source, built, title, banner)
        if readme:
            if runs is not None:
                sections["All runs"] = f"{markdown_table(runs)}\n\n{RUNS_LINK}"
            # A code host shows the source of what these lead to.
            note = "To read the pages, clone the repository and open `index.html` of this folder."
            described = (title, dataset_title, banner, f"{note}\n\n{introduction}")
            overview = _overview(pages, *described, sections, environment)
            (built / "README.md").write_text(overview, encoding="utf-8")
        _publish(built, out)
    return out / "index.html"


def markdown_table(table: pd.DataFrame) -> str:
    """A table in the Markdown of code hosts: numbers to the right, fractions with four digits.

    The index of `table` is left out, and missing values are empty cells.
    """
    table = table.convert_dtypes()

    def cell(value: object) -> str:
        return _cell(value).replace("|", r"\|").replace("\n", " ")

    numbers = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]
    rows = [
        [str(column) for column in table.columns],
        ["---:" if number else "---" for number in numbers],
        *([cell(value) for value in row] for row in table.itertuples(index=False)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def percent(share: float) -> str:
    """A share, 0..1, as a text sets it: 0.6187 becomes "61.87 %"."""
    return f"{share:.2%}".replace("%", " %")


def _fingerprint(
    notebook: Path,
    parameters: Mapping[str, Any],
    inputs: Iterable[Path],
    digests: Mapping[str, str],
) -> str:
    """The SHA-256 of all that decides what a notebook shows and writes."""
    versions = {"python": platform.python_version()} | installed(PACKAGES)
    made_from = {
        "notebook": _digest(notebook),
        "parameters": dict(parameters),
        "inputs": {str(path): _digest(path) for path in inputs},
        "digests": dict(digests),
        "code": {path.name: _digest(path) for path in CODE.glob("*.py")},
        "versions": versions,
        "backend": os.environ.get("KERAS_BACKEND", ""),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_current(executed: Path, fingerprint: str) -> bool:
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (OSError, ValueError):  # there is none, or a run was killed while it wrote
        return False
    record = notebook.metadata.get(RECORD, {})
    return record.get("fingerprint") == fingerprint and all(
        Path(name).is_file() and _digest(Path(name)) == digest
        for name, digest in record["written"].items()
    )


def _stamps(folders: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """When each file in the folders was changed, and which file of the disk it is."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def _cell(value: object) -> str:
    """What a table shows of a value: of a fraction four digits, of a missing one nothing."""
    if pd.isna(value):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _sortable_table(table: pd.DataFrame, pages: Sequence[_Page]) -> str:
    """A table whose headings sort it where scripts run; its rows are there without, too."""
    names = {page.name for page in pages}

    def cell(column: str, text: str) -> str:
        name = _page_name(text)
        linked = column == "run" and name in names
        content = _link(f"{name}.html", text) if linked else html.escape(text)
        is_text = column == "run" or not re.fullmatch(r"-?[\d.]+( to [\d.]+)?", text)
        return f"<td>{content}</td>" if is_text else f'<td class="number">{content}</td>'

    columns = [str(column) for column in table.columns]
    rows = [map(_cell, row) for row in table.convert_dtypes().itertuples(index=False)]
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in columns)
    body = ["".join(map(cell, columns, row)) for row in rows]
    return "\n".join(
        [
            '<div class="scroll" tabindex="0" role="region" aria-label="Table of all runs">',
            f'<table class="sortable"><thead><tr>{head}</tr></thead>',
            "<tbody>",
            *(f"<tr>{cells}</tr>" for cells in body),
            "</tbody></table></div>",
            '<script defer src="_static/sortable.js"></script>',
            "",
            RUNS_LINK,
        ]
    )


def _read(path: Path) -> NotebookNode:
    try:
        # Where the repository lies is of no interest to a reader, and differs between machines.
        text = path.read_text(encoding="utf-8").replace(f"{ROOT}/", "")
        notebook = nbformat.reads(text, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise ReportError(f"{path} cannot be read as a notebook: {error}") from error
    notebook.cells = [
        cell for cell in notebook.cells if ERROR_MARKER not in cell.metadata.get("tags", [])
    ]
    return notebook


def _record_death(executed: Path) -> None:
    """Add an error to the cell in which the kernel died, which could not report one itself."""
    notebook = nbformat.read(executed, as_version=4)
    cell = [cell for cell in notebook.cells if cell.metadata.papermill.start_time][-1]
    message = "the kernel died, often because the memory was full"
    cell.outputs.append(
        nbformat.v4.new_output(
            "error",
            ename="DeadKernelError",
            evalue=message,
            traceback=[f"DeadKernelError: {message}"],
        )
    )
    nbformat.write(notebook, executed)


def _failure(notebook: NotebookNode) -> str | None:
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type != "error":
                continue
            if output.ename == "SystemExit" and output.evalue in ("", "0"):
                continue
            prompt = f" (In [{cell.execution_count}])" if cell.execution_count else ""
            return f"cell {number}{prompt}: {output.ename}: {output.evalue}"
    return None


def _page_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _page(path: Path, numbers: Mapping[str, Path], label: str | None) -> _Page:
    notebook = _read(path)
    _remove_volatile(notebook)
    of_run = path.stem == "notebook"
    name = _page_name(path.parent.name if of_run else path.stem)
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(f"# {name}", id="title"))
    elif label or of_run:  # the pages of several runs come from one notebook
        title, line_end, rest = first.source.partition("\n")
        # A notebook that was downloaded from a report has a label already.
        first.source = f"{title.partition(': ')[0]}: {label or name}{line_end}{rest}"
    heading, _, rest = notebook.cells[0].source.partition("\n")
    try:
        picture = _picture(notebook)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} holds a picture that cannot be read: {error}") from error
    return _Page(
        name=name,
        notebook=notebook,
        title=heading.removeprefix("# ").strip(),
        abstract=rest.strip().partition("\n\n")[0],
        picture=picture,
        failure=_failure(notebook),
        numbers=numbers,
    )


def _remove_volatile(notebook: NotebookNode) -> None:
    """Remove times, paths of this machine and random identifiers, and what only a kernel shows."""
    for key in ("papermill", "widgets", RECORD):
        notebook.metadata.pop(key, None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for position, output in enumerate(cell.outputs):
            data = output.get("data", {})
            if "text/plain" in data:
                data["text/plain"] = ADDRESS.sub("", data["text/plain"])
            styled = STYLED_TABLE.search(data.get("text/html", ""))
            if styled:
                name = f"T_{number}_{position}"
                data["text/html"] = data["text/html"].replace(styled["name"], name)


def _picture(notebook: NotebookNode) -> bytes | None:
    """The first picture of a notebook as a PNG no larger than the index shows it."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                encoded = base64.b64decode(output.data["image/png"])
                picture = Image.open(io.BytesIO(encoded))
                if picture.width <= PICTURE_SIZE[0] and picture.height <= PICTURE_SIZE[1]:
                    return encoded
                picture.thumbnail(PICTURE_SIZE)
                buffer = io.BytesIO()
                picture.save(buffer, "PNG", optimize=True)
                return buffer.getvalue()
    return None


def _overview(
    pages: Sequence[_Page],
    title: str,
    dataset_title: str,
    banner: str,
    introduction: str,
    sections: Mapping[str, str | None],
    environment: Mapping[str, Any] | None,
) -> str:
    """The index in the Markdown that both MyST and code hosts read; links are HTML for that."""
    parts = [f"# {title}"]
    parts.append(f"**{banner}.**" if banner else f"Data set: {dataset_title}.")
    parts.append(introduction)
    failed = [page for page in pages if page.failure]
    if failed:
        parts.append("## What failed")
        parts.extend(
            f"- {_link(f'{page.name}.html', page.title)}: <code>{html.escape(page.failure)}</code>"
            for page in failed
        )
    for heading, content in sections.items():
        parts += [f"## {heading}", content] if content else []
    abstracts = set()
    for page in pages:
        parts += [f"## {page.title}", "" if page.abstract in abstracts else page.abstract]
        abstracts.add(page.abstract)
        if page.failure:
            parts.append(f"**Failed:** <code>{html.escape(page.failure)}</code>")
        if page.picture:
            alt = f"First figure of: {html.escape(page.title)}"
            picture = f'<img src="pictures/{page.name}.png" alt="{alt}">'
            parts.append(f'<p class="picture"><a href="{page.name}.html">{picture}</a></p>')
        parts.append(f"{_link(f'{page.name}.html', 'Read the page')} · {_notebook_link(page.name)}")
    if environment:
        parts += ["## How the last run was made", markdown_table(_environment_table(environment))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _link(target: str, text: str) -> str:
    return f'<a href="{target}">{html.escape(text)}</a>'


def _numbers_links(page: _Page) -> str:
    """Links to the copies of the numbers behind a page's figures, a line for each folder."""
    folders: dict[str, list[str]] = {}
    for name in page.numbers:
        folder, _, file = name.rpartition("/")
        target = f"numbers/{quote(f'{page.name}/{name}')}"
        link = f'<a href="{target}" download>{html.escape(file)}</a>'
        folders.setdefault(folder, []).append(link)
    lines = [
        f"<li>{html.escape(folder)}{': ' * bool(folder)}{', '.join(links)}</li>"
        for folder, links in sorted(folders.items())
    ]
    return "\n".join(
        ['<div class="numbers">Numbers behind the figures:', "<ul>", *lines, "</ul></div>"]
    )


def _notebook_link(name: str) -> str:
    return f'<a href="notebooks/{name}.ipynb" download>Download the executed notebook</a>'


def _environment_table(environment: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        rows.append((key, "not known" if value is None else value))
    return pd.DataFrame(rows, columns=["what", "value"])


def _write_source(
    source: Path,
    pages: Sequence[_Page],
    overview: str,
    dataset_title: str,
    runs: pd.DataFrame | None,
) -> None:
    """Lay out what Sphinx reads; `extra/` is copied into the report as it is."""
    for folder in ("static", "extra/notebooks", "extra/pictures", "extra/numbers"):
        (source / folder).mkdir(parents=True)
    shutil.copy(STYLE, source / "static" / "report.css")
    if runs is not None:
        import itables.options

        bundle = Path(itables.options.dt_bundle).read_text(encoding="utf-8")
        script = SORTABLE_SCRIPT % json.dumps(bundle)
        (source / "static" / "sortable.js").write_text(script, encoding="utf-8")
        runs.to_csv(source / "extra" / "numbers" / "runs.csv", index=False)
    contents = "\n".join(["```{toctree}", ":hidden:", *(page.name for page in pages), "```"])
    (source / "index.md").write_text(f"{overview}\n{contents}\n", encoding="utf-8")
    for page in pages:
        nbformat.write(page.notebook, source / "extra" / "notebooks" / f"{page.name}.ipynb")
        nbformat.write(_for_reading(page, pages, dataset_title), source / f"{page.name}.ipynb")
        if page.picture:
            (source / "extra" / "pictures" / f"{page.name}.png").write_bytes(page.picture)
        for name, path in page.numbers.items():
            target = source / "extra" / "numbers" / page.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _for_reading(page: _Page, pages: Sequence[_Page], dataset_title: str) -> NotebookNode:
    """The notebook with code folded, figures described and linked to full size, and its data."""
    targets = {f"{other.name}.ipynb" for other in pages}

    def link(match: re.Match) -> str:
        target = match["target"].partition("#")[0]
        return match[0] if target in targets or ":" in target or not target else match["text"]

    notebook = copy.deepcopy(page.notebook)
    heading = page.title
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ +(.+)$", cell.source, flags=re.MULTILINE)
            heading = headings[-1] if headings else heading
            # A link to a file that is not in the report would lead nowhere.
            cell.source = LINK.sub(link, cell.source)
        elif cell.cell_type == "code":
            cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
            # Sphinx links an image to its full size if it has a scale.
            image = {"scale": "100%", "alt": f"Figure: {heading}"}
            cell.metadata.mystnb = {"image": image}
    lines = [f"Data set: {dataset_title} · {_notebook_link(page.name)}"]
    if page.numbers:
        lines.append(_numbers_links(page))
    if page.failure:
        lines = [
            f'<div class="failure">This notebook failed in {html.escape(page.failure)}</div>',
            *lines,
        ]
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("\n\n".join(lines), id="links"))
    return notebook


def _run_sphinx(source: Path, built: Path, title: str, banner: str) -> None:
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    configuration = SPHINX | {
        "project": title,
        "html_title": title,
        "html_static_path": ["static"],
        "html_extra_path": ["extra"],
        "exclude_patterns": ["extra", "static"],
        "html_theme_options": {"announcement": html.escape(banner)},
    }
    # Not as overrides: Sphinx complains of those of a theme, which it loads later.
    lines = [f"{name} = {value!r}\n" for name, value in configuration.items()]
    (source / "conf.py").write_text("".join(lines), encoding="utf-8")
    complaints = io.StringIO()
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(
                srcdir=source,
                confdir=source,
                outdir=built,
                doctreedir=source.parent / "doctrees",
                buildername="html",
                status=None,
                warning=complaints,
                freshenv=True,
            )
            app.connect("html-page-context", _reach_by_keyboard)
            app.build()
    except Exception as error:
        raise ReportError(f"Sphinx failed: {error}\n{complaints.getvalue()}") from error
    if app.statuscode:
        raise ReportError(f"Sphinx failed:\n{complaints.getvalue()}")
    print(complaints.getvalue(), end="", file=sys.stderr)
    # Sphinx needs these for its next run, which here starts from nothing.
    for leftover in (".buildinfo", "objects.inv"):
        (built / leftover).unlink(missing_ok=True)


def _reach_by_keyboard(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    """Let the keyboard scroll what is wider than the page: code, output and tables.

    And let what opens the code be called by what it says, not by another name that nobody sees.
    """
    body = context.get("body", "").replace("<pre>", '<pre tabindex="0">')
    body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    for box in ('<div class="table-wrapper', '<div class="output text_html'):
        body = body.replace(box, f'<div tabindex="0" {box.removeprefix("<div ")}')
    context["body"] = body


def _publish(built: Path, out: Path) -> None:
    """Make `out` hold what `built` holds, and touch neither same files nor files of others."""
    files = sorted(
        path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()
    )
    (built / MANIFEST).write_text(json.dumps(files, indent=0) + "\n", encoding="utf-8")
    manifest = out / MANIFEST
    earlier = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
    for name in [*files, MANIFEST]:
        content, target = (built / name).read_bytes(), out / name
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for name in set(earlier) - set(files):
        (out / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (out / name).parent.rmdir()
