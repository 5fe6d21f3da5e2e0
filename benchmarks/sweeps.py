"""What the machinery of a sweep costs: Optuna, Dask and the processes around a trial.

    python benchmarks/sweeps.py                           about ten minutes on 2 cores
    python benchmarks/sweeps.py --runs 1 --empty 50 --waiting 64

Three measurements. A trial of the notebook `04_train` (a training of a second, on the stand-in) in
a sweep, beside the same notebook run by papermill's own command line, in turns. Trials that do
nothing, through Optuna and Dask. Trials that wait, on 64 threads: the share of the threads' time
that trials had.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pandas as pd
from distributed import LocalCluster

from cifar_lib import ROOT, backend, data, runs, studies, sweeps, trials
from cifar_lib.studies import Range, Study

CHOICES = {
    "dataset": "synthetic",
    "augmentation": "none",
    "validation_size": 100,
    "test_size": 0,
    "batch_size": 50,
    "epochs": 1,
    "precision": "float32",
}
THREADS = 64
SECONDS_WAITED = 10.0


def study(name: str, count: int) -> Study:
    """A study of so many trials, which differ by a training image each."""
    sizes = Range(100, 99 + count, points=count)
    return Study(name=name, recipe="seed", choices=CHOICES, parameters={"train_size": sizes})


def outcome(seconds: float = 0.0) -> trials.Outcome:
    """What a trial gives back that was not run."""
    metrics = {"stopped": None, "validation": {"accuracy": 0.5, "loss": 1.0}, "train_images": 100}
    files = {"metrics.json": metrics, "environment.json": {"precision": "float32"}}
    contents = {name: json.dumps(content).encode() for name, content in files.items()}
    return trials.Outcome(state=trials.FINISHED, files=contents, seconds=seconds)


def empty(order: trials.Order) -> trials.Outcome:
    return outcome()


def wait(order: trials.Order) -> trials.Outcome:
    time.sleep(SECONDS_WAITED)
    return outcome(SECONDS_WAITED)


def seconds_of_sweep(folder: Path) -> float:
    """From the first trial given to Dask to the last one stored."""
    table = pd.read_csv(folder / "trials.csv")
    if not (table["state"] == "complete").all():
        raise SystemExit(f"A trial failed: {folder / 'trials.csv'}")
    began, ended = min(table["started"]), max(table["ended"])
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()


def by_papermill(folder: Path, number: int) -> float:
    """Seconds of a run of the notebook by papermill's own command line."""
    places = {"runs_dir": folder, "run_name": f"bare{number}", "output_dir": folder}
    choices = CHOICES | places | {"train_size": 100}
    options = [part for name, value in choices.items() for part in ("-p", name, value)]
    output = folder / "bare.ipynb"
    command = [sys.executable, "-m", "papermill", studies.NOTEBOOK, output, "-p", "recipe", "seed"]
    began = time.perf_counter()
    subprocess.run(
        [*map(str, command), *map(str, options)], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - began


def notebooks(folder: Path, rounds: int, count: int = 3) -> dict:
    """Seconds a trial by papermill and by a sweep, in turns."""
    bare, swept = [], []
    for number in range(rounds):
        bare += [by_papermill(folder, number * count + n) for n in range(count)]
        done = sweeps.run(study(f"notebooks{number}", count), folder)
        swept.append(seconds_of_sweep(done) / count)
        print(f"papermill {statistics.median(bare):.2f} s, sweep {swept[-1]:.2f} s a trial")
    return {
        "papermill": [round(seconds, 3) for seconds in bare],
        "sweep": [round(seconds, 3) for seconds in swept],
        "more_seconds_a_trial": round(statistics.median(swept) - statistics.median(bare), 3),
    }


def nothing(folder: Path, count: int) -> dict:
    """Milliseconds for each trial that does nothing."""
    seconds = seconds_of_sweep(sweeps.run(study("empty", count), folder, task=empty))
    return {"trials": count, "milliseconds_a_trial": round(seconds / count * 1000, 2)}


def waiting(folder: Path, count: int) -> dict:
    """The share of the threads' time that waiting trials had."""
    # As many parts of the machine as threads: GPUs that nobody looks for.
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(THREADS)))
    with LocalCluster(n_workers=1, threads_per_worker=THREADS, dashboard_address=None) as cluster:
        done = sweeps.run(
            study("waiting", count), folder, scheduler=cluster.scheduler_address, task=wait
        )
    del os.environ["CUDA_VISIBLE_DEVICES"]
    seconds = seconds_of_sweep(done)
    return {
        "threads": THREADS,
        "trials": count,
        "seconds_a_trial": SECONDS_WAITED,
        "seconds": round(seconds, 2),
        "efficiency": round(count * SECONDS_WAITED / (THREADS * seconds), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=4, help="rounds of three runs each way")
    parser.add_argument("--empty", type=int, default=1000, help="trials that do nothing")
    parser.add_argument("--waiting", type=int, default=4 * THREADS, help="trials that wait")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    if options.runs < 1 or min(options.empty, options.waiting) < 2:
        parser.error("--runs must be at least 1, --empty and --waiting at least 2")
    digests = data.load("synthetic").digests
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "empty": nothing(folder, options.empty),
            "waiting": waiting(folder, options.waiting),
            "notebook": notebooks(folder, options.runs),
            "environment": backend.describe("float32") | {"data": digests},
        }
    print(json.dumps({name: result[name] for name in ("empty", "waiting", "notebook")}, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(options.out, result)


if __name__ == "__main__":
    main()
