import math

import numpy as np
import pytest

from cifar_lib import models
from cifar_lib.backend import keras
from cifar_lib.recipes import ACTIVATIONS, MODELS, RESIZABLE, WHITENED

layers = keras.layers


def test_summary_of_the_seed_network():
    table = models.summary(models.build("seed"))
    assert len(table) == 16
    assert table["parameters"].sum() == 6_777_060
    assert table["output_shape"][9] == (4, 4, 512)
    # By hand, from 3 + 2 for a convolution, + the step for a pooling that then doubles the step.
    assert list(table["receptive_field"][:10]) == [3, 5, 6, 6, 10, 14, 16, 16, 24, 32]
    # Positions x window x channels in x channels out, layer by layer.
    assert table["multiply_adds"].sum() == (
        32**2 * 9 * 3 * 128
        + 30**2 * 9 * 128 * 128
        + 15**2 * 9 * 128 * 256
        + 13**2 * 9 * 256 * 256
        + 6**2 * 9 * 256 * 512
        + 4**2 * 9 * 512 * 512
        + 2048 * 1024
        + 1024 * 100
    )


@pytest.mark.parametrize(
    "body",
    [
        [layers.Conv2D(4, 3, dilation_rate=2), layers.Conv2D(4, 5, strides=2), layers.Conv2D(4, 3)],
        [
            layers.DepthwiseConv2D(3, padding="same"),
            layers.AveragePooling2D(3),
            layers.Conv2D(2, 3),
        ],
        [layers.Conv2D(4, 7, strides=2), layers.BatchNormalization(), layers.Conv2D(4, 1)],
    ],
)
def test_receptive_field_is_what_an_output_depends_on(body):
    model = keras.Sequential([keras.Input((64, 64, 3)), *body])
    random = np.random.default_rng(0)
    picture = random.normal(size=(1, 64, 64, 3))
    middle = tuple(side // 2 for side in model.output_shape[1:3])
    # Change one column at a time and see whether the output in the middle changes.
    changed = np.repeat(picture, 64, axis=0)
    changed[np.arange(64), :, np.arange(64)] += random.normal(size=(64, 64, 3))
    outputs = model.predict_on_batch(np.concatenate([picture, changed]))[:, *middle]
    depends = np.flatnonzero(np.abs(outputs[1:] - outputs[0]).max(axis=-1) > 1e-6)
    assert np.ptp(depends) + 1 == models.summary(model)["receptive_field"].iloc[-1]


def test_summary_of_a_network_with_a_branch():
    picture = keras.Input((32, 32, 3))
    stem = layers.Conv2D(8, 3, padding="same", name="stem")(picture)
    branch = layers.Conv2D(8, 3, padding="same", name="branch")(stem)
    added = layers.Add(name="added")([stem, branch])
    pooled = layers.GlobalAveragePooling2D(name="pooled")(added)
    model = keras.Model(picture, layers.Dense(10, name="classes")(pooled))
    table = models.summary(model).set_index("layer")
    assert list(table.index) == ["stem", "branch", "added", "pooled", "classes"]
    assert table["parameters"].sum() == model.count_params()
    assert list(table["receptive_field"]) == [3, 5, 5, 32, 32]
    assert table["multiply_adds"]["branch"] == math.prod((32, 32, 3, 3, 8, 8))
    assert table["multiply_adds"]["classes"] == 80


def test_the_seed_network_is_the_decks():
    model = models.build("seed")
    kinds = [type(layer).__name__ for layer in model.layers]
    block = ["Conv2D", "Conv2D", "MaxPooling2D", "Dropout"]
    assert kinds == [*block * 3, "Flatten", "Dense", "Dropout", "Dense"]
    assert model.count_params() == 6_777_060

    configs = [layer.get_config() for layer in model.layers]
    convolutions = [config for config in configs if "filters" in config]
    assert [config["filters"] for config in convolutions] == [128, 128, 256, 256, 512, 512]
    assert [config["padding"] for config in convolutions] == ["same", "valid"] * 3
    assert {config["kernel_size"] for config in convolutions} == {(3, 3)}
    assert {config["pool_size"] for config in configs if "pool_size" in config} == {(2, 2)}
    assert [config["rate"] for config in configs if "rate" in config] == [0.25, 0.25, 0.25, 0.5]
    assert [config["units"] for config in configs if "units" in config] == [1024, 100]
    activations = [
        layer.activation.__name__ for layer in model.layers if "activation" in dir(layer)
    ]
    assert activations == ["elu"] * 7 + ["softmax"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_probabilities_in_float32(name, precision):
    policy = keras.config.dtype_policy()
    model = models.build(name, precision=precision)
    assert keras.config.dtype_policy() == policy, "the global policy is the caller's"
    assert {str(weight.dtype) for weight in model.weights} == {"float32"}
    assert model.layers[2].compute_dtype == precision

    images = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    probabilities = model.predict_on_batch(images)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (3, 100)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.fixture(scope="module")
def fast_networks() -> dict[str, keras.Model]:
    """Those for images of any side, adapted to noise."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    networks = {name: models.build(name) for name in RESIZABLE}
    for network in networks.values():
        models.adapt(network, noise)
    return networks


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        # NAVIER-STOKED's README: "The net needs 175M multiply-adds per image".
        ("speedrun", 8_614_206, 175.0e6),
        # By hand: whitening 6 + 2x2x3x24 + 24, six 3x3 convolutions, the shifts and moving
        # statistics of six normalisations, the classes. arXiv 2404.00498 has 1.97 M for 10 classes.
        (
            "airbench",
            318
            + 9 * (24 * 64 + 64**2 + 64 * 256 + 3 * 256**2)
            + 3 * (2 * 64 + 4 * 256)
            + 256 * 100,
            31**2 * (12 * 24 + 9 * 24 * 64)
            + 15**2 * 9 * (64**2 + 64 * 256)
            + 7**2 * 9 * 2 * 256**2
            + 3**2 * 9 * 256**2
            + 256 * 100,
        ),
    ],
)
def test_the_fast_networks_are_as_large_as_published(
    fast_networks, name, parameters, multiply_adds
):
    table = models.summary(fast_networks[name])
    assert fast_networks[name].count_params() == table["parameters"].sum() == parameters
    assert table["multiply_adds"].sum() == pytest.approx(multiply_adds, rel=1e-3)
    assert table["output_shape"].iloc[0] == (31, 31, 24)
    assert table["output_shape"].iloc[-1] == (100,)
    assert table["receptive_field"].iloc[-1] == 32, "all of the picture"


def test_the_wide_resnet_is_as_large_as_published(fast_networks):
    table = models.summary(fast_networks["wide_resnet"])
    # arXiv 1605.07146, table 5: 36.5 M; 5.2 G multiply-adds is what is reported of WRN-28-10.
    assert fast_networks["wide_resnet"].count_params() == pytest.approx(36.5e6, rel=0.002)
    assert table["multiply_adds"].sum() == pytest.approx(5.2e9, rel=0.02)
    sides = table["output_shape"].map(lambda shape: shape[0] if len(shape) == 3 else 1)
    assert list(dict.fromkeys(sides)) == [32, 16, 8, 1]
    assert sum(kind.startswith("Conv2D 3x3") for kind in table["kind"]) == 25  # and 3 of 1x1


@pytest.mark.parametrize("side", [32, 24, 20, 12])
@pytest.mark.parametrize("name", RESIZABLE)
def test_the_fast_networks_take_images_of_other_sides(fast_networks, name, side):
    images = np.random.default_rng(0).random((3, side, side, 3), np.float32)
    probabilities = fast_networks[name].predict_on_batch(images)
    assert probabilities.dtype == np.float32 and probabilities.shape == (3, 100)
    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.ptp(probabilities, axis=0).max() > 1e-4, "they depend on the picture"
    # A call that nothing traces gives the same.
    np.testing.assert_allclose(fast_networks[name](images), probabilities, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_only_what_whitens_is_adapted(name):
    model = models.build(name)
    before = model.get_weights()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    models.adapt(model, images)
    changed = [
        weight.path.split("/")[-1]
        for weight, old in zip(model.weights, before, strict=True)
        if not np.array_equal(weight.numpy(), old)
    ]
    assert sorted(changed) == (["deviation", "kernel", "mean"] if name in WHITENED else [])
    if changed:
        [layer] = [layer for layer in model.layers if "whitening" in layer.name]
        outputs = layer(images / np.float32(255)).numpy()[..., :12].reshape(-1, 12)
        np.testing.assert_allclose(np.cov(outputs, rowvar=False), np.eye(12), atol=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_decides_the_weights(name):
    first, again, other = (models.build(name, seed=seed).get_weights() for seed in (7, 7, 8))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        # Identity filters for all outputs, and the whitening before it is adapted, have no chance.
        fixed = a.ndim == 4 and (a.shape[2] >= a.shape[3] or not a.any())
        assert a.ndim == 1 or np.array_equal(a, c) == (name in WHITENED and fixed)


def test_the_weights_of_the_seed_network_are_glorots():
    kernels = [array for array in models.build("seed", seed=7).get_weights() if array.ndim > 1]
    # Glorot and Bengio 2010: uniform in +-sqrt(6 / (inputs + outputs)).
    for kernel in kernels:
        window = math.prod(kernel.shape[:-2])
        limit = math.sqrt(6 / (window * sum(kernel.shape[-2:])))
        assert 0.99 * limit < np.abs(kernel).max() <= limit
    assert len({kernel.flat[0] for kernel in kernels}) == len(kernels), "each layer has its own"


@pytest.mark.parametrize("name", WHITENED)
def test_without_whitening_the_first_filters_are_trained(name):
    model = models.build(name, whitening=False)
    [layer] = [layer for layer in model.layers if "whitening" in layer.name]
    assert {variable.name for variable in layer.trainable_variables} == {"kernel", "bias"}
    before = layer.kernel.numpy()
    assert 0 < np.abs(before).max() <= 1 / math.sqrt(12), "PyTorch's default"
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    models.adapt(model, images)
    np.testing.assert_array_equal(layer.kernel, before)
    np.testing.assert_allclose(layer.mean, images.mean((0, 1, 2)) / 255, atol=1e-4)


@pytest.mark.parametrize("name", WHITENED)
def test_without_identity_filters_all_are_random(name):
    for weight in models.build(name, identity_filters=False).trainable_variables:
        if len(weight.shape) == 4:
            height, width, inputs, _ = weight.shape
            filters = weight.numpy()
            assert np.abs(filters).max() <= 1 / math.sqrt(height * width * inputs)
            assert (filters != 0).all() and (filters != 1).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_an_activation_replaces_the_networks_own(name, activation):
    model = models.build(name, activation=activation)
    used = {layer.activation.__name__ for layer in model.layers if "activation" in dir(layer)}
    assert used - {"linear", "softmax"} == {activation}
