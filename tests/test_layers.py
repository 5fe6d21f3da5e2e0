"""Layers of the fast networks: each is what Keras' own is, or what its source says it does."""

import math

import numpy as np
import pytest
import tensorflow as tf

from cifar_lib import backend, layers, models, recipes
from cifar_lib.backend import keras
from cifar_lib.layers import (
    ACTIVATIONS,
    BatchNormalization,
    Conv2D,
    Dirac,
    InferenceSize,
    Whitening,
    silu,
)

# The largest error that rounding may cause, as a share of the largest value.
ROUNDING = {"float32": 2e-6, "mixed_bfloat16": 2**-7}
# The largest side of a square map whose filters' gradient is computed by products.
SIDE = math.isqrt(backend.MOST_PIXELS_FOR_PRODUCTS)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that bfloat16 can hold."""
    values = np.random.default_rng(seed).normal(size=shape)
    return tf.cast(tf.cast(values, tf.bfloat16), tf.float32).numpy()


def array(tensor) -> np.ndarray:
    return tf.cast(tensor, tf.float32).numpy()


def passes(layer, inputs: np.ndarray, upstream: np.ndarray, unknown: int = 1) -> list[np.ndarray]:
    """What training computes: outputs, then the gradients of the inputs and of the weights.

    Args:
        layer: as yet without weights if it has any: its kernel is drawn here.
        inputs: of the layer.
        upstream: the gradient of the outputs.
        unknown: as many first dimensions are unknown to the traced function.
    """
    layer.build(inputs.shape)
    for variable in layer.trainable_variables:
        variable.assign(normal(*variable.shape, seed=1))

    @tf.function(input_signature=[tf.TensorSpec([None] * unknown + list(inputs.shape[unknown:]))])
    def run(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) * upstream)
        weights = [variable.value for variable in layer.trainable_variables]
        return [outputs, *tape.gradient(loss, [inputs, *weights])]

    return [array(tensor) for tensor in run(tf.constant(inputs))]


@pytest.fixture
def own_way(monkeypatch):
    """In float32, too, what is computed as in bfloat16: there rounding hides no mistake."""
    monkeypatch.setattr(layers, "_slow_in_keras", lambda inputs, in_float32=False: True)


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        tolerance = ROUNDING[dtype] * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    ("sides", "kernel", "padding"),
    [
        (sides, kernel, padding)
        for sides in ((1, 1), (2, 2), (3, 5), (SIDE, SIDE), (SIDE + 1, SIDE + 1))
        for kernel in (1, 2, 3, 7)
        for padding in ("same", "valid")
        if padding == "same" or kernel <= min(sides)
    ],
    ids=str,
)
@pytest.mark.usefixtures("own_way")
def test_a_convolution_is_keras_own(sides, kernel, padding, dtype):
    if "bfloat16" in dtype and backend.resolve_precision("auto") != "bfloat16":
        pytest.skip("this processor has no bfloat16: TensorFlow rounds every partial sum to it")
    inputs = normal(4, *sides, 3)
    lost = kernel - 1 if padding == "valid" else 0
    upstream = normal(4, sides[0] - lost, sides[1] - lost, 5, seed=2)
    choices = {"padding": padding, "use_bias": False}
    found = passes(Conv2D(5, kernel, dtype=dtype, **choices), inputs, upstream)
    assert_close(found, passes(keras.layers.Conv2D(5, kernel, **choices), inputs, upstream), dtype)


@pytest.mark.parametrize(
    "choices",
    [{"strides": 2}, {"dilation_rate": 2}, {"groups": 3}, {"activation": "elu"}],
    ids=str,
)
@pytest.mark.usefixtures("own_way")
def test_a_convolution_has_keras_choices(choices):
    inputs, kinds = normal(4, 6, 6, 3), (Conv2D, keras.layers.Conv2D)
    shape = keras.layers.Conv2D(6, 3, **choices).compute_output_shape(inputs.shape)
    found, expected = (
        passes(layer(6, 3, **choices), inputs, normal(*shape, seed=2)) for layer in kinds
    )
    assert len(found) == 4, "it has a bias"
    assert_close(found, expected, "float32")


@pytest.mark.usefixtures("own_way")
def test_a_convolution_of_maps_of_unknown_size_is_keras_own():
    inputs, upstream = normal(4, 6, 6, 3), normal(4, 4, 4, 5, seed=2)
    found = passes(Conv2D(5, 3), inputs, upstream, unknown=3)
    assert_close(found, passes(keras.layers.Conv2D(5, 3), inputs, upstream), "float32")


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("choices", [{}, {"scale": False, "momentum": 0.6, "epsilon": 1e-5}])
def test_batch_normalization_is_keras_own(choices, dtype):
    inputs, upstream = normal(4, 3, 5, 6), normal(4, 3, 5, 6, seed=2)
    inputs = inputs + 3  # so that the moving statistics have far to go
    ours = BatchNormalization(dtype=dtype, **choices)
    theirs = keras.layers.BatchNormalization(**choices)
    assert_close(passes(ours, inputs, upstream), passes(theirs, inputs, upstream), dtype)
    for name in ("moving_mean", "moving_variance"):
        moved, expected = (getattr(layer, name).numpy() for layer in (ours, theirs))
        assert moved.dtype == np.float32
        np.testing.assert_allclose(moved, expected, rtol=ROUNDING[dtype])

    assert_close([array(ours(inputs))], [array(theirs(inputs))], dtype)
    before = ours.moving_mean.numpy()
    for layer in (ours, theirs):
        layer.trainable = False
    frozen = [array(layer(inputs, training=True)) for layer in (ours, theirs)]
    assert_close(frozen[:1], frozen[1:], dtype)
    np.testing.assert_array_equal(ours.moving_mean, before)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", recipes.ACTIVATIONS)
@pytest.mark.usefixtures("own_way")
def test_an_activation_and_its_gradient_are_keras_own(name, dtype):
    inputs = np.concatenate([normal(7, 5), [[-1e4, -20, 0, 20, 1e4]]]).astype("float32")
    upstream = normal(8, 5, seed=2)
    layer = keras.layers.Activation(ACTIVATIONS[name], dtype=dtype)
    theirs = passes(keras.layers.Activation(getattr(keras.ops, name)), inputs, upstream)
    for ours, expected in zip(passes(layer, inputs, upstream), theirs, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Pictures of shades and colours, uint8, in which neighbours are alike."""
    random = np.random.default_rng(0)
    waves = random.normal(size=(50, 10, 10, 3)).cumsum(axis=1).cumsum(axis=2)
    return np.clip(waves * (60, 40, 20) / 3 + (100, 120, 140), 0, 255).astype(np.uint8)


@pytest.fixture
def whitening(images) -> Whitening:
    layer = Whitening()
    layer.build((None, None, None, 3))
    layer.adapt(images)
    return layer


def test_whitened_patches_are_uncorrelated_and_of_equal_variance(images, whitening):
    outputs = array(whitening(images / np.float32(255)))
    assert outputs.shape == (50, 9, 9, 24) == whitening.compute_output_shape((50, 10, 10, 3))
    whitened = outputs[..., :12].reshape(-1, 12)
    covariance = np.cov(whitened, rowvar=False)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=2e-4)
    # Without the epsilon each would be 1; with it, that of direction k is v / (v + epsilon).
    variances = np.diag(covariance)
    assert (variances < 1).all() and (np.diff(variances) < 1e-4).all(), "the largest is the first"
    whitening.epsilon = 0
    whitening.adapt(images)
    exact = array(whitening(images / np.float32(255)))[..., :12].reshape(-1, 12)
    np.testing.assert_allclose(np.cov(exact, rowvar=False), np.eye(12), atol=2e-3)
    np.testing.assert_allclose(outputs[..., 12:], -outputs[..., :12], atol=1e-5)


def test_only_the_bias_of_the_whitening_is_trained(images, whitening):
    assert [variable.name for variable in whitening.trainable_variables] == ["bias"]
    before = array(whitening(images / np.float32(255)))
    bias = normal(24)
    whitening.bias.assign(bias)
    np.testing.assert_allclose(whitening(images / np.float32(255)), before + bias, atol=1e-5)


@pytest.mark.parametrize("side", [8, 12, 20])
def test_images_are_resized_for_inference_alone(side):
    images, layer = normal(3, 12, 12, 3), InferenceSize(side)
    np.testing.assert_array_equal(layer(images, training=True), images)
    resized = keras.ops.image.resize(
        images, (side, side), antialias=True, data_format="channels_last"
    )
    np.testing.assert_array_equal(layer(images), resized)
    assert layer.compute_output_shape((None, 12, 12, 3)) == (None, side, side, 3)
    assert layer.compute_output_shape((3, None, None, 3)) == (3, None, None, 3)
    again = InferenceSize.from_config(layer.get_config())
    np.testing.assert_array_equal(again(images), resized)


def test_a_network_that_resizes_is_copied_and_summed_up_at_its_size():
    model = models.build("speedrun", side=24)
    images = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
    copy = keras.models.model_from_json(model.to_json())
    copy.set_weights(model.get_weights())
    np.testing.assert_array_equal(copy(images), model(images))
    table = models.summary(model).set_index("kind")
    assert table.loc["InferenceSize", "output_shape"] == (24, 24, 3)
    assert table.loc["Whitening", "output_shape"] == (23, 23, 24)
    whole = models.summary(models.build("speedrun"))
    assert table["parameters"].sum() == whole["parameters"].sum()
    assert table["multiply_adds"].sum() < whole["multiply_adds"].sum()


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (4, 4), (6, 4)])
def test_dirac_filters_pass_channels_through(kernel, inputs, outputs):
    maps, same = normal(2, 5, 5, inputs), min(inputs, outputs)
    layer = keras.layers.Conv2D(outputs, kernel, padding="same", kernel_initializer=Dirac(3))
    through = array(layer(maps))
    np.testing.assert_array_equal(through[..., :same], maps[..., :same])
    # PyTorch's default: uniform within one over the root of the fan-in.
    rest = layer.kernel.numpy()[..., same:]
    bound = 1 / math.sqrt(kernel**2 * inputs)
    assert (np.abs(rest) <= bound).all()
    assert rest.size == 0 or np.abs(rest).max() > bound / 2


def test_the_seed_decides_the_random_filters():
    first, again, other = (array(Dirac(seed)((3, 3, 2, 8))) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.isin(first[..., 2:], other[..., 2:]).any()


def test_a_network_of_these_layers_is_copied_whole():
    inputs = keras.Input((None, None, 3))
    x = keras.layers.Activation(silu)(Whitening(patch=3, epsilon=0.1)(inputs))
    x = Conv2D(4, 3, kernel_initializer=Dirac(2))(x)
    model = keras.Model(inputs, BatchNormalization(scale=False, momentum=0.6)(x))
    copies = (
        keras.models.clone_model(model),
        keras.Model.from_config(model.get_config()),
        keras.models.model_from_json(model.to_json()),
    )
    maps = normal(2, 6, 6, 3)
    for copy in copies:
        assert [type(layer) for layer in copy.layers] == [type(layer) for layer in model.layers]
        for layer, original in zip(copy.layers, model.layers, strict=True):
            same = layer.get_config() | {"name": ""} == original.get_config() | {"name": ""}
            assert same, layer
        np.testing.assert_array_equal(copy.layers[3].kernel, model.layers[3].kernel)
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(copy(maps), model(maps))
