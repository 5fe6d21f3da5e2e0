"""Sweeps: which trials (Optuna) and where they run (papermill on Dask).

Only this process, the driver, talks to Optuna. A study lies in one folder:

study.json         what was asked for
journal.log        Optuna's record of the trials
trials/0000/       a run folder for each trial that has ended, and what became of it (trial.json)
trials.csv         one row a trial, for reading
histories.csv      one row an epoch of each trial, for reading
lease.json         which process drives the study

A trial's folder is renamed into place before Optuna is told, so a driver that is killed at any
moment and started again finds what is finished and runs the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import queue
import shutil
import socket
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
import optuna
import pandas as pd
import psutil
from distributed import Client, Future, LocalCluster
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from cifar_lib import calibration, data, recipes, runs, studies, trials
from cifar_lib.board import Board
from cifar_lib.studies import Study, Value, Values

LEASE_SECONDS = 30.0
#: A trial whose workers died so often is recorded as failed.
WORKERS_LOST = 3
SECONDS_TO_CONNECT = 10
SECONDS_FOR_WORKERS = 30
SECONDS_BETWEEN_TABLES = 2.0
SECONDS_BETWEEN_KEEPING = 30.0
SECONDS_BETWEEN_CHECKS = 1.0
#: A scheduler that says nothing for so long is gone.
SECONDS_OF_SILENCE = 6.0
SECONDS_TO_CLOSE = 1.0
SECONDS_TO_FETCH = 60.0
TRIAL_FOLDER = "{:04d}"
TABLES = ("trials.csv", "histories.csv")
STATES = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
DASK = {
    "distributed.comm.timeouts.connect": f"{SECONDS_TO_CONNECT}s",
    "distributed.scheduler.allowed-failures": WORKERS_LOST - 1,
    "distributed.admin.system-monitor.gil.enabled": False,
    # Else a tenth of a core does nothing but watch: trials are processes of their own, which this
    # profiler does not see, and which need no 50 ticks a second.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
}


class SweepError(runs.RunError):
    """A sweep cannot start, or cannot go on; what is finished is kept."""


def run(
    study: Study,
    studies_dir: Path,
    *,
    scheduler: str | None = None,
    resources: Mapping[str, float] | None = None,
    take_over: bool = False,
    task: Callable[[trials.Order], trials.Outcome] = trials.run,
    lease_seconds: float = LEASE_SECONDS,
) -> Path:
    """Run all trials of a study that are not finished yet.

    Args:
        study: what to try.
        studies_dir: the folder of the studies' folders.
        scheduler: address of a Dask scheduler; None starts a cluster on this machine, sized to it.
        resources: what a worker must have for a trial, such as {"GPU": 1}, for Dask.
        take_over: drive the study although another process did, once its lease has run out.
        task: what a worker does for a trial.
        lease_seconds: how long after its last sign of life a driver keeps the study.

    Returns:
        the study's folder.

    Raises:
        SweepError: another process drives the study, the folder holds another study of this name,
            workers are not as they should be, or the scheduler is gone.
        RunError: the disk is full.
        DataError: the data set is not there or is not what it should be.
    """
    study = resolve(study, studies_dir)
    base = study.base()
    dataset = data.load(base.dataset)
    folder = studies_dir / study.name
    folder.mkdir(parents=True, exist_ok=True)
    with _lease(folder, lease_seconds, take_over) as lease:
        identifier = _identify(folder, study, dataset.title)
        # Workers on this machine run what lies here.
        machine = trials.describe(base.dataset) if scheduler else {}
        expected = {"dataset": base.dataset, "machine": machine}
        with dask.config.set(DASK), _cluster(study, scheduler) as client:
            driver = _Driver(study, folder, identifier, lease, client, expected, resources, task)
            driver.drive()
    return folder


def resolve(study: Study, studies_dir: Path) -> Study:
    """The study with what the studies found that it follows.

    Raises:
        SweepError: one of them has found nothing yet.
        StudyError: what was found lies outside what this study searches.
    """
    best = {}
    for name in study.follows:
        try:
            found = calibration.read(studies_dir / name)
            variants = found.study.get("variants", {})
            if not found.finished:
                print(f"The study {name} is not finished: the best that it has so far is taken.")
            best[name] = studies.choices_at(variants, calibration.best_point(found))
        except runs.RunError as error:
            raise SweepError(
                f"The study {study.name} follows {name}, which has found nothing yet: run it "
                f"first. ({error})"
            ) from error
    return studies.resolve(study, best)


def dry_run(study: Study, studies_dir: Path) -> None:
    """Print the trials of a study, and how long they would take here by measured steps.

    Studies that it follows and that have found nothing yet are left out, and it says so.
    """
    try:
        study = resolve(study, studies_dir)
    except SweepError as error:
        print(f"{error} Until then the recipe's own values are taken.")
        study = dataclasses.replace(study, follows=())
    planned = [(f"{number}", point, seed) for number, (point, seed) in enumerate(study.planned())]
    if study.search == "tpe":
        more = (study.trials or 0) * study.seeds - len(planned)
        planned += [("drawn", {}, 0)] * max(more, 0)
    if study.repeat_best:
        points, seeds = study.repeat_best
        again = range(study.seeds, seeds)
        planned += [("repeat", {}, seed) for _ in range(points) for seed in again]
    began = time.perf_counter()
    from cifar_lib import training

    dataset = data.load(study.base().dataset)
    start = time.perf_counter() - began
    measured: dict[recipes.Recipe, float] = {}
    total = 0.0
    count = f"{len(planned)} trial" + ("" if len(planned) == 1 else "s")
    print(f"{study.name}: {count} of the recipe {study.recipe}")
    for name, point, seed in planned:
        recipe = study.at(point, seed=seed) if point else study.base().replace(seed=seed)
        images = len(data.make_splits(dataset, **recipe.split_choices).train)
        steps = recipe.epochs * -(-images // recipe.batch_size)
        seconds = 0.0
        for size, epochs in recipe.epochs_by_size.items():
            # What a step takes does not depend on what else is chosen.
            alike = recipe.replace(
                name="alike",
                seed=0,
                epochs=1,
                learning_rate=1e-6,
                image_sizes=recipe.image_sizes and (size,),
            )
            if alike not in measured:
                measured[alike] = training.seconds_per_step(alike, dataset=dataset)
            seconds += steps * epochs / recipe.epochs * measured[alike]
        total += start + seconds
        values = calibration.describe(point) if point else "values that the search chooses"
        print(
            f"{name:>6}  {values}, seed {seed}: {steps:,} steps of "
            f"{seconds / steps * 1000:.0f} ms, {_clock(start + seconds)}"
        )
    slots = len(trials.slots(study.cores_per_trial))
    limit = f", but no trial starts after {study.minutes:g} minutes" if study.minutes else ""
    print(
        f"About {_clock(total / slots)} on this machine, {slots} at a time, without validation and "
        f"without pruning{limit}."
    )


class _Lease:
    """The right to drive a study, renewed by a thread for as long as this process lives.

    The file is read once more right before it is replaced. A lock would be held for ever by a
    process that is suspended while it renews, which is one that others must be able to relieve.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path, self.seconds = folder / "lease.json", seconds
        self.token = uuid.uuid4().hex
        self.mine = folder / f".lease-{self.token}.json"
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def acquire(self, take_over: bool) -> None:
        holder = self._read()
        if holder and not _is_dead(holder):
            left = holder["until"] - time.time()
            who = f"process {holder['pid']} on {holder['host']}"
            if left > 0:
                raise SweepError(
                    f"{self.path.parent.name} is driven by {who}. Wait until it is done, or stop "
                    f"it. Its lease runs out in {left:.0f} s unless it is renewed; then "
                    "--take-over works."
                )
            if not take_over:
                raise SweepError(
                    f"{self.path.parent.name} was driven by {who}, which has not been heard of "
                    f"for {self.seconds - left:.0f} s. If it is gone, add --take-over."
                )
        self._write(instead_of=holder and holder["token"])
        self.check()
        self.thread.start()

    def check(self) -> None:
        """Raise SweepError if another process has taken over."""
        holder = self._read()
        if holder is None or holder["token"] != self.token:
            who = "nobody" if holder is None else f"process {holder['pid']} on {holder['host']}"
            raise SweepError(
                f"This process has lost its lease of {self.path.parent.name}, which is now driven "
                f"by {who}. Nothing more is written here."
            )

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file whole, unless another process has taken over.

        This one may have been suspended while it wrote: what is half written is its own, and the
        lease is read once more right before the file is replaced.
        """
        runs.write_atomically(path, data, owner=f".{self.token}", check=self.check)

    def release(self) -> None:
        self.ended.set()
        self.thread.join()
        holder = self._read()
        if holder and holder["token"] == self.token:
            self.path.unlink()

    def _renew(self) -> None:
        while not self.ended.wait(self.seconds / 3):
            with contextlib.suppress(OSError, runs.RunError):  # a full disk is the driver's to tell
                self._write(instead_of=self.token)

    def _read(self) -> dict | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _write(self, instead_of: str | None) -> None:
        """Replace the lease, if it is still the one with this token."""
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": psutil.Process().create_time(),
            "until": time.time() + self.seconds,
            "token": self.token,
        }
        runs.write_json(self.mine, holder)
        found = self._read()
        if (found and found["token"]) == instead_of:
            self.mine.replace(self.path)
        else:
            self.mine.unlink()


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    if holder["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["began"]) > 1
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _lease(folder: Path, seconds: float, take_over: bool) -> Iterator[_Lease]:
    lease = _Lease(folder, seconds)
    lease.acquire(take_over)
    try:
        yield lease
    finally:
        lease.release()


def _identify(folder: Path, study: Study, dataset_title: str) -> str:
    """Write `study.json`, or check that it is of this study; the study's identifier."""
    path = folder / "study.json"
    asked = json.loads(study.to_json()) | {"dataset_title": dataset_title}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        # More of the same may be asked for later.
        free = {"trials", "minutes", "trial_minutes", "description", "cores_per_trial"}
        different = [
            f"{name} is {content.get(name)!r} there and {value!r} here"
            for name, value in asked.items()
            if name not in free and content.get(name) != value
        ]
        if different:
            raise SweepError(
                f"{folder} holds another study of this name: {'; '.join(different)}. Give this "
                "one another name, or delete that folder."
            )
        identifier = content["id"]
        asked |= {"id": identifier, "environment": content.get("environment")}
    else:
        identifier = f"{study.name}-{uuid.uuid4().hex[:12]}"
        asked |= {"id": identifier, "environment": None}
    runs.write_json(path, asked)
    return identifier


class _Journal(JournalFileBackend):
    """Optuna's journal, whole lines only, written by none but the holder of the lease."""

    def __init__(self, path: Path, lease: _Lease) -> None:
        super().__init__(str(path), JournalFileSymlinkLock(str(path), grace_period=5))
        self.path, self.lease = path, lease
        self._drop_half_line()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lease.check()
        try:
            super().append_logs(logs)
        except OSError as error:
            self._drop_half_line()
            if error.errno not in runs.NO_SPACE:
                raise
            raise runs.RunError(
                f"No space for {self.path}: {error.strerror}. What is finished is kept; free some "
                "space and give the same command to continue."
            ) from error

    def _drop_half_line(self) -> None:
        """A process that was killed while it wrote, or a full disk, may have left one."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


@contextlib.contextmanager
def _cluster(study: Study, scheduler: str | None) -> Iterator[Client]:
    """A client of the scheduler at an address, or of a cluster on this machine."""
    if scheduler is not None:
        # What is wrong with the connection is said once, by this module.
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
        try:
            client = Client(scheduler, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise SweepError(
                f"No Dask scheduler answers at {scheduler}: {error}. Start one with `dask "
                "scheduler`, and workers with `dask worker ADDRESS --nthreads 1`."
            ) from error
        try:
            yield client
        finally:
            # A scheduler that is stopped would be waited for.
            closing = threading.Thread(target=_close, args=(client,), daemon=True)
            closing.start()
            closing.join(SECONDS_TO_CLOSE)
        return
    # One thread each: a thread does nothing but wait for its trial.
    cluster = LocalCluster(
        n_workers=len(trials.slots(study.cores_per_trial)),
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=None,
        # Above all of Dask's levels: on Ctrl-C its scheduler may have an epoch to tell of and no
        # client any more, of which it writes a traceback.
        silence_logs=logging.CRITICAL + 1,
    )
    with cluster, Client(cluster, set_as_default=False) as client:
        client.register_worker_callbacks(trials.leave_ctrl_c)
        yield client


def _close(client: Client) -> None:
    with contextlib.suppress(OSError, RuntimeError, AssertionError):  # the scheduler is gone
        client.close()


@dataclasses.dataclass(frozen=True)
class _Worker:
    """A worker of the cluster.

    Attributes:
        host: its machine's name.
        threads: trials that it takes at once.
        slots: trials that its machine can run at once.
        wrong: why it gets none, or nothing.
    """

    host: str
    threads: int
    slots: int
    wrong: str


@dataclasses.dataclass
class _Running:
    """A trial that was given to Dask.

    Attributes:
        trial: Optuna's.
        point: the values of what is varied.
        seed: of the run.
        epochs: that it is to run.
        future: Dask's.
        began: when it was given, in seconds of `time.time`.
        worker: address of the worker that runs it.
        host: that worker's machine.
        attempts: how often a worker started it.
        history: one dict an epoch, of the latest attempt.
        reported: the last epoch that Optuna knows of.
        pruned: whether it was told to stop.
    """

    trial: optuna.Trial
    point: dict[str, Value]
    seed: int
    epochs: int = 0
    future: Future | None = None
    began: float = 0.0
    worker: str = ""
    host: str = ""
    attempts: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    reported: int = 0
    pruned: bool = False


class _Driver:
    """Drives one study from what is finished to its end."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        identifier: str,
        lease: _Lease,
        client: Client,
        expected: Mapping[str, Any],
        resources: Mapping[str, float] | None,
        task: Callable[[trials.Order], trials.Outcome],
    ) -> None:
        self.study, self.folder, self.identifier = study, folder, identifier
        self.lease, self.client, self.expected = lease, client, expected
        self.resources, self.task = dict(resources or {}), task
        self.trials_dir = folder / "trials"
        self.trials_dir.mkdir(exist_ok=True)
        self.topic = f"{identifier}-{lease.token[:8]}"
        self.events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.running: dict[int, _Running] = {}
        self.workers: dict[str, _Worker] = {}
        self.records: dict[int, dict[str, Any]] = {}
        self.histories: dict[int, list[dict[str, float]]] = {}
        self.placed = self.lost = False
        self.began = self.time_kept = time.monotonic()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.optuna = self._open_record()
        self.minutes_before = self.optuna.user_attrs.get("minutes", 0.0)

    def drive(self) -> None:
        """Run what is not finished; write the tables however it ends."""
        self.client.subscribe_topic(self.topic, lambda event: self.events.put(("event", event[1])))
        ended = threading.Event()
        watcher = threading.Thread(target=self._watch_scheduler, args=(ended,), daemon=True)
        try:
            self._wait_for_workers()
            self._enqueue_plan()
            with Board(self.study.name, self.client.dashboard_link) as board:
                self.board = board
                watcher.start()
                try:
                    self._loop()
                except (OSError, RuntimeError) as error:
                    if self.client.status == "running":
                        raise
                    raise self._gone(error) from error
            self._describe_environment()
            self.client.run(trials.clear, self.identifier)
        finally:
            ended.set()
            # A scheduler that does not answer would be waited for.
            if self.client.status == "running" and not self.lost:
                self.client.cancel([running.future for running in self.running.values()])
            self._write_tables()

    # What is known from before.

    def _open_record(self) -> optuna.Study:
        storage = optuna.storages.JournalStorage(_Journal(self.folder / "journal.log", self.lease))
        name = self.study.name
        # `load_if_exists` would add a line to the journal each time.
        if name in optuna.get_all_study_names(storage):
            study = optuna.load_study(storage=storage, study_name=name)
        else:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        if study.metric_names is None:
            study.set_metric_names(["val_accuracy"])
        # A sampler starts anew with its process, and must not draw the same points again.
        seed = self.study.search_seed + len(study.get_trials(deepcopy=False))
        try:
            study.sampler = (
                optuna.samplers.TPESampler(seed=seed, **self.study.search_options)
                if self.study.search == "tpe"
                else optuna.samplers.RandomSampler(seed=seed)
            )
            study.pruner = _pruner(self.study)
        except (TypeError, ValueError) as error:
            raise studies.StudyError(
                f"Optuna refuses the options of the study {self.study.name}: {error}"
            ) from error
        self.interrupted: deque[int] = deque()
        self.waiting = self.points_asked = 0
        self.known: set[tuple[str, int]] = set()
        for trial in study.get_trials(deepcopy=False):
            if "seed" in trial.user_attrs:
                fixed = trial.system_attrs.get("fixed_params", {})
                self._know(fixed | trial.params, trial.user_attrs["seed"])
            if trial.state == TrialState.WAITING:
                self.waiting += 1
            elif trial.state == TrialState.RUNNING:
                self.interrupted.append(trial.number)
        self._read_trials(study)
        return study

    def _read_trials(self, study: optuna.Study) -> None:
        """Take in what is finished; Optuna may not have been told of the last."""
        for partial in self.trials_dir.glob(f"*{runs.PARTIAL}"):
            shutil.rmtree(partial)
        for partial in self.folder.glob(f".[!.]*{runs.PARTIAL}"):  # not a lease's
            partial.unlink()
        for path in sorted(self.trials_dir.glob("*/trial.json")):
            number = int(path.parent.name)
            self.records[number] = json.loads(path.read_text(encoding="utf-8"))
            history = path.with_name("history.csv")
            if history.exists():
                self.histories[number] = pd.read_csv(history).to_dict("records")
            if number in self.interrupted:
                self.interrupted.remove(number)
                _tell(study, number, self.records[number])
        ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
        states = {trial.number: STATES[trial.state] for trial in ended}
        self._read_tables({n: state for n, state in states.items() if n not in self.records})

    def _read_tables(self, states: Mapping[int, str]) -> None:
        """Take in trials that ended in these states, and whose folders were deleted since."""
        files = [self.folder / name for name in TABLES]
        if not states or not all(file.exists() for file in files):
            return
        table, histories = (pd.read_csv(file, float_precision="round_trip") for file in files)
        for number, row in table.set_index("trial").iterrows():
            if row["state"] == states.get(number):
                self.records[number] = row.dropna().to_dict()
                history = histories[histories["trial"] == number]
                self.histories[number] = history.drop(columns="trial").to_dict("records")

    def _enqueue_plan(self) -> None:
        """Enqueue what is known beforehand and not in the record yet."""
        for point, seed in self.study.planned():
            self._enqueue(point, seed)
        self._enqueue_repeats()

    def _enqueue(self, point: Mapping[str, Value], seed: int) -> None:
        """Enqueue a run of a point, if the record has none with this seed."""
        if (_key(point), seed) not in self.known:
            self.optuna.enqueue_trial(dict(point), user_attrs={"seed": seed})
            self.waiting += 1
            self._know(point, seed)

    def _know(self, point: Mapping[str, Value], seed: int) -> None:
        self.known.add((_key(point), seed))
        self.points_asked += seed == 0

    # The loop.

    def _loop(self) -> None:
        saved = -math.inf
        while True:
            if time.monotonic() - saved > SECONDS_BETWEEN_TABLES:
                self._write_tables()
                if time.monotonic() - self.time_kept > SECONDS_BETWEEN_KEEPING:
                    self._keep_time()
                saved = time.monotonic()
            self._fill()
            self.board.show(self._lines(), self._summary())
            if not self.running:
                if self.placed:  # the record of a finished study stays as it is
                    self._keep_time()
                return
            try:
                kind, content = self.events.get(timeout=SECONDS_BETWEEN_TABLES)
            except queue.Empty:
                continue
            if kind == "gone":
                raise self._gone(content)
            if kind == "workers":
                self._take_workers(content)
            elif kind == "event":
                self._take_event(content)
            else:
                self._take_result(content)

    def _gone(self, why: object) -> SweepError:
        self.lost = True
        return SweepError(
            f"The scheduler at {self.client.scheduler.address} is gone ({why}). "
            f"{len(self.records)} trials are finished and kept in {self.folder}. Start the "
            "scheduler again and give the same command to continue."
        )

    def _watch_scheduler(self, ended: threading.Event) -> None:
        """Ask the scheduler for its workers, now and then, and say when it does not answer."""
        while not ended.wait(SECONDS_BETWEEN_CHECKS):
            try:
                workers = self._look_at_workers()
            except Exception as error:
                silent = f"no answer for {SECONDS_OF_SILENCE:g} s"
                why = str(error) or (silent if isinstance(error, TimeoutError) else repr(error))
                if not ended.is_set():
                    self.events.put(("gone", why))
                return
            if workers != self.workers:
                self.events.put(("workers", workers))

    def _wait_for_workers(self) -> None:
        """Wait for a worker, and refuse workers that are not like this machine."""
        deadline = time.monotonic() + SECONDS_FOR_WORKERS
        while not self.workers:
            if time.monotonic() > deadline:
                raise SweepError(
                    f"The scheduler has had no worker for {SECONDS_FOR_WORKERS} s. Start one: dask "
                    f"worker {self.client.scheduler.address} --nthreads 1"
                )
            self.workers = self._look_at_workers()
            time.sleep(0.1)
        wrong = [f"  {address}: {worker.wrong}" for address, worker in self._wrong().items()]
        if wrong:
            raise SweepError(
                "These workers are not like this machine:\n" + "\n".join(wrong) + "\nInstall the "
                "same requirements.txt and the same commit there, set CIFAR100_DIR, and start them "
                "again."
            )

    def _look_at_workers(self) -> dict[str, _Worker]:
        if self.client.status != "running":
            raise ConnectionError("the connection broke")
        known, found = self.workers, {}
        sync = functools.partial(self.client.sync, callback_timeout=SECONDS_OF_SILENCE)
        threads = sync(self.client.scheduler.ncores)
        new = [address for address in threads if address not in known]
        answers = {}
        if new:
            arguments = self.expected["dataset"], self.study.cores_per_trial
            answers = self.client.run(trials.look, *arguments, workers=new, on_error="return")
        for address, count in threads.items():
            answer = answers.get(address)
            if address in known:
                found[address] = known[address]
            elif isinstance(answer, tuple):
                machine, host, slots = answer
                different = trials.differences(machine, self.expected["machine"])
                found[address] = _Worker(host, count, slots, different)
            elif answer is not None:
                found[address] = _Worker("", count, 0, f"{type(answer).__name__}: {answer}")
        return found

    def _take_workers(self, workers: dict[str, _Worker]) -> None:
        for address, worker in workers.items():
            if worker.wrong and address not in self.workers:
                self.board.say(f"The worker {address} is left out: {worker.wrong}")
        self.workers = workers
        if not workers:
            self.board.say("No worker is left; waiting for one")

    def _wrong(self) -> dict[str, _Worker]:
        return {address: worker for address, worker in self.workers.items() if worker.wrong}

    def _capacity(self) -> int:
        """How many trials the workers can run at once: by threads, and by parts of machines."""
        threads: dict[str, int] = {}
        slots: dict[str, int] = {}
        for worker in self.workers.values():
            if not worker.wrong:
                threads[worker.host] = threads.get(worker.host, 0) + worker.threads
                slots[worker.host] = worker.slots
        return sum(min(count, slots[host]) for host, count in threads.items())

    def _fill(self) -> None:
        while len(self.running) < max(1, self._capacity()):
            running = self._next()
            if running is None:
                return
            self._submit(running)

    def _next(self) -> _Running | None:
        if self.interrupted:
            number = self.interrupted.popleft()
            [frozen] = [t for t in self.optuna.get_trials(deepcopy=False) if t.number == number]
            trial = optuna.Trial(self.optuna, frozen._trial_id)
            return self._take(trial, max(frozen.intermediate_values, default=0))
        if self._minutes() > (self.study.minutes or math.inf):
            return None
        more = self.study.search == "tpe" and self.points_asked < (self.study.trials or math.inf)
        if not self.waiting and not self.running and not more:
            self._choose_repeats()
        if not self.waiting and not more:
            return None
        trial = self.optuna.ask()
        self.waiting -= "seed" in trial.user_attrs
        return self._take(trial)

    def _take(self, trial: optuna.Trial, reported: int = 0) -> _Running:
        """A trial with its values and its seed, which a driver that was killed may have left out,
        and its point's other seeds enqueued."""
        spaces = self.study.parameters
        point = {name: _suggest(trial, name, space) for name, space in spaces.items()}
        if "seed" not in trial.user_attrs:
            trial.set_user_attr("seed", 0)
            self._know(point, 0)
        for seed in range(1, self.study.seeds):
            self._enqueue(point, seed)
        return _Running(trial, point, trial.user_attrs["seed"], reported=reported)

    def _choose_repeats(self) -> None:
        """Choose the points that get further seeds, once, when all others are done."""
        if self.study.repeat_best is None or "repeats" in self.optuna.user_attrs:
            return
        found: dict[str, list[float]] = {}
        for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            found.setdefault(_key(trial.params), []).append(trial.value)
        best = sorted(found, key=lambda point: -sum(found[point]) / len(found[point]))
        count, _ = self.study.repeat_best
        self.optuna.set_user_attr("repeats", [json.loads(point) for point in best[:count]])
        self._enqueue_repeats()

    def _enqueue_repeats(self) -> None:
        for point in self.optuna.user_attrs.get("repeats", []):
            for seed in range(self.study.repeat_best[1]):
                self._enqueue(point, seed)

    def _submit(self, running: _Running) -> None:
        number = running.trial.number
        running.began = time.time()
        try:
            recipe = self.study.at(running.point, seed=running.seed)
        except recipes.RecipeError as error:  # choices that exclude each other, drawn by "tpe"
            self._store(running, trials.Outcome(state=trials.FAILED, error=str(error)))
            return
        order = trials.Order(
            study=self.identifier,
            number=number,
            parameters={"recipe": self.study.recipe} | recipe.changes,
            cores=self.study.cores_per_trial,
            minutes=self.study.trial_minutes,
            expected=self.expected,
            topic=self.topic,
        )
        good = [address for address, worker in self.workers.items() if not worker.wrong]
        running.epochs = recipe.epochs
        running.future = self.client.submit(
            self.task,
            order,
            key=f"trial-{self.topic}-{number}-{uuid.uuid4().hex[:4]}",
            pure=False,
            resources=self.resources or None,
            workers=good if len(good) < len(self.workers) else None,
        )
        self.running[number] = running
        self.placed = True
        running.future.add_done_callback(lambda _: self.events.put(("result", number)))

    # What comes back.

    def _take_event(self, event: Mapping[str, Any]) -> None:
        running = self.running.get(event["trial"])
        if running is None:
            return
        if event["what"] == "started":
            running.worker, running.host = event["worker"], event["host"]
            running.attempts += 1
            running.history = []
            again = f", attempt {running.attempts}" if running.attempts > 1 else ""
            self.board.say(f"{self._name(running)} started on {running.host}{again}", plain=True)
            return
        row = event["row"]
        running.history.append(row)
        epoch = int(row["epoch"])
        self.board.say(self._line(running), plain=True)
        if epoch > running.reported:
            running.trial.report(row["val_accuracy"], epoch)
            running.reported = epoch
            # The further seeds of the best points are to show a spread, so they all run to the end.
            judged = running.seed < self.study.seeds and not running.pruned
            if judged and epoch < running.epochs and running.trial.should_prune():
                running.pruned = True
                self.board.say(f"{self._name(running)} is losing and stops")
        if running.pruned:
            # Again after each epoch: its worker may have died, and another one begun.
            threading.Thread(target=self._stop, args=(running,), daemon=True).start()

    def _stop(self, running: _Running) -> None:
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # the worker is gone
            number = running.trial.number
            self.client.run(trials.stop, self.identifier, number, workers=[running.worker])

    def _take_result(self, number: int) -> None:
        running = self.running[number]
        future = running.future
        if future.cancelled():
            return  # the connection broke; the watcher says so
        try:
            if future.status == "error":
                error = _explain(future.exception(timeout=SECONDS_OF_SILENCE))
                outcome = trials.Outcome(state=trials.FAILED, error=error)
            else:
                outcome = future.result(timeout=SECONDS_TO_FETCH)
        except TimeoutError:
            self.events.put(("result", number))  # again, unless the scheduler is gone
            return
        if outcome.state in (trials.REFUSED, trials.ABANDONED):
            self.board.say(f"{self._name(running)} is placed again: {outcome.error}")
            self._submit(running)
            return
        del self.running[number]
        self._store(running, outcome)

    def _store(self, running: _Running, outcome: trials.Outcome) -> None:
        number = running.trial.number
        record = self._record(running, outcome)
        best = max(
            (r["val_accuracy"] for r in self.records.values() if r.get("weights")), default=-1.0
        )
        record["weights"] = record["state"] == "complete" and record["val_accuracy"] > best
        folder = self.trials_dir / TRIAL_FOLDER.format(number)
        partial = folder.with_name(f".{folder.name}.{self.lease.token}{runs.PARTIAL}")
        self.lease.check()
        partial.mkdir()
        try:
            for name, content in outcome.files.items():
                if name != "weights.npz" or record["weights"]:
                    runs.write_atomically(partial / name, content)
            runs.write_json(partial / "trial.json", record)
            self.lease.check()
            partial.rename(folder)
        except BaseException:
            # Who has taken over meanwhile has swept it up.
            shutil.rmtree(partial, ignore_errors=True)
            self.lease.check()
            raise
        self.records[number] = record
        self.histories[number] = running.history
        _tell(self.optuna, number, record)
        if record["weights"]:
            for path in self.trials_dir.glob("*/weights.npz"):
                if path.parent != folder:
                    path.unlink()
        shown = record["error"] or f"val_accuracy {record['val_accuracy']:.4f}"
        self.board.say(f"{self._name(running)} {record['state']}: {shown}")

    def _record(self, running: _Running, outcome: trials.Outcome) -> dict[str, Any]:
        ended = datetime.now(UTC)
        record: dict[str, Any] = {
            "state": "failed",
            **running.point,
            "seed": running.seed,
            "epochs": running.epochs,
            "seconds": round(outcome.seconds, 3),
            "worker": outcome.host or running.host,
            "started": datetime.fromtimestamp(running.began, UTC).isoformat(
                timespec="milliseconds"
            ),
            "ended": ended.isoformat(timespec="milliseconds"),
            "attempts": running.attempts,
            "error": outcome.error,
        }
        if "notebook.ipynb" in outcome.files:
            folder = TRIAL_FOLDER.format(running.trial.number)
            record["notebook"] = f"trials/{folder}/notebook.ipynb"
        if running.history:
            best = max(running.history, key=lambda row: row["val_accuracy"])
            record |= {
                "best_val_accuracy": best["val_accuracy"],
                "best_epoch": int(best["epoch"]),
                "epochs_run": len(running.history),
                "train_seconds": sum(row["train_seconds"] for row in running.history),
            }
        if outcome.state == trials.FINISHED:
            metrics = json.loads(outcome.files["metrics.json"])
            # With the protocol "deck" the test images are those that validate.
            measured = metrics.get("validation") or metrics["test"]
            environment = json.loads(outcome.files["environment.json"])
            record |= {
                "state": "pruned" if metrics["stopped"] == "stop file" else "complete",
                "val_accuracy": measured["accuracy"],
                "val_loss": measured["loss"],
                "train_images": metrics["train_images"],
                "precision": environment["precision"],
            }
        return record

    # What is shown and kept for reading.

    def _minutes(self) -> float:
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def _keep_time(self) -> None:
        self.time_kept = time.monotonic()
        self.optuna.set_user_attr("minutes", round(self._minutes(), 3))

    def _name(self, running: _Running) -> str:
        point = calibration.describe(running.point)
        return f"trial {running.trial.number} ({point}, seed {running.seed})"

    def _line(self, running: _Running) -> str:
        if not running.history:
            where = f"starting on {running.host}" if running.host else "waiting for a worker"
            return f"{self._name(running)}  {where}"
        done, last = len(running.history), running.history[-1]
        seconds = sum(row["train_seconds"] + row["validation_seconds"] for row in running.history)
        left = seconds / done * (running.epochs - done)
        return (
            f"{self._name(running)}  epoch {done}/{running.epochs}  "
            f"val_accuracy {last['val_accuracy']:.4f}  {_clock(left)} left"
        )

    def _lines(self) -> list[str]:
        return [self._line(running) for running in self.running.values()]

    def _summary(self) -> str:
        states = [record["state"] for record in self.records.values()]
        counts = {state: states.count(state) for state in ("complete", "pruned", "failed")}
        counts |= {"running": len(self.running), "waiting": self.waiting}
        parts = [f"{count} {state}" for state, count in counts.items() if count]
        best = max(
            (r for r in self.records.values() if r["state"] == "complete"),
            key=lambda record: record["val_accuracy"],
            default=None,
        )
        if best:
            point = calibration.describe({name: best[name] for name in self.study.parameters})
            parts.append(f"best val_accuracy {best['val_accuracy']:.4f} ({point})")
        return ", ".join([*parts, f"{_clock(self._minutes() * 60)} so far"])

    def _write_tables(self) -> None:
        self.lease.check()
        rows, histories = [], []
        for trial in self.optuna.get_trials(deepcopy=False):
            row: dict[str, Any] = {"trial": trial.number, "state": STATES[trial.state]}
            row |= trial.system_attrs.get("fixed_params", {}) | trial.params
            row |= {"seed": trial.user_attrs.get("seed")} | self.records.get(trial.number, {})
            history = self.histories.get(trial.number, [])
            if running := self.running.get(trial.number):
                history = running.history
                row |= {"epochs": running.epochs, "epochs_run": len(history)}
                row |= {"worker": running.host, "attempts": running.attempts}
            rows.append(row)
            number = {"trial": trial.number}
            histories += [number | row | {"epoch": int(row["epoch"])} for row in history]
        trial, state, *others = calibration.TRIAL_COLUMNS
        columns = dict.fromkeys([trial, state, *self.study.parameters, *others])
        table = pd.DataFrame(rows, columns=list(columns))
        for name in ("seed", "best_epoch", "epochs", "epochs_run", "train_images", "attempts"):
            table[name] = table[name].astype("Int64")
        history = pd.DataFrame(histories, columns=list(calibration.HISTORY_COLUMNS))
        for name, content in zip(TABLES, (table, history), strict=True):
            self.lease.replace(self.folder / name, content.to_csv(index=False).encode())

    def _describe_environment(self) -> None:
        """Add to `study.json` what the trials ran on."""
        path = self.folder / "study.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        environments = sorted(self.trials_dir.glob("*/environment.json"))
        if environments:
            content["environment"] = json.loads(environments[-1].read_text(encoding="utf-8"))
            self.lease.replace(path, runs.as_json(content))


def _suggest(trial: optuna.Trial, name: str, space: studies.Range | Values) -> Value:
    if isinstance(space, Values):
        return trial.suggest_categorical(name, space.values)
    suggest = trial.suggest_int if space.integer else trial.suggest_float
    return suggest(name, space.low, space.high, log=space.log)


def _key(point: Mapping[str, Value]) -> str:
    return json.dumps(dict(point), sort_keys=True)


def _pruner(study: Study) -> optuna.pruners.BasePruner:
    if study.pruner is None:
        return optuna.pruners.NopPruner()
    name = "".join(part.title() for part in study.pruner.split("_")) + "Pruner"
    return getattr(optuna.pruners, name)(**study.pruner_options)


def _tell(study: optuna.Study, number: int, record: Mapping[str, Any]) -> None:
    """Tell Optuna what became of a trial, which a driver before may have done already."""
    if record["state"] == "complete":
        study.tell(number, record["val_accuracy"], skip_if_finished=True)
    else:
        state = TrialState.PRUNED if record["state"] == "pruned" else TrialState.FAIL
        study.tell(number, state=state, skip_if_finished=True)


def _explain(error: BaseException) -> str:
    if type(error).__name__ == "KilledWorker":
        return f"{WORKERS_LOST} workers died while they ran it, often because memory was full."
    return f"{type(error).__name__}: {error}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
