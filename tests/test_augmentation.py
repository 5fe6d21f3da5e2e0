"""Augmentation: the deck's ImageDataGenerator, the same as layers, and the batches."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from tensorflow.keras.preprocessing.image import ImageDataGenerator

from cifar_lib import augmentation
from cifar_lib.augmentation import Batches, GeneratorPolicy
from cifar_lib.backend import keras
from cifar_lib.data import Split
from cifar_lib.recipes import AUGMENTATIONS, MIXINGS

# As the slide deck prints them.
DECK = dict(  # noqa: C408
    featurewise_center=False,
    samplewise_center=False,
    featurewise_std_normalization=False,
    samplewise_std_normalization=False,
    zca_whitening=False,
    rotation_range=0,
    width_shift_range=0.1,
    height_shift_range=0.1,
    horizontal_flip=True,
    vertical_flip=True,
)
DRAWS = 3_000


def noise(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), np.uint8)


def make_split(number: int) -> Split:
    labels = np.arange(number)
    return Split("train", noise(number), labels % 100, labels % 20, 7 * labels)


@pytest.fixture(scope="module")
def policies() -> dict[str, augmentation.Policy]:
    return {name: augmentation.make(name) for name in AUGMENTATIONS}


@pytest.fixture(scope="module")
def found(policies) -> dict[str, dict[str, np.ndarray]]:
    """Shifts in pixels (down, right) and flips of many draws, read off a picture of ramps."""
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    ramps = np.stack([8 * rows, 8 * columns, 0 * rows], -1).astype(np.uint8)
    images = np.broadcast_to(ramps, (DRAWS, 32, 32, 3))
    found = {}
    for name in ("seed", "seed_layers", "shift_flip"):
        out = policies[name](images, 3, 5, np.arange(DRAWS)) * (255 / 8)
        vertical = out[:, 20, 16, 0] < out[:, 12, 16, 0]
        horizontal = out[:, 16, 20, 1] < out[:, 16, 12, 1]
        out[vertical] = out[vertical, ::-1]
        out[horizontal] = out[horizontal, :, ::-1]
        shifts = {"down": 16 - out[:, 16, 16, 0], "right": 16 - out[:, 16, 16, 1]}
        found[name] = shifts | {"vertical": vertical, "horizontal": horizontal}
    return found


def test_the_arguments_are_the_decks():
    assert augmentation.SEED_ARGUMENTS == DECK
    assert set(augmentation.BUILDERS) == set(AUGMENTATIONS)
    assert set(augmentation.MIXERS) == set(MIXINGS)


def test_no_augmentation_only_scales(policies):
    images = np.arange(256, dtype=np.uint8).repeat(36).reshape(3, 32, 32, 3)
    out = policies["none"](images, 0, 0, np.arange(3))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, images / 255, rtol=1e-6)


def test_the_seed_policy_is_the_generator_used_by_hand():
    seeds = []

    class Recording(GeneratorPolicy):
        def transforms(self, given):
            seeds.extend(given)
            return super().transforms(given)

    images = noise(8)
    out = Recording(**augmentation.SEED_ARGUMENTS)(images, 1, 2, np.arange(8))
    by_hand = ImageDataGenerator(rescale=1 / 255, **DECK)
    state = np.random.get_state()
    for image, seed, ours in zip(images, seeds, out, strict=True):
        theirs = by_hand.standardize(by_hand.random_transform(image.astype(np.float32), seed))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.random.set_state(state)
    assert len(set(seeds)) == 8


def test_the_policy_called_seed_is_the_generator(policies):
    assert isinstance(policies["seed"], GeneratorPolicy)


def test_generator_and_layers_agree_on_the_same_shifts_and_flips(policies):
    images = noise(64)
    transforms = policies["seed"].transforms(np.arange(64))
    # The generator says where a pixel comes from, the layer where it goes.
    translations = -np.array([(t["tx"], t["ty"]) for t in transforms])
    flips = np.array([(t["flip_horizontal"], t["flip_vertical"]) for t in transforms], bool)
    assert len(np.unique(flips, axis=0)) == 4
    layers = policies["seed_layers"].apply(images, translations, flips)
    apply = policies["seed"].generator.apply_transform
    for image, transform, ours in zip(images, transforms, layers, strict=True):
        theirs = apply(image.astype(np.float32) / 255, transform)
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["seed", "seed_layers", "shift_flip"])
@pytest.mark.parametrize("direction", ["down", "right"])
def test_shifts_are_uniform_within_a_tenth_of_the_side(found, name, direction):
    shifts = found[name][direction]
    assert np.abs(shifts).max() <= 3.2 + 1e-3
    assert stats.kstest(shifts, "uniform", (-3.2, 6.4)).pvalue > 1e-3
    other = found["seed"][direction]
    if name != "seed":
        assert stats.ks_2samp(shifts, other).pvalue > 1e-3


@pytest.mark.parametrize("name", ["seed", "seed_layers", "shift_flip"])
def test_flips_are_fair_and_independent_of_each_other_and_the_shifts(found, name):
    draws = found[name]
    horizontal, vertical = draws["horizontal"], draws["vertical"]
    if name == "shift_flip":
        assert not vertical.any()
        assert stats.binomtest(int(horizontal.sum()), DRAWS).pvalue > 1e-3
    else:
        # Keras' own RandomFlip("horizontal_and_vertical") fills only two of these four.
        four = np.bincount(2 * horizontal + vertical, minlength=4)
        assert stats.chisquare(four).pvalue > 1e-3
    for shift in ("down", "right"):
        assert stats.ks_2samp(draws[shift][horizontal], draws[shift][~horizontal]).pvalue > 1e-3
    assert stats.pearsonr(draws["down"], draws["right"]).pvalue > 1e-3


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_pictures_augmentation_depends_on_seed_epoch_and_index_alone(policies, name):
    policy, images = policies[name], noise(40)
    indices = np.random.default_rng(1).permutation(50_000)[:40]
    whole = policy(images, 1, 2, indices)
    assert whole.dtype == np.float32 and whole.shape == images.shape
    assert whole.min() >= 0 and whole.max() <= 1
    shuffled = np.random.default_rng(2).permutation(40)
    for size in (1, 7, 40):
        for start in range(0, 40, size):
            rows = shuffled[start : start + size]
            np.testing.assert_array_equal(policy(images[rows], 1, 2, indices[rows]), whole[rows])
    if name != "none":
        for seed, epoch, others in ((2, 2, indices), (1, 3, indices), (1, 2, indices[::-1])):
            changed = policy(images, seed, epoch, others) != whole
            assert changed.any(axis=(1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_what_goes_in_and_numpys_global_generator_stay_as_they_are(policies, name):
    split = make_split(20)
    before = split.images.copy()
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    Batches(split, 8, policies[name], seed=1, shuffle=True)[0]
    np.testing.assert_array_equal(np.random.random(3), expected)
    np.testing.assert_array_equal(split.images, before)


VIEWS = [(down, right, flip) for down in range(5) for right in range(5) for flip in (False, True)]


def views_found(policies, images: np.ndarray, epoch: int, indices: np.ndarray) -> list[tuple]:
    """Which of `VIEWS`, made by hand, each image became under "crop_flip"."""
    out = policies["crop_flip"](images, 3, epoch, indices)
    found = []
    for image, ours in zip(images, out, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
        views = [padded[down : down + 32, right : right + 32] for down, right, _ in VIEWS]
        views = [v[:, ::-1] if flip else v for v, (*_, flip) in zip(views, VIEWS, strict=True)]
        [row] = np.flatnonzero(np.abs(np.array(views) / 255 - ours).max(axis=(1, 2, 3)) < 1e-6)
        found.append(VIEWS[row])
    return found


def test_crop_flip_shifts_by_whole_pixels_and_mirrors_the_border(policies):
    found = views_found(policies, noise(400), 0, np.arange(400))
    counts = np.array([found.count(view) for view in VIEWS])
    assert counts.min() > 0 and stats.chisquare(counts).pvalue > 1e-3, "all alike"
    assert stats.binomtest(sum(flip for *_, flip in found), 400).pvalue > 1e-3


def test_crop_flip_shows_both_orientations_in_turn(policies):
    indices = np.random.default_rng(1).permutation(50_000)[:60]
    found = [views_found(policies, noise(60), epoch, indices) for epoch in range(4)]
    flips = np.array([[flip for *_, flip in views] for views in found])
    np.testing.assert_array_equal(flips[1:], ~flips[:-1])
    shifts = [[shift for *shift, _ in views] for views in found]
    for one, other in itertools.pairwise(shifts):
        assert np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.2, "drawn anew"


def erased_pixels(policies, images: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """What erasing makes of images, and where, bool (N, 32, 32), it differs from "crop_flip"."""
    indices = np.arange(len(images))
    out = policies["crop_flip_erase"](images, 3, epoch, indices)
    return out, (out != policies["crop_flip"](images, 3, epoch, indices)).any(axis=3)


def test_erasing_fills_a_rectangle_of_every_other_picture_with_uniform_noise(policies):
    out, changed = erased_pixels(policies, noise(DRAWS), 5)
    areas = changed.sum(axis=(1, 2))
    assert stats.binomtest(int((areas > 0).sum()), DRAWS).pvalue > 1e-3
    for mask in changed[areas > 0]:
        np.testing.assert_array_equal(mask, mask.any(axis=1)[:, None] & mask.any(axis=0))
    assert stats.kstest(out[changed].ravel()[:10_000], "uniform").pvalue > 1e-3
    # Neither twice the same in an epoch, nor in the next one.
    assert len(np.unique(out[changed][:, 0])) > 0.99 * changed.sum()
    again, changed_again = erased_pixels(policies, noise(DRAWS), 6)
    both = changed & changed_again
    assert (out[both] == again[both]).mean() < 0.01


def test_erased_rectangles_are_as_large_and_as_far_aside_as_keras_makes_them(policies):
    layer = policies["crop_flip_erase"].layer
    drawn = layer.get_random_transformation(np.zeros((DRAWS, 32, 32, 3), np.float32), seed=1)
    masks = keras.ops.convert_to_numpy(drawn["batch_masks"])[..., 0]
    apply = keras.ops.convert_to_numpy(drawn["apply_erasing"])
    assert stats.binomtest(int(apply.sum()), DRAWS).pvalue > 1e-3
    _, changed = erased_pixels(policies, noise(DRAWS), 5)
    changed = changed[changed.any(axis=(1, 2))]
    for axis in (1, 2):
        for number in (
            lambda rows: rows.sum(axis=1),  # the side
            lambda rows: rows.argmax(axis=1),  # where it begins
        ):
            ours, theirs = number(changed.any(axis=3 - axis)), number(masks.any(axis=3 - axis))
            assert stats.ks_2samp(ours, theirs).pvalue > 1e-3
    sides = changed.any(axis=2).sum(axis=1), changed.any(axis=1).sum(axis=1)
    assert stats.pearsonr(*sides).pvalue > 1e-3, "independent"


def test_random_operations_are_all_alike_and_differ_from_picture_to_picture(policies):
    policy = policies["rand_augment"]
    drawn = policy.draw(3, 5, np.arange(DRAWS))
    assert len(drawn) == policy.operations == 2
    eleven = len(augmentation.OPERATIONS)
    (first, strengths), (second, other_strengths) = drawn
    pairs = np.bincount(eleven * first + second, minlength=eleven**2)
    assert stats.chisquare(pairs).pvalue > 1e-3
    columns = np.concatenate([strengths, other_strengths], axis=1)
    assert columns.dtype == np.float32
    for column in columns.T:
        assert stats.kstest(column, "uniform", (-0.5, 1.0)).pvalue > 1e-3
    assert (np.abs(np.corrcoef(columns.T) - np.eye(4)) < 0.1).all()


def test_random_operations_are_made_of_the_views_one_after_the_other(policies):
    policy, images, indices = policies["rand_augment"], noise(60), np.arange(60)
    assert list(augmentation.OPERATIONS) == policy.layer._AUGMENT_LAYERS
    expected = np.rint(policies["crop_flip"](images, 3, 5, indices) * 255)
    for chosen, strengths in policy.draw(3, 5, indices):
        for row, number in enumerate(chosen):
            name, one = list(augmentation.OPERATIONS)[number], slice(row, row + 1)
            expected[one] = policy.apply(name, expected[one], strengths[one])
    np.testing.assert_allclose(policy(images, 3, 5, indices), expected / 255, atol=1e-6)


def by_pillow(name: str, image: np.ndarray, strength: float) -> np.ndarray:
    """What the paper's code does with Pillow, for `strength` -1..1 of the largest."""
    picture = Image.fromarray(image)
    factor, pixels, shear = 1 + 0.9 * strength, 150 / 331 * 32 * strength, 0.3 * strength
    # Pillow counts from the corner of a pixel.
    sheared, shifted = (1, shear, -shear / 2, shear, 1, -shear / 2), (1, 0, -pixels, 0, 1, -pixels)
    affine = (Image.Transform.AFFINE, {"resample": Image.Resampling.BILINEAR})
    made = {
        "random_brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "random_color_degeneration": lambda: ImageEnhance.Color(picture).enhance(factor),
        "random_contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "random_sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "random_posterization": lambda: ImageOps.posterize(picture, 8 - round(4 * abs(strength))),
        "solarization": lambda: ImageOps.solarize(picture, 256 * (1 - abs(strength))),
        "auto_contrast": lambda: ImageOps.autocontrast(picture),
        "random_rotation": lambda: picture.rotate(30 * strength, affine[1]["resample"]),
        "random_shear": lambda: picture.transform((32, 32), affine[0], sheared, **affine[1]),
        "random_translation": lambda: picture.transform((32, 32), affine[0], shifted, **affine[1]),
    }
    return np.asarray(made[name]())


@pytest.mark.parametrize("strength", [-0.5, -0.2, 0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "border"),
    [
        ("random_brightness", 0),
        ("random_color_degeneration", 0),
        ("random_contrast", 0),
        ("random_sharpness", 1),
        ("random_posterization", 0),
        ("solarization", 0),
        ("auto_contrast", 0),
        ("random_rotation", 8),
        ("random_shear", 8),
        ("random_translation", 8),
    ],
)
def test_operations_are_those_of_the_paper(policies, name, border, strength):
    coarse = np.random.default_rng(0).integers(20, 230, (6, 4, 4, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in coarse])
    if name == "random_brightness":  # that Keras adds, alike for a middle grey alone
        images[:] = 128
    if name == "random_contrast":  # for Pillow around the grey picture's mean, not a channel's
        images[:] = images[..., :1]
    found = policies["rand_augment"].apply(
        name, images.astype(np.float32), np.full((6, 2), strength, np.float32)
    )
    assert found.dtype == np.float32
    expected = np.stack([by_pillow(name, image, strength) for image in images])
    # Pillow fills another border, and rounds.
    middle = slice(border, 32 - border)
    np.testing.assert_allclose(found[:, middle, middle], expected[:, middle, middle], atol=1.6)


@pytest.mark.parametrize("name", [*augmentation.OPERATIONS])
def test_an_operation_without_strength_leaves_an_image_as_it_is(policies, name):
    images = noise(5).astype(np.float32)
    images[:, 0, 0], images[:, 0, 1] = 0, 255  # nothing to be gained in contrast
    found = policies["rand_augment"].apply(name, images, np.zeros((5, 2), np.float32))
    if name == "equalization":
        images = augmentation.equalize(images)
    np.testing.assert_allclose(found, images, atol=1e-3)


def test_equalisation_is_that_of_keras_one_picture_at_a_time():
    images = noise(5).astype(np.float32)
    images[1] //= 8
    images[2, ..., 0] = 7
    images[3] = np.arange(1024).reshape(32, 32, 1) // 4
    images[4] += np.float32(0.4) * (images[4] < 255)  # between two grey levels
    layer = keras.layers.Equalization(dtype="float32")
    for image, found in zip(images, augmentation.equalize(images), strict=True):
        expected = keras.ops.convert_to_numpy(layer.transform_images(image[None], None))[0]
        np.testing.assert_array_equal(found, np.where(np.ptp(image, (0, 1)) > 0, expected, image))


@pytest.mark.parametrize("size", [12, 17, 24, 32, 40])
def test_resizing_is_keras_own(size):
    images = np.random.default_rng(0).random((3, 32, 32, 3), np.float32)
    expected = keras.ops.image.resize(images, (size, size), antialias=True)
    found = augmentation.resize(images, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, keras.ops.convert_to_numpy(expected), atol=1e-6)
    if size == 32:
        np.testing.assert_array_equal(found, images)


def read(batches: Batches, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    batches.epoch = epoch
    images, labels = zip(*(batches[n] for n in range(len(batches))), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("batch_size", [1, 32, 50, 99, 100])
def test_an_epoch_holds_every_picture_once_with_its_own_label(batch_size):
    split = make_split(99)  # its labels are the rows
    images, labels = read(Batches(split, batch_size, seed=1, shuffle=True), 3)
    assert sorted(labels) == list(range(99))
    np.testing.assert_allclose(images * 255, split.images[labels], atol=1e-3)
    unshuffled = read(Batches(split, batch_size), 3)[1]
    np.testing.assert_array_equal(unshuffled, np.arange(99))


def test_the_order_depends_on_seed_and_epoch_alone():
    split = make_split(99)

    def order(batch_size: int, seed: int, epoch: int) -> list[int]:
        return list(read(Batches(split, batch_size, seed=seed, shuffle=True), epoch)[1])

    assert order(32, 1, 3) == order(32, 1, 3) == order(50, 1, 3)
    different = [order(32, seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(labels) for labels in different}) == 6
    batches = Batches(split, 32, seed=1, shuffle=True)
    read(batches, 0)
    assert list(read(batches, 3)[1]) == order(32, 1, 3), "earlier epochs leave no trace"


def test_batches_are_of_the_size_that_is_asked_for(policies):
    split = make_split(9)
    choices = {"seed": 1, "shuffle": True}
    whole, labels = read(Batches(split, 4, policies["crop_flip"], **choices), 2)
    small, same_labels = read(Batches(split, 4, policies["crop_flip"], size=20, **choices), 2)
    np.testing.assert_array_equal(labels, same_labels)
    expected = keras.ops.image.resize(whole, (20, 20), antialias=True)
    np.testing.assert_allclose(small, keras.ops.convert_to_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_smoothed_labels_are_probabilities(smoothing):
    split = make_split(99)
    images, targets = read(Batches(split, 50, label_smoothing=smoothing), 0)
    np.testing.assert_array_equal(images, read(Batches(split, 50), 0)[0])
    assert targets.dtype == np.float32
    # 1 - a at the label, and the share a over all 100 classes, the label's own among them.
    expected = (1 - smoothing) * np.eye(100)[split.fine_labels] + smoothing / 100
    np.testing.assert_allclose(targets, expected, atol=1e-7)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert (targets.argmax(axis=1) == split.fine_labels).all()


def mixed(mixing: str, size: int, smoothing: float | None) -> tuple[np.ndarray, ...]:
    """A batch whose rows are its labels: images and targets, mixed and not."""
    split, choices = make_split(60), {"size": size, "seed": 1}
    images, targets = Batches(split, 60, mixing=mixing, label_smoothing=smoothing, **choices)[0]
    assert images.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-5)
    return images, targets, *Batches(split, 60, label_smoothing=smoothing or 0.0, **choices)[0]


def partner(row: int, targets: np.ndarray) -> int:
    """The row with which an image was mixed."""
    others = np.delete(np.arange(60), row)
    return others[targets[row, others].argmax()]


@pytest.mark.parametrize("smoothing", [None, 0.2])
def test_mixup_blends_images_and_labels_by_the_same_uniform_shares(smoothing):
    images, targets, plain, labels = mixed("mixup", 32, smoothing)
    kept = []
    for row in range(60):
        other = partner(row, targets)
        difference = plain[row] - plain[other]
        share = np.vdot(images[row] - plain[other], difference) / np.square(difference).sum()
        np.testing.assert_allclose(images[row], plain[other] + share * difference, atol=1e-5)
        expected = share * labels[row] + (1 - share) * labels[other]
        np.testing.assert_allclose(targets[row], expected, atol=1e-5)
        kept.append(share)
    assert stats.kstest(kept, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("size", "smoothing"), [(32, None), (32, 0.2), (12, None)])
def test_cutmix_pastes_a_rectangle_and_mixes_labels_by_its_pixels(size, smoothing):
    images, targets, plain, labels = mixed("cutmix", size, smoothing)
    shares = []
    for row in range(60):
        other = partner(row, targets)
        pasted = (images[row] != plain[row]).any(axis=2)
        rows, columns = pasted.any(axis=1), pasted.any(axis=0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)
        assert abs(rows.sum() - columns.sum()) <= 1, "of the image's shape"
        np.testing.assert_array_equal(images[row][pasted], plain[other][pasted])
        share = pasted.mean()
        expected = (1 - share) * labels[row] + share * labels[other]
        np.testing.assert_allclose(targets[row], expected, atol=1e-5)
        shares.append(share)
    assert stats.kstest(shares, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("mixing", MIXINGS)
def test_mixing_depends_on_seed_epoch_and_number_of_the_batch_alone(mixing):
    split = make_split(40)
    split.images[20:] = split.images[:20]  # so that both batches are alike

    def images(number: int, epoch: int, seed: int) -> np.ndarray:
        batches = Batches(split, 20, seed=seed, mixing=mixing)
        batches.epoch = epoch
        return batches[number][0]

    same = Batches(split, 20, seed=1, mixing=mixing)
    for same.epoch, number in ((0, 0), (3, 0), (0, 1)):
        np.testing.assert_array_equal(same[number][0], images(number, same.epoch, 1))
    different = [images(0, 0, 1), images(1, 0, 1), images(0, 3, 1), images(0, 0, 2)]
    for one, other in itertools.combinations(different, 2):
        assert (one != other).any(axis=(1, 2, 3)).mean() > 0.9


def test_any_number_of_workers_trains_in_the_same_order(policies):
    split = make_split(90)

    def network() -> keras.Model:
        zeros = keras.initializers.Zeros()
        layers = [
            keras.Input((32, 32, 3)),
            keras.layers.Flatten(),
            keras.layers.Dense(100, activation="softmax", kernel_initializer=zeros),
        ]
        model = keras.Sequential(layers)
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        return model

    def batches() -> Batches:
        return Batches(split, 8, policies["seed"], seed=1, shuffle=True)

    by_hand, ours = network(), batches()
    for ours.epoch in range(3):
        for number in range(len(ours)):
            by_hand.train_on_batch(*ours[number])
    for workers in (1, 2, 5):
        model, ours = network(), batches()
        ours.workers = workers

        class Epochs(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch: int, logs: dict | None = None, ours=ours) -> None:
                ours.epoch = epoch

        model.fit(ours, epochs=3, shuffle=False, verbose=0, callbacks=[Epochs()])
        for trained, expected in zip(model.get_weights(), by_hand.get_weights(), strict=True):
            np.testing.assert_allclose(trained, expected, atol=1e-6)
