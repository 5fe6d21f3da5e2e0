"""What the tests in a browser share: a Chromium, a JupyterLab, and a place for what they leave.

`make test-browser` runs notebooks and pages side by side, each with a Chromium of its own;
screenshots and the server's log stay in `runs/browser/`.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from cifar_lib import ROOT

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    *(["--no-sandbox"] if IS_ROOT else []),  # the sandbox refuses root, and so does Jupyter
)
# A slow machine is no fault: what does not come after this long will not come.
PATIENCE = 180
expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="module")
def artefacts(request: pytest.FixtureRequest) -> Path:
    """A module's folder for screenshots and the server's log, empty at first."""
    folder = ROOT / "runs" / "browser" / request.path.stem.removeprefix("test_")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it; the tests are skipped where there is none."""
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUM)} is on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def small_report(
    browser: Browser, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Future]:
    """Becomes the index of a report on two runs of the stand-in, made by the command line.

    It is made while the report that is committed is looked at.
    """
    folder = tmp_path_factory.mktemp("small-report")
    runs, out = folder / "runs", folder / "report"

    def make() -> Path:
        small = ["--train-size=100", "--validation-size=100", "--test-size=100", "--epochs=1"]
        train = ["train", "quick", "--dataset=synthetic", *small, f"--runs-dir={runs}"]
        report = ["report", f"--runs-dir={runs}", f"--out={out}"]
        for command in ([*train, "--seed=0"], [*train, "--seed=1"], report):
            done = subprocess.run(
                [sys.executable, "-m", "cifar_lib", *command], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout + done.stderr
        return out / "index.html"

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(make)


@dataclass(frozen=True)
class JupyterLab:
    """A running server, which shows `folder`: a git repository after `make filter`."""

    address: str
    token: str
    folder: Path


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository for copies of the notebooks: none of ours is changed by what the tests do."""
    for program in ("git", "make"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "notebooks").mkdir()
    for name in ("Makefile", "notebooks/.gitattributes"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    made = [f"VENV={sys.prefix}", f"--assume-old={sys.prefix}/.ready"]
    subprocess.run(["make", "filter", *made], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def jupyterlab(
    workplace: Path, artefacts: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[JupyterLab]:
    """A JupyterLab with settings and a port of its own."""
    own = tmp_path_factory.mktemp("jupyter")
    token = secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    environment = os.environ | {name: str(own / folder) for name, folder in places.items()}
    environment["JUPYTER_TOKEN"] = token
    for extension, setting, value in (
        # Else JupyterLab asks whether it may fetch news, in front of what is tested.
        ("apputils-extension", "notification", {"fetchNews": "false"}),
        # Else cells that are scrolled away are not laid out, and count as hidden.
        ("notebook-extension", "tracker", {"windowingMode": "none"}),
    ):
        settings = own / "settings" / "@jupyterlab" / extension
        settings.mkdir(parents=True)
        (settings / f"{setting}.jupyterlab-settings").write_text(json.dumps(value))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        *(["--allow-root"] if IS_ROOT else []),
    ]
    command += [f"--ServerApp.root_dir={workplace}", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    server = subprocess.Popen(
        command,
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    started = threading.Event()

    def keep_log() -> None:
        with (artefacts / "jupyterlab.log").open("w") as log:
            for line in server.stdout:
                log.write(line.replace(token, "..."))
                log.flush()
                if address in line:
                    started.set()

    keeper = threading.Thread(target=keep_log)
    keeper.start()
    try:
        assert started.wait(PATIENCE), f"JupyterLab did not start: {artefacts / 'jupyterlab.log'}"
        yield JupyterLab(address, token, workplace)
    finally:
        server.terminate()  # it shuts its kernels down
        server.wait(PATIENCE)
        keeper.join()
