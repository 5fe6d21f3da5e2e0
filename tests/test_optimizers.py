"""Muon and the linear schedule, against their definitions computed in numpy."""

import numpy as np
import pytest

from cifar_lib.backend import keras
from cifar_lib.optimizers import LinearSchedule, Muon, orthogonalize


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def by_singular_values(matrix: np.ndarray, steps: int) -> np.ndarray:
    """The quintic of https://kellerjordan.github.io/posts/muon, applied to singular values."""
    left, values, right = np.linalg.svd(matrix.astype("float64"), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (12, 12), (1, 5)], ids=str)
def test_orthogonalization_is_a_polynomial_of_the_singular_values(shape, steps):
    matrix = 20 * normal(*shape)
    found = keras.ops.convert_to_numpy(orthogonalize(keras.ops.convert_to_tensor(matrix), steps))
    np.testing.assert_allclose(found, by_singular_values(matrix, steps), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(60, 12), (12, 60)], ids=str)
def test_five_steps_bring_singular_values_near_one(shape, dtype):
    matrix = normal(*shape) * np.geomspace(1, 30, shape[1], dtype="float32")
    out = orthogonalize(keras.ops.cast(matrix, dtype), 5)
    assert keras.backend.standardize_dtype(out.dtype) == dtype
    out = keras.ops.convert_to_numpy(keras.ops.cast(out, "float32"))
    values = np.linalg.svd(out, compute_uv=False)
    assert values.min() > 0.65 and values.max() < 1.25


def test_no_gradient_is_no_step():
    np.testing.assert_array_equal(orthogonalize(keras.ops.zeros((4, 3)), 3), np.zeros((4, 3)))


def moved(optimizer, start: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """The values of one variable after each step."""
    variable = keras.Variable(start)
    optimizer.build([variable])
    values = []
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        values.append(keras.ops.convert_to_numpy(variable.value).copy())
    return values


@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (2, 2, 8, 4)], ids=str)
def test_filters_move_as_their_source_says(shape):
    rate, outputs = 0.1 * 0.5, shape[-1]
    gradients = [normal(*shape, seed=seed) for seed in (1, 2, 3)]
    expected, momentum, values = normal(*shape).astype("float64"), 0, []
    for gradient in gradients:
        momentum = 0.6 * momentum + gradient
        step = (gradient + 0.6 * momentum).reshape(-1, outputs)
        expected = expected * np.sqrt(outputs) / np.linalg.norm(expected)
        expected = expected - rate * by_singular_values(step, 3).reshape(shape)
        values.append(expected)
    for found, wanted in zip(moved(Muon(0.1, 0.5), normal(*shape), gradients), values, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_filter_bank_keeps_its_direction_and_gets_its_norm():
    start = 7 * normal(3, 3, 4, 6)
    [found] = moved(Muon(1e-9, 1.0), start, [normal(3, 3, 4, 6, seed=1)])
    assert np.linalg.norm(found) == pytest.approx(np.sqrt(6), rel=1e-5)
    np.testing.assert_allclose(found, start * np.sqrt(6) / np.linalg.norm(start), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    start, gradients = normal(3, 3, 4, 6), [normal(3, 3, 4, 6, seed=seed) for seed in (1, 2)]
    usual = moved(Muon(0.1, 0.5), start, gradients)
    scaled = moved(Muon(0.1, 0.5), start, [scale * gradient for gradient in gradients])
    np.testing.assert_allclose(scaled, usual, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (5, 4)], ids=str)
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_all_else_moves_by_nesterov_sgd(shape, momentum):
    gradients = [normal(*shape, seed=seed) for seed in (1, 2, 3)]
    muon = Muon(0.1, 5.0, momentum=momentum, weight_decay=0.01)
    sgd = keras.optimizers.SGD(0.1, momentum=momentum, nesterov=True, weight_decay=0.01)
    np.testing.assert_array_equal(
        moved(muon, normal(*shape), gradients), moved(sgd, normal(*shape), gradients)
    )
    assert Muon(0.1, 5.0).momentum == 0.9


def test_the_average_of_the_weights_is_kept_beside_them():
    start, gradients = normal(3, 3, 4, 6), [normal(3, 3, 4, 6, seed=seed) for seed in (1, 2, 3)]
    plain = moved(Muon(0.1, 0.5), start, gradients)
    averaging = Muon(0.1, 0.5, use_ema=True, ema_momentum=0.8)
    variable = keras.Variable(start)
    for gradient, expected in zip(gradients, plain, strict=True):
        averaging.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value), expected)
    averaging.finalize_variable_values([variable])
    average = plain[0]
    for value in plain[1:]:
        average = 0.8 * average + 0.2 * value
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable.value), average, atol=1e-6)


def test_the_configuration_makes_the_same_optimizer():
    choices = {"momentum": 0.8, "filter_momentum": 0.7, "steps": 2, "compute_dtype": "bfloat16"}
    choices |= {"use_ema": True, "ema_momentum": 0.9}
    usual = Muon(LinearSchedule(0.1, 20, 0.25), 0.5, weight_decay=0.02, **choices)
    again = Muon.from_config(usual.get_config())
    assert again.get_config() == usual.get_config()
    assert choices.items() <= again.get_config().items()
    start, gradients = normal(3, 3, 4, 6), [normal(3, 3, 4, 6, seed=seed) for seed in (1, 2)]
    np.testing.assert_array_equal(moved(again, start, gradients), moved(usual, start, gradients))


@pytest.mark.parametrize(
    ("steps", "warmup", "top"),
    [(100, 0.25, 25), (10, 0.5, 5), (1_000, 0.1, 100), (8, 0.875, 7)],
)
def test_the_linear_schedule_rises_to_the_peak_and_falls_to_zero(steps, warmup, top):
    schedule = LinearSchedule(0.4, steps, warmup)
    rates = keras.ops.convert_to_numpy(schedule(np.arange(steps + 4)))
    # The first step already has a rate; the step after the last would have none.
    expected = np.append(np.arange(1, top + 1) / top, np.linspace(1, 0, steps - top + 1))
    np.testing.assert_allclose(rates[: steps + 1], 0.4 * expected, atol=1e-6)
    assert rates.min() >= 0 and rates.max() == rates[top - 1] == pytest.approx(0.4)
    np.testing.assert_array_equal(rates[steps:], 0)
    again = LinearSchedule.from_config(schedule.get_config())
    np.testing.assert_array_equal(again(np.arange(steps + 4)), rates)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0.0, [1, 0.8, 0.6, 0.4, 0.2, 0]),
        # The peak lies half a step after the first.
        (0.1, [1, 4 / 4.5, 3 / 4.5, 2 / 4.5, 1 / 4.5, 0]),
    ],
)
def test_without_a_step_of_warm_up_the_linear_schedule_falls_after_the_first(warmup, expected):
    rates = keras.ops.convert_to_numpy(LinearSchedule(0.4, 5, warmup)(np.arange(6)))
    np.testing.assert_allclose(rates, 0.4 * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 0.9), (2, 0.9), (3, 0.4)])
def test_a_short_linear_schedule_is_within_the_peak(steps, warmup):
    *rates, last = keras.ops.convert_to_numpy(
        LinearSchedule(0.4, steps, warmup)(np.arange(steps + 1))
    )
    assert min(rates) > 0 and max(rates) == pytest.approx(0.4) and last == 0
