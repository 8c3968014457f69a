"""Scenes are a function of (seed, index); the checker recognises every true one and none of the false ones."""

import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ConfigError
from data_pipeline.scenes import (
    BACKGROUNDS,
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    SHAPES,
    TRAINED,
    Scene,
    check_scene,
    scene,
    scenes,
)

SIZES = (32, 48, 64)


def test_a_scene_is_a_function_of_seed_and_index():
    first, again = list(scenes(8, 32, seed=3)), list(scenes(5, 32, seed=3))
    assert first[:5] == again
    assert len({pair.key for pair in first}) == 8
    assert [pair.image for pair in scenes(5, 32, seed=4)] != [pair.image for pair in again]


def test_the_png_holds_the_drawn_pixels():
    pair = next(scenes(1, 40, seed=1))
    assert np.array_equal(np.array(Image.open(io.BytesIO(pair.image))), scene(1, 0).draw(40))


def test_captions_name_every_attribute_in_both_languages():
    one = scene(0, 5)
    assert all(word in caption for caption in one.english for word in one.attributes.values())
    assert all(SHAPES[one.shape][0] in caption and COLOURS[one.colour][0] in caption for caption in one.chinese)
    assert next(iter(scenes(1, 32, seed=0))).captions == scene(0, 0).english + scene(0, 0).chinese


def attributes(one: Scene) -> tuple[str, ...]:
    return tuple(one.attributes.values())


@pytest.mark.parametrize(("split", "allowed"), [("train", TRAINED), ("heldout", HELD_OUT)])
def test_each_split_draws_its_own_combinations_only(split, allowed):
    drawn = {attributes(scene(0, index, split)) for index in range(5000)}
    assert drawn <= set(allowed)
    assert len(drawn) > 0.8 * len(allowed)


@pytest.mark.slow
def test_splits_share_no_combination_and_thousands_of_scenes_are_distinct():
    assert not set(TRAINED) & set(HELD_OUT)
    assert len(HELD_OUT) == pytest.approx(len(COMBINATIONS) / 8, rel=0.05)
    drawn = [scene(0, index) for index in range(9000)]
    assert len({tuple(one.attributes.values()) for one in drawn}) > 1000
    assert len({caption for one in drawn for caption in one.english + one.chinese}) > 2000
    assert len({one.draw(32).tobytes() for one in drawn}) > 1900


def test_a_held_out_combination_is_seen_in_training_on_the_other_ground():
    grounds = set(BACKGROUNDS)
    for *rest, ground in HELD_OUT:
        assert all((*rest, other) in set(TRAINED) for other in grounds - {ground})


def test_unknown_split_is_named():
    with pytest.raises(ConfigError, match="split='valid'"):
        scene(0, 0, "valid")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ the checker: true scenes


@pytest.mark.slow
@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_true_scenes_are_found(image_size, split):
    drawn = [scene(7, index, split) for index in range(150)]
    found = [check_scene(one.draw(image_size), one.shape, one.colour).found for one in drawn]
    assert np.mean(found) >= 0.99


def soften(image: np.ndarray) -> np.ndarray:
    """A little blur and noise, as a decoder leaves them."""
    noise = np.random.default_rng(0).normal(0, 5, image.shape)
    return np.clip(cv2.GaussianBlur(image, (0, 0), 0.5) + noise, 0, 255).astype(np.uint8)


def shift_colours(image: np.ndarray) -> np.ndarray:
    return np.clip(image.astype(int) + np.array([8, -8, 8]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("damage", [soften, shift_colours])
def test_slightly_damaged_scenes_are_found(damage):
    drawn = [scene(8, index) for index in range(150)]
    found = [check_scene(damage(one.draw(32)), one.shape, one.colour).found for one in drawn]
    assert np.mean(found) >= 0.97


# ----------------------------------------------------------------------------------- the checker: false scenes


@pytest.mark.slow
@pytest.mark.parametrize("background", list(BACKGROUNDS))
def test_every_other_shape_and_colour_is_refused(background):
    for shape, colour in itertools.product(SHAPES, COLOURS):
        image = Scene(shape, colour, "small", "centre", background, 0.5, 0.5, 0.25).draw(32)
        for other in set(SHAPES) - {shape}:
            assert not check_scene(image, other, colour).shape_found
        for other in set(COLOURS) - {colour}:
            assert not check_scene(image, shape, other).colour_found


def two_shapes() -> np.ndarray:
    left, right = (Scene("circle", "red", "small", "left", "white", x, 0.5, 0.2).draw(64) for x in (0.25, 0.75))
    return np.minimum(left, right)


def two_colours() -> np.ndarray:
    image = Scene("circle", "red", "big", "centre", "white", 0.5, 0.5, 0.36).draw(64)
    image[:, 32:] = Scene("circle", "blue", "big", "centre", "white", 0.5, 0.5, 0.36).draw(64)[:, 32:]
    return image


def blob() -> np.ndarray:
    """A red Gaussian spot: round, but without an edge."""
    place = np.arange(64) - 31.5
    share = np.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 10**2))[..., None]
    return (250 + share * (np.array([220, 30, 35]) - 250)).astype(np.uint8)


def half_a_circle() -> np.ndarray:
    image = Scene("circle", "red", "big", "centre", "white", 0.5, 0.5, 0.36).draw(64)
    image[:, :32] = 250
    return image


FALSE_IMAGES = {
    "blank": np.full((64, 64, 3), 250, np.uint8),
    "all red": np.full((64, 64, 3), (220, 30, 35), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8),
    "two shapes": two_shapes(),
    "two colours": two_colours(),
    "a spot without edge": blob(),
    "half a circle": half_a_circle(),
    "a speck": Scene("circle", "red", "small", "centre", "white", 0.5, 0.5, 0.05).draw(64),
    "circle blurred to mush": cv2.GaussianBlur(
        Scene("circle", "red", "small", "centre", "white", 0.5, 0.5, 0.25).draw(64), (0, 0), 8
    ),
}


@pytest.mark.parametrize("name", FALSE_IMAGES)
def test_what_is_no_scene_is_refused(name):
    assert not any(check_scene(FALSE_IMAGES[name], shape, "red").found for shape in SHAPES)


def test_noise_is_never_a_scene():
    generator = np.random.default_rng(1)
    for _ in range(100):
        image = cv2.resize(generator.integers(0, 256, (8, 8, 3)).astype(np.uint8), (32, 32))
        check = check_scene(image, "circle", "red")
        assert check.shape is None or check.overlap < 0.9
