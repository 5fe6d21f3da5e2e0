"""Sweeps: whatever dies, fills up, hangs or is started twice, the study ends as if undisturbed.

Scheduler, workers and drivers are processes of their own. The scenarios with real trainings run in
threads, while what needs no training is tested with trials that are made up.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import psutil
import pytest

from cifar_lib import ROOT, reports, runs, sweeps

#: Only ever waited for in full when something is wrong.
DEADLINE = 1800
#: What a person who looks at the sweep is promised.
SECONDS_UNTIL_GONE = 10
MARK = "CIFAR_LIB_TEST_PLACE"
TRIAL = """\
recipe: fast
cores_per_trial: 1
choices: {dataset: synthetic, classes: [wide_level_stripes_red_cyan, narrow_rings_red_cyan],
  protocol: holdout, train_size: 20, validation_size: 10, batch_size: 10, epochs: 4,
  image_sizes: [12], augmentation: none, model: airbench, optimizer: sgd, precision: float32}
"""
STUDIES = {
    "grid": TRIAL + "parameters: {learning_rate: [0.0001, 0.001, 0.003]}\n",
    "random": TRIAL.replace("protocol: holdout", "protocol: deck, test_size: 10")
    + """\
parameters: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}
search: random
trials: 2
repeat_best: {points: 1, seeds: 2}
""",
    "failing": TRIAL + "variants: {broken: {learning_rate: 1e30}, whole: {}}\n",
    "hanging": TRIAL.replace("epochs: 4", "epochs: 100_000")
    + "parameters: {learning_rate: [0.001]}\ntrial_minutes: 0.05\n",
    # No accuracy is above 1, so its trial is losing.
    "losing": TRIAL.replace("epochs: 4", "epochs: 1000")
    + "parameters: {learning_rate: [0.001]}\npruner: {threshold: {lower: 2.0}}\n",
}
#: What the time, the machine and the way there may change.
OF_THE_MOMENT = ["train_seconds", "seconds", "worker", "started", "ended", "attempts"]


def eventually(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def read_page(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as page:
        return page.read()


@dataclass
class Driver:
    """A process that drives a sweep, and what it prints."""

    process: subprocess.Popen
    log: Path

    def text(self) -> str:
        return self.log.read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds, which must be before the driver ends."""

        def holds() -> bool:
            ended = self.process.poll() is not None
            if condition():
                return True
            assert not ended, f"{what}: it ended before, with {self.process.returncode}:\n" + (
                self.text()
            )
            return False

        eventually(holds, what)

    def says(self, words: str) -> None:
        self.until(lambda: words in self.text(), f"it says {words!r}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ends(self, code: int) -> str:
        """Wait for its end; what it printed."""
        self.process.wait(DEADLINE)
        assert self.process.returncode == code, self.text()
        return self.text()


@dataclass
class Place:
    """A folder with studies, and the processes that belong to it."""

    folder: Path
    studies: Mapping[str, str] = field(default_factory=lambda: STUDIES)
    address: str = ""
    drivers: list[Driver] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.studies_dir = self.folder / "studies"
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True)
        for name, text in self.studies.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    def start(self, *arguments: object, **settings: object) -> Driver:
        log = self.folder / f"{len(self.drivers)}.log"
        changes = settings.pop("environment", {})
        mine = {"TMPDIR": str(self.temporary), MARK: str(self.folder)}
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                **{"stdout": output, "stderr": subprocess.STDOUT} | settings,
                cwd=ROOT,
                env=os.environ | mine | changes,
            )
        self.drivers.append(Driver(process, log))
        return self.drivers[-1]

    def scheduler(self) -> Driver:
        """Start a scheduler, whose address is this place's from now on."""
        file = self.folder / f"scheduler-{len(self.drivers)}.json"
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", file]
        process = self.start("-m", "distributed.cli.dask_scheduler", *options)
        process.until(file.exists, "the scheduler starts")

        def known() -> bool:
            with contextlib.suppress(ValueError):  # half written
                self.address = json.loads(file.read_text())["address"]
                return True
            return False

        eventually(known, "the scheduler's address")
        return process

    def worker(self, *options: str, threads: int = 1, **settings: object) -> Driver:
        usual = ["--host", "127.0.0.1", "--nthreads", threads, "--no-dashboard"]
        usual += ["--memory-limit", "0", "--local-directory", self.temporary]
        return self.start(
            "-m", "distributed.cli.dask_worker", self.address, *usual, *options, **settings
        )

    def sweep(
        self,
        *names: str,
        options: Sequence[str] = (),
        script: Sequence[object] = ("-m", "cifar_lib"),
        **settings: object,
    ) -> Driver:
        """Start a driver of real trials."""
        place = ["--studies-dir", self.studies_dir]
        if self.address:
            place += ["--scheduler", self.address]
        files = [self.folder / f"{name}.yaml" for name in names]
        return self.start(*script, "sweep", *files, *place, *options, **settings)

    def make_up(self, *names: str, limit: int = 0, lease: float = 30, **settings: object) -> Driver:
        """Start a driver of made-up trials, which last as long as the study is on `hold`."""
        hold = self.folder / f"hold-{names[0]}"
        return self.sweep(*names, script=["-c", MADE_UP, hold, limit, lease], **settings)

    def hold(self, name: str, on: bool) -> None:
        """Let made-up trials of a study wait, or end."""
        file = self.folder / f"hold-{name}"
        if on:
            file.touch()
        else:
            file.unlink(missing_ok=True)

    def finished(self, name: str) -> list[Path]:
        """The folders of the trials that have ended."""
        files = (self.studies_dir / name / "trials").glob("[0-9]*/trial.json")
        return sorted(file.parent for file in files)

    def half_done(self, name: str, trial: str = "*") -> bool:
        """Whether a trial has trained an epoch and not all of them."""
        user, study = "cifar_lib-*", f"{name}-*"
        for history in self.temporary.glob(f"{user}/{study}/{trial}/run/history.csv"):
            with contextlib.suppress(FileNotFoundError):
                lines = history.read_text().count("\n")
                if lines > 1 and not history.with_name("metrics.json").exists():
                    return True
        return False

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.studies_dir / name / "trials.csv")

    def processes(self, words: str = "") -> list[psutil.Process]:
        """The living processes of this place whose command line has these words."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) != str(self.folder):
                    continue
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and words in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def is_quiet(self) -> None:
        """Wait until no kernel of a trial is left."""
        eventually(lambda: not self.processes("ipykernel"), "nothing trains unseen", 120)

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        # A killed nanny's worker, and a killed worker's trial, end by themselves, but later.
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=10)


MADE_UP = """
import functools, json, resource, sys, time
from pathlib import Path
from cifar_lib import sweeps, trials
from cifar_lib.__main__ import main

HOLD, LIMIT, LEASE = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

def task(order):
    from distributed import get_worker

    def tell(**event):
        event |= {"trial": order.number, "worker": get_worker().address}
        get_worker().log_event(order.topic, event)

    tell(what="started", host="nowhere")
    rate = order.parameters["learning_rate"]
    accuracy = 1 / (1 + 1000 * abs(rate - 0.003))
    times = {"learning_rate": rate, "train_seconds": 0.1, "validation_seconds": 0.1}
    losses = {"accuracy": accuracy, "loss": 1.0, "val_accuracy": accuracy, "val_loss": 1.0}
    tell(what="epoch", row={"epoch": 1, **losses, **times})
    began = time.monotonic()
    while HOLD.exists() or time.monotonic() < began + 0.1:
        time.sleep(0.01)
    metrics = {"stopped": None, "train_images": 200}
    metrics["validation"] = {"accuracy": accuracy, "loss": 1.0}
    files = {
        "metrics.json": json.dumps(metrics).encode(),
        "environment.json": b'{"precision": "float32"}',
        "weights.npz": bytes(1000 * order.parameters.get("epochs", 1)),
    }
    return trials.Outcome(state=trials.FINISHED, files=files, seconds=0.1, host="nowhere")

if LIMIT:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
sweeps.run = functools.partial(sweeps.run, task=task, lease_seconds=LEASE)
sys.exit(main(sys.argv[4:]))
"""


def stamps(folders: list[Path]) -> dict[Path, int]:
    """When each file in these folders was last written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}


def written(folder: Path) -> dict[Path, int]:
    """When each file of a study was last written; locks are no such files."""
    visible = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path: path.stat().st_mtime_ns for path in visible}


def assert_untouched(before: dict[Path, int]) -> None:
    # The weights of a trial are kept for as long as it is the best.
    now = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    gone = before.keys() - now.keys()
    assert {path.name for path in gone} <= {"weights.npz"}
    for path, stamp in now.items():
        assert path.is_dir() or stamp == before[path], path


# Scenarios with real trainings. Each ends with the whole sweep done.


def undisturbed(place: Place) -> str:
    place.scheduler()
    place.worker("--no-nanny")
    place.worker("--no-nanny")
    text = place.sweep(*STUDIES).ends(0)
    place.is_quiet()
    return text


def worker_killed(place: Place) -> str:
    """Kill a worker, and the nanny that would start it again, in mid-trial."""
    place.scheduler()
    watched = place.worker("--nanny")
    place.worker("--no-nanny")
    driver = place.sweep("grid")
    processes: list[psutil.Process] = []

    def trains() -> bool:
        processes[:] = psutil.Process(watched.process.pid).children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "cifar_lib.trials" in command:
                    return place.half_done("grid", Path(command[-1]).name)
        return False

    driver.until(trains, "the worker's trial is half done")
    watched.kill()
    for process in processes:
        # Its trial and the trial's kernel are left to notice by themselves.
        with contextlib.suppress(psutil.Error):
            if "cifar_lib.trials" not in process.cmdline() and "ipykernel" not in str(
                process.cmdline()
            ):
                process.kill()
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive, "nothing of the killed worker trains on"
    return driver.ends(0)


def driver_killed(place: Place) -> dict[Path, int]:
    """Kill the driver twice in mid-trial: once in a grid, once when it repeats the best."""
    place.scheduler()
    place.worker("--no-nanny")
    place.worker("--no-nanny")
    driver = place.sweep("grid", "random")
    driver.until(
        lambda: place.finished("grid") and place.half_done("grid"), "a trial is done, one half done"
    )
    driver.kill()
    place.is_quiet()
    kept = stamps(place.finished("grid"))
    assert len(kept) >= 3
    driver = place.sweep("grid", "random")
    driver.until(lambda: place.half_done("random", "0002"), "the best point is repeated")
    driver.kill()
    place.is_quiet()
    assert len(place.finished("random")) == 2
    kept |= stamps(place.finished("random"))
    place.sweep("grid", "random").ends(0)
    place.is_quiet()
    return kept


def scheduler_killed(place: Place) -> list[float]:
    """Stop the scheduler in mid-trial, kill the next one; how long the driver takes to say so."""
    waited = []
    kept: dict[Path, int] = {}
    for number in (signal.SIGSTOP, signal.SIGKILL):
        scheduler = place.scheduler()
        place.worker("--no-nanny")
        driver = place.sweep("grid")
        done = len(place.finished("grid"))
        driver.until(
            lambda done=done: len(place.finished("grid")) > done and place.half_done("grid"),
            "one more is done, and one half done",
        )
        scheduler.process.send_signal(number)
        began = time.monotonic()
        driver.says("is gone")
        waited.append(time.monotonic() - began)
        text = driver.ends(1)
        assert f"The scheduler at {place.address} is gone" in text
        assert "give the same command to continue" in text and "Traceback" not in text
        assert set(place.table("grid")["state"]) == {"complete", "running"} | (
            {"waiting"} if number == signal.SIGSTOP else set()
        )
        assert_untouched(kept)
        kept = stamps(place.finished("grid"))
        scheduler.kill()
        place.is_quiet()
    place.scheduler()
    place.worker("--no-nanny")
    place.sweep("grid").ends(0)
    assert_untouched(kept)
    return waited


def interrupted(place: Place) -> list[str]:
    """Press Ctrl-C in mid-trial on a cluster of this machine, and give the same command again."""
    driver = place.sweep("grid", start_new_session=True)
    driver.says("/status\n")
    [address] = re.findall(
        r"grid: Dask's dashboard is at (http://127\.0\.0\.1:\d+/status)", driver.text()
    )
    assert b"Dask" in read_page(address)
    driver.until(lambda: place.half_done("grid"), "a trial is half done")
    os.killpg(driver.process.pid, signal.SIGINT)
    printed = [driver.ends(130)]
    eventually(lambda: not place.processes(), "no process is left", 120)
    printed.append(place.sweep("grid").ends(0))
    eventually(lambda: not place.processes(), "no process is left", 120)
    return printed


SCENARIOS = (undisturbed, driver_killed, scheduler_killed, worker_killed, interrupted)


@dataclass(frozen=True)
class Scenario:
    place: Place
    future: Future

    def result(self) -> object:
        return self.future.result()


@pytest.fixture(scope="module")
def scenarios(synthetic, tmp_path_factory) -> Iterator[dict[str, Scenario]]:
    folder = tmp_path_factory.mktemp("sweeps")

    def play(scenario: Callable[[Place], object], place: Place) -> object:
        try:
            return scenario(place)
        finally:
            place.close()

    with ThreadPoolExecutor(3) as pool:
        started = {}
        for scenario in SCENARIOS:
            place = Place(folder / scenario.__name__)
            started[scenario.__name__] = Scenario(place, pool.submit(play, scenario, place))
        yield started
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def made_up(synthetic, tmp_path_factory) -> Iterator[Place]:
    """A place with workers for made-up trials."""
    place = Place(tmp_path_factory.mktemp("made_up"), {})
    try:
        place.scheduler()
        place.worker("--no-nanny", threads=4)
        place.worker("--no-nanny", threads=4)
        yield place
    finally:
        place.close()


TPE = """\
recipe: seed
cores_per_trial: 1
choices: {dataset: synthetic, train_size: 200, validation_size: 100}
parameters: {learning_rate: {low: 1e-4, high: 1e-2, log: true}}
search: {tpe: {n_startup_trials: 3}}
trials: 12
"""
MADE_UP_GRID = """\
recipe: seed
cores_per_trial: 1
choices: {dataset: synthetic, train_size: 200, validation_size: 100}
parameters: {learning_rate: [0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008]}
"""


# `scenarios` is asked for here so that they run beside the tests that do not look at them.
def test_a_search_has_as_many_trials_as_asked_for_however_often_it_is_killed(scenarios, made_up):
    made_up.write("tpe", TPE)
    seed = random.SystemRandom().randrange(2**32)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    for enough in (2, 5, 8):
        driver = made_up.make_up("tpe")
        driver.until(lambda enough=enough: len(made_up.finished("tpe")) >= enough, "some are done")
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.process.wait(timeout=moments.uniform(0, 0.2))
        driver.kill()
        kept = stamps(made_up.finished("tpe"))
    made_up.make_up("tpe").ends(0)
    assert_untouched(kept)
    table = made_up.table("tpe")
    assert list(table["trial"]) == list(range(12))
    assert set(table["state"]) == {"complete"}
    assert table["learning_rate"].is_unique, "none is tried twice"
    assert table["learning_rate"].between(1e-4, 1e-2).all()
    assert [folder.name for folder in made_up.finished("tpe")] == [f"{n:04d}" for n in range(12)]

    # More may be asked for later; what is finished is not run again. One that follows it starts
    # where it ended.
    kept = stamps(made_up.finished("tpe"))
    made_up.write("tpe", TPE.replace("trials: 12", "trials: 14"))
    made_up.write("following", TPE.replace("trials: 12", "trials: 1\nfollows: [tpe]"))
    made_up.make_up("tpe", "following").ends(0)
    assert_untouched(kept)
    more = made_up.table("tpe")
    assert list(more["state"]) == ["complete"] * 14
    pd.testing.assert_frame_equal(more[:12], table)
    best = more["learning_rate"][more["val_accuracy"].idxmax()]
    assert list(made_up.table("following")["learning_rate"]) == [best]


# A rate of its own for the filters is Muon's alone; the ends of the range are well with the recipe.
EXCLUSIVE = """\
recipe: seed-onecycle
cores_per_trial: 1
choices: {dataset: synthetic, protocol: holdout, train_size: 200, validation_size: 100}
parameters:
  learning_rate: {low: 1e-4, high: 1e-2, log: true}
  filter_learning_rate: {low: 0.01, high: 0.1}
  optimizer: [muon, sgd]
search: {tpe: {n_startup_trials: 8}}
trials: 8
repeat_best: {points: 1, seeds: 2}
"""


def test_a_search_goes_on_after_impossible_points_and_repeats_the_best(made_up):
    made_up.write("exclusive", EXCLUSIVE)
    made_up.make_up("exclusive").ends(0)
    table = made_up.table("exclusive")
    assert list(table["seed"]) == [0] * 8 + [1]
    impossible = table["optimizer"] == "sgd"
    assert 0 < impossible.sum() < 8
    assert set(table["state"][impossible]) == {"failed"}
    assert table["error"][impossible].str.contains("filter_learning_rate").all()
    assert set(table["state"][~impossible]) == {"complete"}
    best = table["val_accuracy"][:8].idxmax()
    assert table["learning_rate"][8] == table["learning_rate"][best]

    # The folders of the trials may be deleted to save room: what is known of them stays.
    folder = made_up.studies_dir / "exclusive"
    tables = [(folder / name).read_text() for name in sweeps.TABLES]
    shutil.rmtree(folder / "trials")
    printed = made_up.make_up("exclusive").ends(0)
    assert f"{(~impossible).sum()} complete, {impossible.sum()} failed, best val_acc" in printed
    assert [(folder / name).read_text() for name in sweeps.TABLES] == tables


@pytest.mark.parametrize(
    ("limit", "full"),
    [
        pytest.param(8_000, r"journal\.log", id="journal"),
        pytest.param(30_000, r"weights\.npz", id="trial"),
    ],
)
def test_a_full_disk_keeps_what_is_finished(limit, full, made_up):
    """No file may grow above the limit, as if the disk was full."""
    name = f"full{limit}"
    # Made-up weights have a kilobyte an epoch.
    epochs = 1 if limit < 10_000 else 50
    made_up.write(
        name, MADE_UP_GRID.replace("validation_size", f"epochs: {epochs}, validation_size")
    )
    folder = made_up.studies_dir / name
    # Its output is no file, which would be limited, too.
    driver = made_up.make_up(name, limit=limit, stdout=subprocess.PIPE)
    printed = driver.process.communicate()[0].decode()
    assert driver.process.returncode == 1, printed
    assert re.search(rf"RunError: No space for .*{full}.*File too large", printed), printed
    assert "free some space" in printed and "Traceback" not in printed
    journal = (folder / "journal.log").read_bytes()
    assert journal.endswith(b"\n")
    for line in journal.splitlines():
        json.loads(line)
    assert not list(folder.rglob("*.partial*"))
    for trial in folder.glob("trials/*"):
        assert {"trial.json", "metrics.json"} <= {path.name for path in trial.iterdir()}
    if limit < 10_000:
        assert made_up.finished(name), "some trials were done before"
    kept = stamps(made_up.finished(name))

    made_up.make_up(name).ends(0)
    assert_untouched(kept)
    table = made_up.table(name)
    assert list(table["trial"]) == list(range(8))
    assert set(table["state"]) == {"complete"}


def test_a_study_has_one_driver(made_up):
    """The first is refused nothing, the others are, until it has not been heard of."""
    made_up.write("driven", MADE_UP_GRID)
    made_up.hold("driven", True)
    first = made_up.make_up("driven", lease=3)
    first.says("started on")
    who = f"process {first.process.pid} on {socket.gethostname()}"
    for options in ((), ("--take-over",)):
        text = made_up.make_up("driven", options=options, lease=3).ends(1)
        assert f"driven is driven by {who}" in text and "--take-over works" in text

    lease = made_up.studies_dir / "driven" / "lease.json"
    first.process.send_signal(signal.SIGSTOP)
    eventually(lambda: json.loads(lease.read_text())["until"] < time.time(), "the lease runs out")
    text = made_up.make_up("driven", lease=3).ends(1)
    assert f"driven was driven by {who}, which has not been heard of" in text
    assert "If it is gone, add --take-over" in text
    made_up.hold("driven", False)
    made_up.make_up("driven", options=["--take-over"], lease=3).ends(0)

    before = written(made_up.studies_dir / "driven")
    first.process.send_signal(signal.SIGCONT)
    text = first.ends(1)
    assert "has lost its lease of driven, which is now driven by nobody" in text
    assert "Traceback" not in text
    assert written(made_up.studies_dir / "driven") == before, "it writes nothing more"
    table = made_up.table("driven")
    assert list(table["trial"]) == list(range(8))
    assert set(table["state"]) == {"complete"}


def test_workers_that_differ_are_refused(tmp_path, synthetic):
    place = Place(tmp_path, {"grid": MADE_UP_GRID})
    try:
        place.scheduler()
        other = place.worker("--no-nanny", environment={"KERAS_BACKEND": "jax"})
        other.says("Registered to")
        text = place.sweep("grid").ends(1)
        assert "These workers are not like this machine" in text
        assert "KERAS_BACKEND is jax there and tensorflow here" in text
        assert "python is" not in text, "what is the same is not named"
        assert not place.finished("grid") and "started on" not in text
    finally:
        place.close()


# What the scenarios came to.


def assert_same_table(place: Place, other: Place, name: str) -> None:
    ours, theirs = (place_.table(name).drop(columns=OF_THE_MOMENT) for place_ in (place, other))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_all_trials_of_a_sweep_run_and_a_log_tells_how_far_they_are(scenarios):
    place, text = scenarios["undisturbed"].place, scenarios["undisturbed"].result()
    table = place.table("grid")
    assert list(table["trial"]) == [0, 1, 2]
    assert set(table["state"]) == {"complete"}
    assert list(table["learning_rate"]) == [0.0001, 0.001, 0.003]
    assert list(table["attempts"]) == [1] * 3 and list(table["epochs_run"]) == [4] * 3
    assert table["val_accuracy"].between(0, 1).all() and table["error"].isna().all()
    for number in range(3):
        folder = place.studies_dir / "grid" / "trials" / f"{number:04d}"
        run = runs.load(folder)
        assert run.finished and run.recipe.learning_rate == table["learning_rate"][number]
        assert run.metrics["validation"]["accuracy"] == table["val_accuracy"][number]
        assert (folder.parents[1] / table["notebook"][number]).exists()
        histories = pd.read_csv(place.studies_dir / "grid" / "histories.csv")
        history = histories[histories["trial"] == number]
        assert list(history["val_accuracy"]) == list(run.history["val_accuracy"])
    for number in range(3):
        lines = re.findall(
            rf"trial {number} \(learning rate [\d.e-]+, seed 0\)  epoch (\d)/4  "
            r"val_accuracy 0\.\d{4}  \d+:\d\d left\n",
            text.partition("random: ")[0],
        )
        assert lines == ["1", "2", "3", "4"]
    assert re.search(r"grid: 3 complete, best val_accuracy 0\.\d{4} \(learning rate ", text)
    assert "\r" not in text and "\x1b" not in text


def test_the_best_points_are_repeated_with_other_seeds(scenarios):
    scenarios["undisturbed"].result()
    table = scenarios["undisturbed"].place.table("random")
    assert list(table["seed"]) == [0, 0, 1]
    best = table["val_accuracy"][:2].idxmax()
    assert table["learning_rate"][2] == table["learning_rate"][best]
    assert table["val_loss"].is_unique, "another seed gives another network"


def test_a_trial_that_fails_is_told_with_its_cell_and_the_others_go_on(scenarios):
    place, text = scenarios["undisturbed"].place, scenarios["undisturbed"].result()
    table = place.table("failing")
    assert list(table["state"]) == ["failed", "complete"]
    assert list(table["variant"]) == ["broken", "whole"]
    assert "cell" in table["error"][0] and "TrainingError" in table["error"][0]
    assert "\n" not in table["error"][0] and pd.isna(table["val_accuracy"][0])
    assert (place.studies_dir / "failing" / table["notebook"][0]).exists()
    assert pd.isna(table["error"][1]) and table["val_accuracy"][1] >= 0
    assert f"(variant broken, seed 0) failed: {table['error'][0]}" in text


def test_a_trial_that_hangs_is_stopped_at_its_limit(scenarios):
    scenarios["undisturbed"].result()
    table = scenarios["undisturbed"].place.table("hanging")
    assert list(table["state"]) == ["failed"]
    assert "Stopped at the time limit of 0.05 minutes" in table["error"][0]
    assert "Raise trial_minutes" in table["error"][0]


def test_a_losing_trial_stops_early_and_whole(scenarios):
    place, text = scenarios["undisturbed"].place, scenarios["undisturbed"].result()
    table = place.table("losing")
    assert list(table["state"]) == ["pruned"]
    run = runs.load(place.studies_dir / "losing" / "trials" / "0000")
    epochs = table["epochs_run"][0]
    assert 1 <= epochs < 1000 and len(run.history) == epochs
    assert run.metrics["stopped"] == "stop file"
    assert reports.failure(run.path / "notebook.ipynb") is None
    assert "trial 0 (learning rate 0.001, seed 0) is losing and stops" in text


def test_a_trial_whose_worker_is_killed_runs_again_elsewhere(scenarios):
    place, text = scenarios["worker_killed"].place, scenarios["worker_killed"].result()
    scenarios["undisturbed"].result()
    assert_same_table(place, scenarios["undisturbed"].place, "grid")
    assert sorted(place.table("grid")["attempts"]) == [1, 1, 2]
    assert text.count(", attempt 2") == 1


@pytest.mark.parametrize("name", ["grid", "random"])
def test_a_driver_that_is_killed_goes_on_and_ends_as_if_undisturbed(name, scenarios):
    kept = scenarios["driver_killed"].result()
    assert_untouched(kept)
    scenarios["undisturbed"].result()
    assert_same_table(scenarios["driver_killed"].place, scenarios["undisturbed"].place, name)


def test_a_scheduler_that_is_gone_is_noticed_soon(scenarios):
    waited = scenarios["scheduler_killed"].result()
    assert max(waited) < SECONDS_UNTIL_GONE
    scenarios["undisturbed"].result()
    assert_same_table(scenarios["scheduler_killed"].place, scenarios["undisturbed"].place, "grid")


def test_ctrl_c_ends_all_processes_and_the_same_command_goes_on(scenarios):
    first, second = scenarios["interrupted"].result()
    assert "give the same command to continue" in first and "Traceback" not in first
    assert "3 complete" in second
    scenarios["undisturbed"].result()
    assert_same_table(scenarios["interrupted"].place, scenarios["undisturbed"].place, "grid")


def test_a_finished_study_runs_nothing_and_another_of_its_name_is_refused(scenarios):
    scenarios["undisturbed"].result()
    place = scenarios["undisturbed"].place
    kept = stamps(place.finished("grid"))
    place.address = ""
    try:
        text = place.sweep("grid").ends(0)
        assert "3 complete" in text and "started on" not in text
        place.write("grid", STUDIES["grid"].replace("0.003]", "0.004]"))
        text = place.sweep("grid").ends(1)
        assert f"{place.studies_dir / 'grid'} holds another study of this name" in text
        assert "parameters is {'learning_rate': {'values': [0.0001, 0.001, 0.003]}}" in text
        assert "delete that folder" in text
    finally:
        place.close()
    assert_untouched(kept)


def test_optuna_dashboard_shows_a_study(scenarios):
    scenarios["undisturbed"].result()
    place = scenarios["undisturbed"].place
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    journal = place.studies_dir / "grid" / "journal.log"
    program = Path(sysconfig.get_path("scripts"), "optuna-dashboard")
    shown = place.start(program, journal, "--port", port, "--host", "127.0.0.1")

    def fetch(path: str) -> dict | None:
        with contextlib.suppress(OSError):
            return json.loads(read_page(f"http://127.0.0.1:{port}/api/{path}"))
        return None

    try:
        shown.until(lambda: fetch("studies"), "the dashboard answers")
        [study] = fetch("studies")["study_summaries"]
        assert study["study_name"] == "grid"
        trials = fetch(f"studies/{study['study_id']}")["trials"]
        assert [trial["state"] for trial in trials] == ["Complete"] * 3
    finally:
        place.close()
