"""The run folder: written whole or not at all, read back, and never mixed up."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cifar_lib import ROOT, recipes, runs

OLD = b"the last good content"


def python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_run(folder: Path, **changes: object) -> runs.Run:
    with runs.opened(folder, recipes.get("seed", **changes)) as run:
        return run


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from cifar_lib import runs

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    runs.write_atomically(Path(sys.argv[1]), bytes(20_000))
except runs.RunError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_the_last_good_file(tmp_path, exists):
    path = tmp_path / "checkpoint.npz"
    if exists:
        path.write_bytes(OLD)
    with python(FULL_DISK, path) as process:
        _, message = process.communicate()
    assert process.returncode == 1
    assert f"No space for {path} (20,000 bytes)" in message
    assert "free some space" in message
    if exists:
        assert "is as it was" in message
        assert path.read_bytes() == OLD
    else:
        assert "was not written" in message
    assert list(tmp_path.iterdir()) == ([path] if exists else [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_says_it_is_full_is_reported(tmp_path):
    (tmp_path / ".file.partial").symlink_to("/dev/full")
    with pytest.raises(runs.RunError, match="No space left on device"):
        runs.write_atomically(tmp_path / "file", OLD)


def test_a_file_is_not_replaced_by_who_may_no_longer(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)

    def check() -> None:
        path.write_bytes(b"its successor's")
        raise PermissionError("relieved")

    with pytest.raises(PermissionError, match="relieved"):
        runs.write_atomically(path, b"new", owner=".1", check=check)
    assert path.read_bytes() == b"its successor's"
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "nothing else is left"


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    for content in (OLD, b"", bytes(100_000)):
        runs.write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
from pathlib import Path
from cifar_lib import runs

def stop(descriptor):
    print("writing", flush=True)
    sys.stdin.read()

os.fsync = stop
runs.write_atomically(Path(sys.argv[1]), bytes(20_000))
"""


def test_a_killed_writer_leaves_the_old_file_and_its_rest_is_swept_up(tmp_path):
    make_run(tmp_path)
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(OLD)
    process = python(KILLED, path)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_bytes() == OLD
    assert (tmp_path / ".checkpoint.npz.partial").exists()
    make_run(tmp_path)
    assert not (tmp_path / ".checkpoint.npz.partial").exists()
    assert path.read_bytes() == OLD


class Intruder:
    def __reduce__(self):
        return os.mkdir, ("intruder",)


def test_arrays_that_hold_pickles_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    np.savez(tmp_path / "run" / "predictions.npz", x=np.array([Intruder()], object))
    with pytest.raises(runs.RunError, match="pickle"):
        runs.load("run").predictions()
    (tmp_path / "run" / "predictions.npz").write_bytes(pickle.dumps(Intruder()))
    with pytest.raises(runs.RunError, match="pickle"):
        runs.load("run").predictions()
    assert not Path("intruder").exists()


def test_a_damaged_file_of_arrays_is_named(tmp_path):
    damaged = tmp_path / "weights.npz"
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for content in (b"", array.getvalue()):
        damaged.write_bytes(content)
        with pytest.raises(runs.RunError, match=r"weights\.npz is no file of plain arrays"):
            runs.read_arrays(damaged)


def test_weights_of_another_network_are_refused(tmp_path):
    from cifar_lib import models

    make_run(tmp_path)
    (tmp_path / "environment.json").write_text(json.dumps({"precision": "float32"}))
    weights = {f"{n:04d}": w for n, w in enumerate(models.build("seed", seed=3).get_weights())}
    runs.write_arrays(tmp_path / "weights.npz", weights)
    loaded = runs.load(tmp_path).load_model().get_weights()
    for array, expected in zip(loaded, weights.values(), strict=True):
        np.testing.assert_array_equal(array, expected)

    last = list(weights)[-1]
    for bad in (weights | {last: np.zeros(99, np.float32)}, {"0000": weights["0000"]}):
        runs.write_arrays(tmp_path / "weights.npz", bad)
        with pytest.raises(runs.RunError, match=r"weights\.npz is not of this network"):
            runs.load(tmp_path).load_model()


HOLDS = """
import sys
from pathlib import Path
from cifar_lib import recipes, runs

with runs.opened(Path(sys.argv[1]), recipes.get("seed")) as run:
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    process = python(HOLDS, tmp_path)
    assert process.stdout.readline() == "open\n"
    assert runs.load(tmp_path).state == "running"
    with pytest.raises(runs.RunError, match=f"Another process is training in {tmp_path}"):
        make_run(tmp_path)
    process.kill()  # even so its lock is gone
    process.communicate()
    assert runs.load(tmp_path).state == "interrupted"
    make_run(tmp_path)


def test_a_folder_of_another_recipe_is_refused_and_the_differences_named(tmp_path):
    make_run(tmp_path, epochs=3)
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(runs.RunError) as caught:
        make_run(tmp_path, epochs=4, optimizer="adam")
    message = str(caught.value)
    assert "epochs is 3 there and 4 here" in message
    assert "optimizer is 'rmsprop' there and 'adam' here" in message
    assert "seed is" not in message
    assert (tmp_path / "recipe.json").read_bytes() == before
    assert make_run(tmp_path, epochs=3).recipe == recipes.get("seed", epochs=3)


def test_runs_are_found_by_age_and_asked_for_by_name(tmp_path):
    assert runs.find(tmp_path) == []
    for number, name in enumerate(("zebra", "ant", "fox", "unfinished")):
        make_run(tmp_path / name, epochs=number + 1)
        os.utime(tmp_path / name / "recipe.json", (number, number))
        if name != "unfinished":
            runs.write_json(tmp_path / name / "metrics.json", {"number": number})
    (tmp_path / "no run").mkdir()
    assert [run.name for run in runs.find(tmp_path)] == ["zebra", "ant", "fox", "unfinished"]
    assert [run.name for run in runs.finished(tmp_path)] == ["fox"]
    assert [run.metrics for run in runs.finished(tmp_path, ["zebra"])] == [{"number": 0}]
    with pytest.raises(runs.RunError, match="unfinished is interrupted, not finished"):
        runs.finished(tmp_path, ["unfinished"])
    with pytest.raises(runs.RunError, match=r"foxx holds no run\. Runs in .*: zebra, ant, fox"):
        runs.load(tmp_path / "foxx")
    with pytest.raises(runs.RunError, match=r"no finished run in .*cifar_lib train quick"):
        runs.finished(tmp_path / "no run")
    with pytest.raises(runs.RunError, match=r"metrics\.json is not there: the run is interrupted"):
        _ = runs.load(tmp_path / "unfinished").metrics


def test_labels_are_as_short_as_tells_runs_apart(tmp_path):
    made = [
        make_run(tmp_path / name, **changes)
        for name, changes in {
            "a": {},
            "b": {"precision": "float32"},
            "c": {"seed": 1},
        }.items()
    ]
    for run in made:
        (run.path / "history.csv").write_text("epoch,accuracy\n1,0.1\n2,0.2\n")
    assert runs.labels(made[:2]) == ["seed, 2 epochs", "seed in float32, 2 epochs"]
    assert runs.labels(made) == ["a", "b", "c"]


def test_the_history_comes_back_as_it_was(tmp_path):
    make_run(tmp_path)
    losses = [1 / 3, np.float64(np.float32(0.1)), 5e-324, 1e22]
    rows = "".join(f"{n + 1},{loss!r}\n" for n, loss in enumerate(map(float, losses)))
    (tmp_path / "history.csv").write_text("epoch,loss\n" + rows)
    history = runs.load(tmp_path).history
    assert list(history["loss"]) == losses
    assert list(history["epoch"]) == [1, 2, 3, 4]
