"""Recipes: checked when they are made, and the same in every process."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_lib import ROOT, calibration, data, recipes
from cifar_lib.recipes import Recipe, RecipeError

FIELDS = [field.name for field in dataclasses.fields(Recipe)]
# A value that the recipe "seed" does not have, for every field that stands alone.
OTHER = {
    "name": "other",
    "dataset": "synthetic",
    "model": "airbench",
    "activation": "relu",
    "augmentation": "none",
    "optimizer": "adam",
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "decay": 0.0,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "mixing": "mixup",
    "weight_averaging": 0.99,
    "batch_size": 33,
    "epochs": 140,
    "early_stopping_patience": 3,
    "precision": "float32",
    "seed": 1,
    "protocol": "deck",
    "train_size": 45_000,
    "validation_size": 4_999,
    "test_size": 10_000,
    "classes": data.class_names("cifar100")[:21],
}
# Those that need another beside them.
TOGETHER = [
    {"optimizer": "muon", "filter_learning_rate": 0.1},
    {"optimizer": "muon", "filter_learning_rate": 0.2},
    {"schedule": "cosine", "warmup": 0.1},
    {"model": "airbench", "image_sizes": (24, 32)},
    {"model": "airbench", "image_sizes": (32, 24)},
    {"model": "airbench", "whitening": False},
    {"model": "airbench", "identity_filters": False},
]

rates = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
shares = st.floats(0, 1, exclude_max=True)
SOLE = ("adam", "rmsprop", "sgd")
together = st.one_of(
    st.builds(dict, optimizer=st.sampled_from(SOLE), schedule=st.sampled_from(recipes.SCHEDULES)),
    st.builds(
        dict,
        optimizer=st.just("muon"),
        filter_learning_rate=rates,
        schedule=st.sampled_from(("cosine", "linear")),
        warmup=shares,
        model=st.sampled_from(recipes.RESIZABLE),
        image_sizes=st.none() | st.lists(st.integers(12, 32), min_size=1, max_size=3),
    ),
)
alone = st.fixed_dictionaries(
    {
        "name": st.text(min_size=1),
        "augmentation": st.sampled_from(recipes.AUGMENTATIONS),
        "learning_rate": rates,
        "decay": st.floats(min_value=0, allow_infinity=False),
        "weight_decay": st.floats(min_value=0, allow_infinity=False),
        "label_smoothing": shares,
        "mixing": st.none() | st.sampled_from(recipes.MIXINGS),
        "weight_averaging": shares,
        "epochs": st.integers(min_value=3),
        "precision": st.sampled_from(recipes.PRECISIONS),
        "seed": st.integers(min_value=0),
        "train_size": st.none() | st.integers(32, 40_000),
        "protocol": st.sampled_from(recipes.PROTOCOLS),
        "test_size": st.none() | st.integers(1, 10_000),
        "batch_size": st.integers(2, 32),
    }
)
made = st.builds(lambda one, other: Recipe(**one, **other), alone, together)


@settings(deadline=None)
@given(made)
def test_json_keeps_every_choice(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).run_name == recipe.run_name


@pytest.mark.parametrize(
    "choice", [{"classes": OTHER["classes"]}, {"model": "speedrun", "image_sizes": (20, 24, 32)}]
)
def test_json_keeps_a_tuple(choice):
    recipe = Recipe(**choice)
    *_, field = choice
    assert json.loads(recipe.to_json())[field] == list(choice[field])
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert getattr(Recipe.from_json(recipe.to_json()), field) == choice[field]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dataset": "cifar10"}, r"dataset 'cifar10' is unknown\. Did you mean 'cifar100'\?"),
        ({"model": "sead"}, r"model 'sead' is unknown\. Did you mean 'seed'\?"),
        ({"augmentation": "seed_layer"}, "'seed_layer' is unknown. Did you mean 'seed_layers'"),
        ({"optimizer": "ADAM"}, "'ADAM' is unknown. Did you mean 'adam'"),
        ({"schedule": "cosin"}, "'cosin' is unknown. Did you mean 'cosine'"),
        ({"precision": "bfloat"}, "'bfloat' is unknown. Did you mean 'bfloat16'"),
        ({"protocol": "hold-out"}, "'hold-out' is unknown. Did you mean 'holdout'"),
        ({"learning_rat": 0.1}, "'learning_rat' is unknown. Did you mean 'learning_rate'"),
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown.* Known: adam, rmsprop, sgd"),
        ({"learning_rate": -0.1}, r"learning_rate is -0\.1; .* above 0"),
        ({"learning_rate": 0}, r"learning_rate is 0\.0; .* above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; .* a finite number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; .* a finite number above 0"),
        ({"decay": -1e-6}, "decay is -1e-06; .* 0 or more"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"batch_size": 65, "train_size": 64}, "batch_size is 65, more than the 64 training"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0; it must be 1 or more"),
        ({"early_stopping_patience": 3, "protocol": "final"}, "needs a validation set"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"train_size": 0}, "train_size is 0; it must be 1 or more"),
        ({"train_size": 45_001}, "train_size is 45001; .*'holdout' has 45,000"),
        ({"train_size": 50_001, "protocol": "final"}, "train_size is 50001; .* has 50,000"),
        ({"validation_size": 0}, "validation_size is 0; it must be 1 or more"),
        ({"validation_size": 50_000}, "validation_size is 50000; it must leave some"),
        ({"test_size": 10_001}, "test_size is 10001; there are 10,000"),
        ({"test_size": -1}, "test_size is -1; it must be 0 or more"),
        ({"test_size": 0, "protocol": "deck"}, "'deck' validates on the test .* Use .* 'holdout'"),
        ({"test_size": 0, "protocol": "final"}, "'final' has no validation images"),
        ({"classes": ["apple"] * 2}, "name each class once"),
        ({"classes": []}, "name each class once"),
        ({"classes": ["apple", "beer"]}, "class 'beer' is unknown. Did you mean 'bee'"),
        ({"classes": ["apple", "bee"], "protocol": "final", "train_size": 1001}, "has 1,000"),
        ({"epochs": "3"}, "epochs is '3', of type str; it must be int"),
        ({"epochs": True}, "epochs is True, of type bool; it must be int"),
        ({"epochs": 3.0}, r"epochs is 3\.0, of type float; it must be int"),
        ({"epochs": None}, "epochs is None, of type NoneType; it must be int"),
        ({"learning_rate": True}, "learning_rate is True, of type bool; it must be float"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3', of type str; it must be float"),
        ({"train_size": 64.0}, r"train_size is 64\.0, of type float; it must be int or None"),
        ({"model": None}, "model is None, of type NoneType; it must be str"),
        ({"optimizer": "muon"}, r"filter_learning_rate is None; .*'muon' needs .* such as 0\.18"),
        (
            {"optimizer": "muon", "filter_learning_rate": -0.1},
            r"filter_learning_rate is -0\.1; .* a finite number above 0",
        ),
        (
            {"optimizer": "muon", "filter_learning_rate": float("nan")},
            "filter_learning_rate is nan; .* a finite number above 0",
        ),
        (
            {"optimizer": "sgd", "filter_learning_rate": 0.1},
            r"filter_learning_rate is 0\.1, .*'sgd' has one.* Use .*'muon', or .*=None",
        ),
        (
            {"schedule": "constant", "warmup": 0.1},
            r"warmup is 0\.1, .*'constant' has none\. Use 'cosine' or 'linear', or warmup=0",
        ),
        ({"warmup": 0.1}, "the schedule 'inverse_time' has none"),
        ({"schedule": "linear", "warmup": 1.0}, r"warmup is 1\.0; it must be in 0\.\.1, below 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0; it must be in 0\.\.1, below 1"),
        ({"label_smoothing": -0.1}, r"label_smoothing is -0\.1; it must be in 0\.\.1"),
        ({"weight_averaging": 1.0}, r"weight_averaging is 1\.0; it must be in 0\.\.1, below 1"),
        ({"mixing": "mix_up"}, r"mixing 'mix_up' is unknown\. Did you mean 'mixup'\?"),
        (
            {"mixing": "cutmix", "batch_size": 1},
            r"mixing is 'cutmix', but batch_size is 1: .* 2 or more, or mixing=None",
        ),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0; .* 0 or more"),
        (
            {"image_sizes": [24, 32]},
            r"image_sizes is \(24, 32\), .*'seed' takes .* 32 pixels alone\. "
            "Use one of airbench, speedrun, wide_resnet, or image_sizes=None",
        ),
        (
            {"model": "airbench", "image_sizes": [24, 33]},
            r"image_sizes has 33; a side must be in 12\.\.32",
        ),
        ({"model": "airbench", "image_sizes": [11]}, r"image_sizes has 11; .* 12\.\.32"),
        (
            {"model": "airbench", "image_sizes": [20, 24, 32], "epochs": 2},
            "image_sizes has 3 sizes for 2 epochs; .* 1 to as many as there are epochs",
        ),
        ({"model": "airbench", "image_sizes": []}, "image_sizes has 0 sizes for 139 epochs"),
        ({"model": "airbench", "image_sizes": [24.0]}, r"image_sizes is \[24\.0\], of type list"),
        ({"activation": "eluu"}, r"activation 'eluu' is unknown\. Did you mean 'elu'\?"),
        (
            {"whitening": False},
            r"whitening is False, .*'seed' has none\. Use one of airbench, speedrun, or "
            "whitening=True",
        ),
        (
            {"model": "wide_resnet", "identity_filters": False},
            "identity_filters is False, .*'wide_resnet' has none",
        ),
        ({"classes": "apple"}, "classes is 'apple', of type str"),
        ({"classes": ["apple", 3]}, "classes is .*, of type list"),
    ],
    ids=str,
)
def test_a_bad_choice_is_refused_by_name(choice, message):
    with pytest.raises(RecipeError, match=message):
        recipes.get("seed", **choice)


def test_a_bad_recipe_name_is_refused():
    with pytest.raises(RecipeError, match=r"recipe 'quik' is unknown\. Did you mean 'quick'\?"):
        recipes.get("quik")


def test_the_rate_of_filters_goes_with_muon():
    # A notebook's parameter cannot say that it should be none.
    assert recipes.get("fast", optimizer="sgd") == recipes.get(
        "fast", optimizer="sgd", filter_learning_rate=None
    )
    with pytest.raises(RecipeError, match=r"filter_learning_rate is 0\.1, .*'sgd' has one rate"):
        recipes.get("fast", optimizer="sgd", filter_learning_rate=0.1)


def test_types_that_lose_nothing_are_taken():
    rate = Recipe(learning_rate=1).learning_rate
    assert isinstance(rate, float) and rate == 1
    assert Recipe(classes=["bee", "bear"], validation_size=5).classes == ("bee", "bear")
    assert Recipe(learning_rate=1).run_name == Recipe(learning_rate=1.0).run_name


def test_a_choice_is_taken_back_by_none():
    plain = recipes.get("fast", image_sizes="none", activation="none", mixing="none")
    assert plain == recipes.get("fast", image_sizes=None)
    assert recipes.get("fast", **plain.changes) == plain
    with pytest.raises(RecipeError, match="epochs is 'none', of type str; it must be int"):
        recipes.get("fast", epochs="none")


def test_every_choice_is_in_the_run_name():
    changes = [{field: OTHER[field]} for field in OTHER] + TOGETHER
    assert {field for change in changes for field in change} == set(FIELDS)
    base = Recipe()
    names = [base.run_name] + [base.replace(**change).run_name for change in changes]
    assert len(set(names)) == len(names)
    assert base.replace().run_name == base.run_name


def test_runs_from_before_a_choice_keep_their_names():
    # The folder of a reference result that was made before the later choices came.
    name = "seed-provisional-holdout-seed0-12cf3668"
    assert recipes.get("seed-provisional", epochs=14).run_name == name
    assert (ROOT / "results" / name).is_dir()


@pytest.mark.parametrize(
    ("sizes", "epochs", "expected"),
    [
        (None, 3, [32, 32, 32]),
        ((24,), 2, [24, 24]),
        ((20, 20, 24, 28), 4, [20, 20, 24, 28]),
        ((16, 32), 6, [16, 16, 16, 32, 32, 32]),
        ((16, 32), 5, [16, 16, 16, 32, 32]),
        ((16, 24, 32), 4, [16, 16, 24, 32]),
    ],
)
def test_each_image_size_is_for_as_many_epochs(sizes, epochs, expected):
    recipe = Recipe(model="airbench", image_sizes=sizes, epochs=epochs)
    assert [recipe.image_size(epoch) for epoch in range(epochs)] == expected


def test_the_run_name_is_the_same_in_every_process():
    code = "from cifar_lib.recipes import get; print(get('quick', seed=7).run_name)"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert printed == {recipes.get("quick", seed=7).run_name}


def test_the_named_recipes_are_the_documented_ones():
    # The deck's best epoch; the rest is from Keras' cifar10_cnn example of 2018.
    before = recipes.get("seed-provisional")
    assert (before.optimizer, before.learning_rate, before.decay) == ("rmsprop", 1e-4, 1e-6)
    assert (before.batch_size, before.epochs, before.augmentation) == (32, 139, "seed")
    # Calibrated, as the results say.
    seed = recipes.get("seed")
    for name in ("learning_rate", "batch_size"):
        found = calibration.best_point(calibration.read(ROOT / "results" / "studies" / name))
        assert found == {name: getattr(seed, name)}
    assert before == seed.replace(name="seed-provisional", learning_rate=1e-4)
    for name, recipe in recipes.RECIPES.items():
        assert recipe.name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "seed", "--model", "sead"], "Did you mean 'seed'?"),
        (["train", "seed", "--learning-rate", "-1"], "learning_rate is -1.0"),
        (["train", "sed"], "Did you mean 'seed'?"),
    ],
    ids=["model", "value", "recipe"],
)
def test_the_command_line_refuses_before_tensorflow_and_data(arguments, message, tmp_path):
    code = """
import sys
from cifar_lib.__main__ import main
code = main(sys.argv[1:])
loaded = {"tensorflow", "keras", "numpy", "cifar_lib.data"} & set(sys.modules)
assert not loaded, loaded
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--runs-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
