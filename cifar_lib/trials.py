"""One trial where Dask places it: the notebook, run by papermill in a process of its own.

`run` is the task on a worker. It starts `python -m cifar_lib.trials FOLDER`, tells the driver of
each epoch and gives back the run folder's files. The process and its kernel end with the worker,
with the task and at the time limit, whichever is first: nothing trains on unseen.
"""

from __future__ import annotations

import csv
import functools
import getpass
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import psutil

from cifar_lib import ROOT, installed
from cifar_lib.studies import NOTEBOOK, Value

PACKAGES = ("keras", "tensorflow", "jax", "torch", "numpy", "scipy", "papermill", "distributed")
FINISHED, FAILED, ABANDONED, REFUSED = "finished", "failed", "abandoned", "refused"
SECONDS_BETWEEN_LOOKS = 0.1
#: How long the processes of an earlier attempt may take to die.
SECONDS_FOR_ANOTHER = 60
LOG = "log.txt"
LOG_LINES_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker needs to know of a trial.

    Attributes:
        study: the study's identifier, which no other has.
        number: of the trial in its study.
        parameters: of the notebook.
        cores: cores of the machine for it; None: all.
        minutes: its time limit.
        expected: what `describe` gave on the driver's machine.
        topic: of the events that it sends.
    """

    study: str
    number: int
    parameters: Mapping[str, Value]
    cores: int | None
    minutes: float
    expected: Mapping[str, object]
    topic: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a trial.

    Attributes:
        state: `FINISHED`, `FAILED`, `ABANDONED` (nobody waits for it any more) or `REFUSED` (the
            worker is not as it should be).
        error: why, if it is not finished.
        files: the run folder's, by name.
        seconds: wall time.
        host: the machine's name.
    """

    state: str
    error: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    host: str = ""


@dataclass(frozen=True)
class Slot:
    """A part of the machine for one trial at a time: some cores, or a GPU."""

    name: str
    cores: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def slots(cores: int | None) -> list[Slot]:
    """How this machine is divided among trials: by GPU if it has any, else by `cores` each."""
    gpus = _gpus()
    if gpus:
        return [Slot(f"gpu{gpu}", environment={"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus]
    available = sorted(_cores())
    if cores is None or cores >= len(available):
        return [Slot("all")]
    starts = range(0, len(available) - cores + 1, cores)
    return [Slot(f"cores{n}", tuple(available[n : n + cores])) for n in starts]


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(number) for number in range(count)]


@functools.cache
def describe(dataset: str) -> dict[str, str]:
    """What must be the same on every machine for a study's results to be comparable.

    Raises:
        DataError: the data set is not on this machine, or is not what it should be.
    """
    from cifar_lib import data

    found = {"python": platform.python_version()}
    found |= dict.fromkeys(PACKAGES, "not installed") | installed(PACKAGES)
    found["KERAS_BACKEND"] = os.environ.get("KERAS_BACKEND", "tensorflow")
    digest = hashlib.sha256()
    for path in sorted((ROOT / "cifar_lib").glob("*.py")):
        digest.update(path.read_bytes())
    # What a run in JupyterLab has left in the notebook is no code.
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    digest.update(json.dumps(["".join(cell["source"]) for cell in cells]).encode())
    found["code of cifar_lib and 04_train"] = digest.hexdigest()[:12]
    digests = data.load(dataset, download=False).digests
    return found | {f"data {name}": digest[:12] for name, digest in digests.items()}


def look(dataset: str, cores: int | None) -> tuple[dict[str, str], str, int]:
    """What a driver asks of a worker: `describe`, the machine's name and its number of `slots`."""
    return describe(dataset), socket.gethostname(), len(slots(cores))


def leave_ctrl_c() -> None:
    """Leave Ctrl-C, which a terminal sends to every process, to the driver, which ends the rest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def differences(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    """What is not as expected, in words; empty if all is."""
    return "; ".join(
        f"{name} is {found.get(name)} there and {value} here"
        for name, value in expected.items()
        if found.get(name) != value
    )


def scratch(study: str, number: int) -> Path:
    """Where a trial works on its machine: the same place for its next attempt, which resumes."""
    return Path(tempfile.gettempdir(), f"cifar_lib-{getpass.getuser()}", study, f"{number:04d}")


def _make_scratch() -> None:
    """Make the folder of all studies on this machine, which nobody else may look into or exchange.

    Raises:
        PermissionError: another user made it.
    """
    folder = scratch("", 0).parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
        raise PermissionError(f"{folder} belongs to another user: set TMPDIR to a folder of yours.")


def stop(study: str, number: int) -> None:
    """Let a trial on this machine end after its current epoch."""
    run = scratch(study, number) / "run"
    if run.is_dir():
        (run / "stop").touch()


def clear(study: str) -> None:
    """Remove what a study's trials have left on this machine."""
    shutil.rmtree(scratch(study, 0).parent, ignore_errors=True)


def run(order: Order) -> Outcome:
    """Do one trial; a task of Dask.

    Returns:
        what became of it; a trial that fails is an outcome, too, and raises nothing.
    """
    from distributed import get_worker

    host, worker = socket.gethostname(), get_worker()
    different = differences(describe(order.expected["dataset"]), order.expected["machine"])
    if different:
        return Outcome(state=REFUSED, error=different, host=host)
    key = worker.get_current_task()

    def wanted() -> bool:
        task = worker.state.tasks.get(key)
        return task is not None and task.state not in ("cancelled", "released", "forgotten")

    def tell(**event: object) -> None:
        worker.log_event(order.topic, {"trial": order.number, "worker": worker.address} | event)

    _make_scratch()
    folder = scratch(order.study, order.number)
    # All of it in the slot: an earlier attempt of a lost scheduler may end here at this moment, and
    # remove its folder.
    with _slot(order, wanted) as slot:
        if slot is None:
            return Outcome(state=ABANDONED, host=host)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        tell(what="started", host=host)
        error = _watch(order, folder, slot, wanted, tell)
        if error == ABANDONED:
            return Outcome(state=ABANDONED, host=host)
        files = {path.name: path.read_bytes() for path in _results(folder)}
        shutil.rmtree(folder, ignore_errors=True)
    state = FAILED if error else FINISHED
    seconds = time.monotonic() - began
    return Outcome(state=state, error=error, files=files, seconds=seconds, host=host)


@contextmanager
def _slot(order: Order, wanted) -> Iterator[Slot | None]:
    """Wait for a free part of the machine; None if the trial is no longer wanted."""
    places = scratch(order.study, 0).with_name("slots")
    places.mkdir(parents=True, exist_ok=True)
    while wanted():
        for slot in slots(order.cores):
            lock = filelock.FileLock(places / slot.name)
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                continue
            try:
                yield slot
            finally:
                lock.release()
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)
    yield None


def _watch(order: Order, folder: Path, slot: Slot, wanted, tell) -> str:
    """Run the notebook's process to its end; what was wrong, or nothing, or `ABANDONED`."""
    places = {"runs_dir": str(folder), "run_name": "run", "output_dir": str(folder / "figures")}
    content = {"parameters": {**order.parameters, **places}, "cores": slot.cores}
    (folder / "trial.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "error.txt").unlink(missing_ok=True)
    deadline = time.monotonic() + order.minutes * 60
    epochs_told = 0
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar_lib.trials", str(folder)],
            cwd=ROOT,
            env=os.environ | dict(slot.environment),
            stdin=subprocess.PIPE,  # its end tells the process that the worker is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                try:
                    code = process.wait(SECONDS_BETWEEN_LOOKS)
                except subprocess.TimeoutExpired:
                    code = None
                rows = _history(folder / "run" / "history.csv")
                for row in rows[epochs_told:]:
                    tell(what="epoch", row=row)
                epochs_told = max(epochs_told, len(rows))
                if code is not None:
                    break
                if not wanted():
                    return ABANDONED
                if time.monotonic() > deadline:
                    return (
                        f"Stopped at the time limit of {order.minutes:g} minutes, after epoch "
                        f"{epochs_told}. Raise trial_minutes in the study if it needs longer."
                    )
        finally:
            _kill(process.pid)
            process.wait()
            process.stdin.close()
    if (folder / "error.txt").exists():
        return (folder / "error.txt").read_text(encoding="utf-8")
    if code:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"The process ended with code {code}:", *lines[-LOG_LINES_SHOWN:]])
    return ""


def _history(path: Path) -> list[dict[str, float]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            # pandas writes NaN as nothing.
            return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def _results(folder: Path) -> Iterator[Path]:
    for path in [*(folder / "run").glob("*"), folder / LOG]:
        if path.is_file() and not path.name.startswith(".") and path.name != "checkpoint.npz":
            yield path


def _kill(pid: int) -> None:
    """Kill a process and all that it started; the kernel has a session of its own."""
    try:
        process = psutil.Process(pid)
        processes = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _main(folder: Path) -> int:
    """The process of a trial: run the notebook as `trial.json` says."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    content = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    if content["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, content["cores"])
    from cifar_lib import reports

    # The kernel of an attempt whose worker was killed may have a moment to live.
    with filelock.FileLock(folder / ".lock", timeout=SECONDS_FOR_ANOTHER):
        try:
            reports.execute(
                NOTEBOOK, folder / "run" / "notebook.ipynb", content["parameters"], echo=True
            )
        except reports.NotebookError as error:
            message = str(error).partition("\n")[0].replace(f"{ROOT}/", "")
            (folder / "error.txt").write_text(message, encoding="utf-8")
            return 1
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
