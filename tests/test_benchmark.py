"""The benchmarks of training speed: that their numbers are whole, however high they are."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cifar_lib import ROOT, benchmark, figures, recipes, runs
from cifar_lib.__main__ import main

MISSING = [name for name in benchmark.BACKENDS if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    options = ["--seconds", "0.2", "--rounds", "1", "--backends", "tensorflow", *MISSING]
    assert main(["benchmark", "quick", "--out", str(folder), *options]) == 0
    return folder


def test_a_recipe_is_measured_in_its_own_precision_and_in_float32(measured):
    content = json.loads((measured / "benchmark.json").read_text("utf-8"))
    environment = content["environments"]["tensorflow"]
    assert environment["backend"] == "tensorflow" and environment["threads"] >= 1
    table = pd.read_csv(measured / "benchmark.csv")
    assert table.to_dict("records") == content["throughput"]
    assert set(table["precision"]) == {environment["precision"], "float32"}
    assert set(table["recipe"]) == {"quick"} and set(table["image_size"]) == {32}
    assert not table.duplicated(["backend", "precision"]).any()


def test_the_numbers_of_a_row_agree(measured):
    for row in pd.read_csv(measured / "benchmark.csv").to_dict("records"):
        rate, trained = row["images_per_second"], row["trained_images_per_second"]
        assert 0 < row["lowest"] <= rate <= row["highest"]
        assert trained > 0 and row["steps"] >= 1 and row["compile_seconds"] >= 0
        assert row["seconds_per_epoch"] == pytest.approx(50_000 / rate, rel=0.02)
        assert row["feeding_share"] == pytest.approx(1 - rate / trained, abs=0.02)


def test_the_picture_can_be_read(measured):
    with Image.open(measured / "benchmark.png") as picture:
        assert min(picture.size) >= 150


@pytest.mark.skipif(not MISSING, reason="all backends are installed")
def test_a_backend_that_is_not_installed_is_named_with_the_remedy(measured, tmp_path):
    failures = json.loads((measured / "benchmark.json").read_text("utf-8"))["failures"]
    assert set(failures) == set(MISSING)
    with pytest.raises(runs.RunError, match=rf"{MISSING[0]}: not installed; pip install -e"):
        benchmark.run(tmp_path / "none", ["quick"], backends=MISSING)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--backends", "tensorflw"], "backend 'tensorflw' is unknown. Did you mean 'tensorflow'?"),
        (["fsat"], "recipe 'fsat' is unknown. Did you mean 'fast'?"),
        (["--seconds", "0"], "seconds is 0; it must be a finite number above 0."),
        (["--rounds", "0"], "rounds is 0; it must be 1 or more."),
    ],
)
def test_what_cannot_be_measured_ends_with_code_2(arguments, told, tmp_path, capsys):
    assert main(["benchmark", *arguments, "--out", str(tmp_path / "none")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_ctrl_c_leaves_the_rounds_that_are_finished(tmp_path):
    command = [sys.executable, "-m", "cifar_lib", "benchmark", "quick", "--out", str(tmp_path)]
    options = ["--seconds", "0.1", "--rounds", "1000", "--backends", "tensorflow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *options], cwd=ROOT, start_new_session=True, **pipes)
    with process:
        next(line for line in process.stdout if line.startswith("2/1000"))
        os.killpg(process.pid, signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    assert "What is finished is kept: give the same command to measure again." in told
    assert "Traceback" not in told
    content = json.loads((tmp_path / "benchmark.json").read_text("utf-8"))
    assert 1 <= content["rounds"] < 1000
    table = pd.read_csv(tmp_path / "benchmark.csv")
    assert table.to_dict("records") == content["throughput"]
    assert (table["steps"] >= content["rounds"]).all()


def test_a_recipe_of_several_sizes_is_their_mean_by_epochs():
    recipe = recipes.get("fast", epochs=4, image_sizes=(20, 20, 24, 28), batch_size=1_000)
    steps = benchmark.steps_of(recipe)
    assert {step.image_size(0): share for step, share in steps.items()} == {
        20: 0.5,
        24: 0.25,
        28: 0.25,
    }
    # In seconds: what makes the batch and what trains on it, after two first steps that compile.
    times = {20: (0.1, 0.9), 24: (0.1, 1.9), 28: (0.2, 3.8)}
    turns = {step: [[(0.1, 9.0), *[times[step.image_size(0)]] * 3]] * 2 for step in steps}
    *_, mean = benchmark._rows(steps, turns)
    assert mean["image_size"] == "mean"
    # 0.5 * 1 s + 0.25 * 2 s + 0.25 * 4 s for a thousand images, of which 0.125 s make the batch.
    assert mean["images_per_second"] == 500
    assert mean["feeding_share"] == pytest.approx(0.125 / 2)
    assert mean["seconds_per_epoch"] == 100


def test_recipes_that_are_as_fast_as_another_are_left_out():
    assert benchmark.different(["seed", "seed-provisional", "quick"]) == ["seed", "quick"]


@pytest.mark.skipif("torch" not in MISSING, reason="PyTorch is installed")
def test_without_pytorch_nothing_is_compared_and_the_numbers_stay(tmp_path):
    numbers = tmp_path / "pytorch.json"
    numbers.write_text("{}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "pytorch.py", "--out", numbers],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Skipped" in done.stdout and "--torch-python" in done.stdout
    assert numbers.read_text("utf-8") == "{}"


def test_the_operations_of_a_step_are_timed_by_kind_and_beside_keras_own(tmp_path):
    numbers = tmp_path / "operations.json"
    options = ["--networks", "airbench", "--seconds", "0.01", "--rounds", "2", "--batch-size", "4"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "operations.py", *options, "--out", numbers],
        capture_output=True,
        check=True,
    )
    content = json.loads(numbers.read_text("utf-8"))
    operations = pd.DataFrame(content["operations"])
    assert set(operations["kind"]) == set(figures.KIND_COLORS)
    shares = operations.pivot(index="kind", columns="precision", values="share")
    np.testing.assert_allclose(shares.sum(), 1, atol=1e-3)
    assert "float32" in shares
    assert (operations["milliseconds_per_image"] > 0).all(), "the network has all kinds"
    for step in content["steps"]:
        of_step = operations[operations["precision"] == step["precision"]]
        per_image = of_step["milliseconds_per_image"].sum()
        assert per_image == pytest.approx(step["milliseconds"] / 4, rel=0.02)
    pairs = pd.DataFrame(content["pairs"])
    assert set(pairs["precision"]) == set(shares)
    assert not pairs.duplicated(["what", "precision"]).any()
    for side in ("keras_milliseconds", "milliseconds"):
        assert (pairs[side] > 0).all()
    assert (pairs["rounds"].map(len) == 2).all()
