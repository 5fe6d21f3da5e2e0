"""The command line, on one small run on the stand-in."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_lib import ROOT, recipes, runs
from cifar_lib.__main__ import EXAMPLES, _parser, _recipe, main

TRAIN = [
    "train",
    "seed",
    *("--dataset", "synthetic"),
    *("--train-size", "64", "--validation-size", "100", "--test-size", "100"),
    *("--epochs", "1", "--augmentation", "none"),
]


@pytest.fixture(scope="module")
def runs_dir(synthetic, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--runs-dir", str(folder), "--run-name", "small"]) == 0
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def help_of(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cifar_lib", *arguments, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_help_teaches_by_examples_that_work():
    shown = help_of()
    assert EXAMPLES in shown
    examples = re.findall(r"^  python -m cifar_lib (.+?)(?:   .*)?$", EXAMPLES, re.M)
    commands = re.findall(r"^    ([\w-]+)", shown, re.M)
    assert len(examples) >= 6
    for example in examples:
        options = _parser().parse_args(example.split())
        assert example.split()[0] in commands and callable(options.command)


def test_help_of_train_lists_every_choice():
    shown = help_of("train")
    for option in ("--learning-rate FLOAT", "--epochs INT", "--classes CLASS", "--protocol STR"):
        assert option in shown
    assert "recipes: seed, seed-provisional, seed-onecycle, fast, accurate, best, quick" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["trian", "seed"],
        ["train"],
        ["train", "seed", "--epochs", "many"],
        ["train", "seed", "--epochs", "none"],
        ["train", "fast", "--whitening", "no"],
        ["train", "seed", "--learning", "0.1", "--epoch"],
        ["data", "--dataset", "cifar10"],
        ["predict", "cat.jpg", "--run", "mine", "--weights", "seed"],
        ["evaluate", "mine", "--weights", "seed"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m cifar_lib" in capsys.readouterr().err


def test_choices_are_taken_back_on_the_command_line():
    options = _parser().parse_args(["train", "fast", "--image-sizes", "none", "--mixing", "none"])
    assert _recipe(options) == recipes.get("fast", image_sizes=None)


def test_what_is_true_or_false_is_so_on_the_command_line():
    written = ["train", "fast", "--whitening", "False", "--identity-filters", "true"]
    recipe = _recipe(_parser().parse_args(written))
    assert (recipe.whitening, recipe.identity_filters) == (False, True)


def test_data_says_what_is_there(synthetic, capsys):
    assert main(["data", "--dataset", "synthetic"]) == 0
    printed = capsys.readouterr().out
    assert "synthetic stand-in, not CIFAR-100" in printed
    assert "50,000 training, 10,000 test" in printed
    assert "100 in 20 superclasses" in printed


def test_data_that_is_not_there_ends_with_code_3(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIFAR100_DIR", str(tmp_path))
    assert main(["data"]) == 3
    error = capsys.readouterr().err
    assert error.startswith("DataError: ") and str(tmp_path) in error
    assert len(error.splitlines()) == 1
    assert main(["train", "seed", "--runs-dir", str(tmp_path / "runs")]) == 3


def test_a_class_that_does_not_exist_ends_with_code_2(tmp_path, capsys):
    arguments = [*TRAIN, "--runs-dir", str(tmp_path), "--classes", "few_rays_red", "bee"]
    assert main([*arguments, "--validation-size", "64"]) == 2
    assert "Did you mean 'few_rays_red_cyan'?" in capsys.readouterr().err


def test_runs_lists_them(runs_dir, capsys):
    assert main(["runs", "--runs-dir", str(runs_dir)]) == 0
    header, line = capsys.readouterr().out.splitlines()
    accuracy = runs.load(runs_dir / "small").metrics["test"]["accuracy"]
    assert line.split() == ["small", "finished", "1/1", "synthetic", f"{accuracy:.2%}"]
    assert header.split()[:4] == ["run", "state", "epochs", "data"]
    assert header.index("test accuracy") == line.index(f"{accuracy:.2%}")


def test_no_runs_is_no_failure(tmp_path, capsys):
    assert main(["runs", "--runs-dir", str(tmp_path / "none")]) == 0
    assert "There is no run in" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluate_gives_the_numbers_of_the_run(runs_dir, split, capsys):
    arguments = ["evaluate", "small", "--split", split, "--runs-dir", str(runs_dir)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    metrics = runs.load(runs_dir / "small").metrics[split]
    assert f"small, {split} images of synthetic stand-in, not CIFAR-100" in printed
    assert re.search(rf"^images +{metrics['images']}$", printed, re.M)
    assert re.search(rf"^accuracy +{metrics['accuracy']:.2%} \(95 %", printed, re.M)
    assert re.search(rf"^loss +{metrics['loss']:.4f}$", printed, re.M)
    assert re.search(rf"^top5 accuracy +{metrics['top5_accuracy']:.2%}$", printed, re.M)


def test_evaluate_with_flips_differs(runs_dir, capsys):
    losses = []
    for flip in ([], ["--flip"]):
        assert main(["evaluate", "--runs-dir", str(runs_dir), *flip]) == 0
        losses.append(re.search(r"^loss +(\S+)$", capsys.readouterr().out, re.M)[1])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_run_that_does_not_exist_ends_with_code_1(runs_dir, picture, command, capsys):
    name = ["smal"] if command == "evaluate" else [str(picture), "--run", "smal"]
    assert main([command, *name, "--runs-dir", str(runs_dir)]) == 1
    assert "holds no run. Runs in" in capsys.readouterr().err


def test_predict_names_five_classes_and_draws_a_card(
    runs_dir, picture, synthetic, tmp_path, capsys
):
    card = tmp_path / "card.png"
    arguments = ["predict", str(picture), str(picture), "--run", "small", "--card", str(card)]
    assert main([*arguments, "--runs-dir", str(runs_dir)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "run small"
    assert lines[0] == lines[6] == str(picture)
    found = [re.fullmatch(r"  (\S+) (\S+)%", line).groups() for line in lines[1:6]]
    assert {name for name, _ in found} < set(synthetic.fine_names)
    shares = [float(share) for _, share in found]
    assert shares == sorted(shares, reverse=True) and 5 / 100 < sum(shares) <= 100.1
    assert lines[-1] == str(card)
    with Image.open(card) as drawn:
        assert drawn.format == "PNG"
        drawn.load()


def test_predict_agrees_with_the_predictions_of_the_run(runs_dir, synthetic, tmp_path, capsys):
    run = runs.load(runs_dir / "small")
    predictions = run.predictions()
    path = tmp_path / "test.png"
    Image.fromarray(synthetic.test.images[predictions["test_indices"][0]]).save(path)
    # Where nothing is published, the newest run answers.
    nothing = ["--weights-dir", str(tmp_path)]
    assert main(["predict", str(path), "--runs-dir", str(runs_dir), *nothing]) == 0
    best = predictions["test_probabilities"][0].argmax()
    answered, _, likeliest = capsys.readouterr().out.splitlines()[:3]
    assert answered == "run small"
    assert likeliest.split()[0] == synthetic.fine_names[best]


def test_what_is_no_picture_ends_with_code_3(runs_dir, picture, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    for path in (text, tmp_path / "missing.png", tmp_path):
        assert main(["predict", str(picture), str(path), "--runs-dir", str(runs_dir)]) == 3
        printed = capsys.readouterr()
        assert printed.err.startswith("DataError: ") and str(path) in printed.err
        assert not printed.out


def test_a_folder_in_use_by_another_recipe_ends_with_code_1(runs_dir, capsys):
    arguments = [*TRAIN, "--seed", "1", "--runs-dir", str(runs_dir), "--run-name", "small"]
    assert main(arguments) == 1
    assert "seed is 0 there and 1 here" in capsys.readouterr().err


def test_evaluate_without_validation_images_ends_with_code_2(synthetic, tmp_path, capsys):
    recipe = recipes.get("seed", protocol="final", dataset="synthetic")
    with runs.opened(tmp_path / "final", recipe) as run:
        runs.write_json(run.path / "metrics.json", {})
    assert main(["evaluate", "--split", "validation", "--runs-dir", str(tmp_path)]) == 2
    assert "its protocol is 'final'" in capsys.readouterr().err


STUDY = """\
recipe: fast
choices: {dataset: synthetic, protocol: holdout, train_size: 300, validation_size: 100, epochs: 1,
  image_sizes: [12], model: airbench, optimizer: sgd}
parameters:
  batch_size: [10, 50]
repeat_best: {points: 1, seeds: 3}
"""


def test_a_dry_run_lists_the_trials_and_estimates_their_time(synthetic, tmp_path, capsys):
    study = tmp_path / "small.yaml"
    study.write_text(STUDY, encoding="utf-8")
    assert main(["sweep", str(study), "--studies-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    first, *trials, last = capsys.readouterr().out.splitlines()
    assert first == "small: 4 trials of the recipe fast"
    assert re.match(r" +0  batch size 10, seed 0: 30 steps of \d+ ms, \d+:\d\d$", trials[0])
    assert re.match(r" +1  batch size 50, seed 0: 6 steps of \d+ ms, \d+:\d\d$", trials[1])
    assert [trial.split()[0] for trial in trials] == ["0", "1", "repeat", "repeat"]
    assert re.match(r"About \d+:\d\d on this machine, 1 at a time", last)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_the_steps_at_every_image_size(synthetic, tmp_path, capsys):
    study = tmp_path / "small.yaml"
    study.write_text(
        "recipe: fast\nchoices: {dataset: synthetic, protocol: holdout, train_size: 100, "
        "validation_size: 100, batch_size: 50, epochs: 3, image_sizes: [12, 16], "
        "model: airbench, optimizer: sgd}\nvariants: {all: {}}\n"
        "repeat_best: {points: 1, seeds: 2}\n",
        encoding="utf-8",
    )
    assert main(["sweep", str(study), "--studies-dir", str(tmp_path / "out"), "--dry-run"]) == 0
    _, trial, repeat, _ = capsys.readouterr().out.splitlines()
    steps = r"6 steps of \d+ ms, \d+:\d\d$"
    assert re.match(rf" +0  variant all, seed 0: {steps}", trial)
    assert re.match(rf"repeat  values that the search chooses, seed 1: {steps}", repeat)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            "recipe: seed\nparameters: {learning_rte: [1]}\n",
            "line 2: .*Did you mean 'learning_rate'",
        ),
        ("recipe: seed\n", "write the field parameters"),
    ],
)
def test_a_study_that_cannot_be_ends_with_code_2(written, told, tmp_path, capsys):
    study = tmp_path / "bad.yaml"
    study.write_text(written, encoding="utf-8")
    assert main(["sweep", str(study), "--studies-dir", str(tmp_path / "out")]) == 2
    assert re.search(told, capsys.readouterr().err)
