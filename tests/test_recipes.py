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
# A value that the recipe "seed" does not have, for every field.
OTHER = {
    "name": "other",
    "dataset": "synthetic",
    "augmentation": "none",
    "optimizer": "adam",
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "decay": 0.0,
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

made = st.builds(
    Recipe,
    name=st.text(min_size=1),
    augmentation=st.sampled_from(recipes.AUGMENTATIONS),
    optimizer=st.sampled_from(recipes.OPTIMIZERS),
    learning_rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    schedule=st.sampled_from(recipes.SCHEDULES),
    decay=st.floats(min_value=0, allow_infinity=False),
    epochs=st.integers(min_value=1),
    precision=st.sampled_from(recipes.PRECISIONS),
    seed=st.integers(min_value=0),
    train_size=st.none() | st.integers(32, 40_000),
    protocol=st.sampled_from(recipes.PROTOCOLS),
    test_size=st.none() | st.integers(1, 10_000),
    batch_size=st.integers(1, 32),
)


@settings(deadline=None)
@given(made)
def test_json_keeps_every_choice(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_json(recipe.to_json()).run_name == recipe.run_name


def test_json_keeps_a_tuple_of_classes():
    recipe = Recipe(classes=OTHER["classes"])
    assert isinstance(json.loads(recipe.to_json())["classes"], list)
    assert Recipe.from_json(recipe.to_json()) == recipe


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


def test_types_that_lose_nothing_are_taken():
    rate = Recipe(learning_rate=1).learning_rate
    assert isinstance(rate, float) and rate == 1
    assert Recipe(classes=["bee", "bear"], validation_size=5).classes == ("bee", "bear")
    assert Recipe(learning_rate=1).run_name == Recipe(learning_rate=1.0).run_name


def test_every_choice_is_in_the_run_name():
    assert set(OTHER) == set(FIELDS) - {"model"}, "there is one model only"
    base = Recipe()
    names = [base.run_name] + [base.replace(**{field: OTHER[field]}).run_name for field in OTHER]
    assert len(set(names)) == len(names)
    assert base.replace().run_name == base.run_name


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
