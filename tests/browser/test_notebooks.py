"""Every notebook in JupyterLab, as a person uses it: opened, run, operated, saved."""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import nbformat
import pytest
from conftest import PATIENCE, JupyterLab
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from cifar_lib import ROOT

STUDIES = ROOT / "results" / "studies"
# All code cells have run, or one has failed.
ENDED = r"""() => {
    const cells = [...document.querySelectorAll(".jp-Notebook .jp-CodeCell")];
    const prompts = cells.map(cell => cell.querySelector(".jp-InputPrompt")?.textContent.trim());
    const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
    return failed || prompts.every(prompt => /^\[\d+\]:$/.test(prompt));
}"""
BYTES = """async image => {
    const response = await fetch(image.src);
    return Array.from(new Uint8Array(await response.arrayBuffer()));
}"""


class Notebook:
    """A notebook that is open in JupyterLab."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page, self.path = page, path

    def choose(self, menu: str, command: str) -> None:
        """Choose a command from a menu of JupyterLab."""
        self.page.locator(".lm-MenuBar-itemLabel").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu-itemLabel").get_by_text(command, exact=True).click()

    def wait_until_idle(self) -> None:
        indicator = self.page.locator(".jp-Notebook-ExecutionIndicator")
        expect(indicator).to_have_attribute("data-status", "idle")

    def save(self) -> nbformat.NotebookNode:
        """Save it, and read what was saved."""
        with self.page.expect_response(
            lambda answer: answer.request.method == "PUT" and "/api/contents/" in answer.url
        ):
            self.choose("File", "Save Notebook")
        return nbformat.read(self.path, as_version=4)

    def photograph(self, path: Path) -> None:
        """Keep a picture of all of it."""
        scrolled = self.page.locator(".jp-WindowedPanel-outer")
        usual = self.page.viewport_size
        height = scrolled.evaluate("it => it.scrollHeight") + 200
        self.page.set_viewport_size(usual | {"height": min(height, 16_000)})  # Chromium's limit
        scrolled.evaluate("it => it.scrollTo(0, 0)")
        self.page.screenshot(path=path)
        self.page.set_viewport_size(usual)

    def control(self, kind: str, description: str) -> Locator:
        """A widget by its kind and the text beside it."""
        label = self.page.locator(".widget-label").get_by_text(description, exact=True)
        return self.page.locator(f".widget-{kind}").filter(has=label)

    @contextmanager
    def another_picture(self, within: Locator | None = None) -> Iterator[None]:
        """Whether what is done meanwhile gives an explorer's picture other bytes."""
        picture = (within or self.page).locator("img.widget-image").last
        source, before = picture.get_attribute("src"), picture.evaluate(BYTES)
        yield
        expect(picture).not_to_have_attribute("src", source)
        assert picture.evaluate(BYTES) != before


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """What all notebooks are opened in: JupyterLab's scripts are fetched and compiled once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(1000 * PATIENCE)
    yield context
    context.close()


@pytest.fixture(scope="module")
def open_notebook(
    context: BrowserContext, jupyterlab: JupyterLab, artefacts: Path
) -> Callable[..., AbstractContextManager[Notebook]]:
    """Opens a copy of a notebook with other values of its parameters; `name` is the copy's."""

    @contextmanager
    def opened(stem: str, name: str = "", **parameters: object) -> Iterator[Notebook]:
        path = jupyterlab.folder / "notebooks" / f"{name or stem}.ipynb"
        notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        places = ("runs_dir", "output_dir", "tables_dir", "weights_dir")
        given = {place: str(jupyterlab.folder / place) for place in places} | parameters
        for parameter, value in given.items():
            line = re.compile(rf"^({parameter}: \w+ = ).+?(  # )", re.MULTILINE)
            cell.source = line.sub(rf"\g<1>{value!r}\g<2>", cell.source)
        nbformat.write(notebook, path)
        page = context.new_page()
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: message.type == "error" and complaints.append(message.text),
        )
        api = f"{jupyterlab.address}/api/sessions"
        headers = {"Authorization": f"token {jupyterlab.token}"}

        def sessions() -> list[dict]:
            return context.request.get(api, headers=headers).json()

        # In a workspace of its own, in which nothing is open yet.
        where = f"{jupyterlab.address}/lab/workspaces/{path.stem}/tree/notebooks/{path.name}"
        page.goto(f"{where}?token={jupyterlab.token}")
        opened = Notebook(page, path)
        try:
            # The kernel may be idle before the cells are there, and is shown to be before the page
            # has reached it; what it is told to run then is lost.
            expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(notebook.cells))
            deadline = time.monotonic() + PATIENCE
            while not any(session["kernel"]["connections"] for session in sessions()):
                assert time.monotonic() < deadline, "the page does not reach its kernel"
                page.wait_for_timeout(100)
            opened.wait_until_idle()
            yield opened
            assert not complaints
        except BaseException:
            page.screenshot(path=artefacts / f"{path.stem}-failed.jpg")
            raise
        finally:
            for session in sessions():
                context.request.delete(f"{api}/{session['id']}", headers=headers)
            page.close()

    return opened


@pytest.fixture(scope="module")
def run_notebook(
    open_notebook: Callable[..., AbstractContextManager[Notebook]],
    jupyterlab: JupyterLab,
    artefacts: Path,
) -> Callable[..., AbstractContextManager[Notebook]]:
    """Opens a copy of a notebook, runs all of it, saves it, and looks for faults."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=jupyterlab.folder, check=True, capture_output=True, text=True
        ).stdout

    @contextmanager
    def ran(stem: str, **parameters: object) -> Iterator[Notebook]:
        with open_notebook(stem, **parameters) as notebook:
            git("add", "notebooks")
            notebook.choose("Run", "Run All Cells")
            notebook.page.wait_for_function(ENDED)
            notebook.wait_until_idle()
            saved = notebook.save()
            notebook.photograph(artefacts / f"{stem}.jpg")
            code = [cell for cell in saved.cells if cell.cell_type == "code"]
            outputs = [output for cell in code for output in cell.outputs]
            assert not [output for output in outputs if output.output_type == "error"]
            assert not [output.text for output in outputs if output.get("name") == "stderr"]
            assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
            assert outputs, "nothing was shown"
            assert not git("diff"), "what Jupyter saved differs for git"
            yield notebook

    return ran


@pytest.fixture(scope="module")
def trained(run_notebook: Callable[..., AbstractContextManager[Notebook]]) -> None:
    """A run of the stand-in, trained by `04_train`."""
    small = {"train_size": 100, "validation_size": 100, "test_size": 100, "epochs": 2}
    with run_notebook("04_train", recipe="quick", dataset="synthetic", **small):
        pass


def test_01_dataset(run_notebook):
    with run_notebook("01_dataset", dataset="synthetic") as notebook:
        choices = notebook.control("dropdown", "class").locator("select")
        label = choices.locator("option").last.inner_text()
        with notebook.another_picture():
            choices.select_option(label=label)
        expect(notebook.page.get_by_text(f"Training images of {label}:")).to_be_visible()


def test_02_augmentation(run_notebook):
    with run_notebook("02_augmentation", dataset="synthetic") as notebook:
        with notebook.another_picture():
            notebook.control("slider", "rotation_range").get_by_role("slider").press("PageUp")
        expect(notebook.page.get_by_text(re.compile(r"rotation_range=[1-9]"))).to_be_visible()
        with notebook.another_picture():
            notebook.control("dropdown", "policy").locator("select").select_option("rand_augment")
        expect(notebook.page.get_by_text('of policy "rand_augment"')).to_be_visible()


def test_03_network(run_notebook):
    with run_notebook("03_network", dataset="synthetic", test_size=100):
        pass


def test_04_train(trained):
    pass


def test_04_train_is_stopped_and_continued(open_notebook):
    # Of more epochs than pass before a click, on any machine: what continues them is stopped, too.
    long = {"train_size": 128, "test_size": 100, "epochs": 10_000}
    chosen = {"recipe": "quick", "dataset": "synthetic", "protocol": "final", **long}
    with open_notebook("04_train", "stopped", **chosen, run_name="stopped") as notebook:
        notebook.choose("Run", "Run All Cells")
        notebook.page.get_by_role("button", name="Stop after this epoch").click()
        stopped = notebook.page.get_by_text("Run this cell again to continue.")
        expect(stopped.first).to_contain_text(re.compile(r"Stopped after epoch \d+ of 10000\."))
        notebook.wait_until_idle()
        run = notebook.path.parent.parent / "runs_dir" / "stopped"
        history = run / "history.csv"
        before = history.read_text()
        assert 1 <= len(before.splitlines()) - 1 < long["epochs"]
        (run / "stop").touch()
        training = notebook.page.locator(".jp-CodeCell").filter(has=stopped)
        training.locator(".jp-InputPrompt").click()
        notebook.choose("Run", "Run Selected Cell and All Below")
        expect(stopped).to_have_count(0)
        notebook.page.wait_for_function(ENDED)
        notebook.wait_until_idle()
        after = history.read_text()
        assert after.startswith(before)
        assert len(after.splitlines()) == len(before.splitlines()) + 1
        assert not (run / "stop").exists() and (run / "metrics.json").exists()


def test_05_results(run_notebook, trained):
    with run_notebook("05_results") as notebook:
        runs = notebook.control("select-multiple", "runs").locator("select")
        runs.select_option([])
        expect(notebook.page.get_by_text("No run is chosen.")).to_be_visible()
        runs.select_option(index=0)
        expect(notebook.page.get_by_text(re.compile("^The run quick-"))).to_be_visible()
        expect(notebook.page.locator("table.dataTable")).to_contain_text("validation accuracy")
        panel = notebook.page.locator(".jp-OutputArea-output").filter(
            has=notebook.page.locator(".widget-gridbox")
        )
        cell = panel.locator(".widget-gridbox button:not([disabled])").last
        pair, _, count = cell.get_attribute("title").partition(": ")
        with notebook.another_picture(panel):
            cell.click()
        true, predicted = pair.split(" taken for ")
        text = f"Test images of {true} (superclass) taken for {predicted} (superclass)"
        expect(panel.get_by_text(text)).to_contain_text(f": {count};")


def test_06_predictions(run_notebook, trained, tmp_path):
    picture, text = tmp_path / "square.png", tmp_path / "notes.txt"
    Image.new("RGB", (64, 48), "red").save(picture)
    text.write_text("This is no picture.")
    with run_notebook("06_predictions") as notebook:
        button = notebook.page.get_by_role("button", name="Your picture")
        panel = notebook.page.locator(".jp-OutputArea-output").filter(has=button)

        def upload(path: Path) -> None:
            with notebook.page.expect_file_chooser() as chooser:
                button.click()
            chooser.value.set_files(path)

        with notebook.another_picture(panel):
            upload(picture)
        expect(panel).to_contain_text(f"{picture.name}: ")
        upload(text)
        expect(panel).to_contain_text(text.name)


def test_07_calibration(run_notebook):
    with run_notebook("07_calibration", studies_dir=str(STUDIES)):
        pass


def test_08_beyond(run_notebook, trained):
    with run_notebook("08_beyond"):
        pass
