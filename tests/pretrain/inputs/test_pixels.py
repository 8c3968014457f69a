"""Crops and flips belong to the sample; images and codes that do not fit are named."""

import io

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.config import ImageRules
from data_pipeline.errors import BadSample, DataError
from data_pipeline.images import decode_rgb, encode, prepare
from data_pipeline.scenes import encode_png
from data_pipeline.schema import Sample
from data_pipeline.shards.codes import crops_of
from pretrain.inputs.pixels import crop_generator, pixels, to_images, to_tensor

GRADIENT = np.stack(np.broadcast_arrays(np.arange(60)[:, None], 2 * np.arange(90)[None], 7), -1).astype(np.uint8)


def sample(image: np.ndarray | bytes, number: int = 0, epoch: int = 0, position: int = 0) -> Sample:
    data = image if isinstance(image, bytes) else encode_png(image)
    return Sample(number, epoch, position, f"key-{number}", image=data, texts=("a caption",))


def test_without_crop_the_largest_centred_square_is_taken():
    assert np.array_equal(pixels(sample(GRADIENT), 60), GRADIENT[:, 15:75])


def blurred_noise(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


@pytest.mark.slow
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    image_size=st.sampled_from([16, 33, 64, 256]),
    kind=st.sampled_from(["png", "jpeg"]),
)
@settings(max_examples=40, deadline=None)
def test_training_the_build_and_image_codes_see_the_same_centre_square(height, width, image_size, kind):
    one = sample(encode(blurred_noise(height, width), kind, 95))
    trained = pixels(one, image_size)
    rules = ImageRules(mode="center_crop", size=image_size, format="png")
    assert np.array_equal(trained, crops_of(decode_rgb(one.image), image_size, 1)[0])
    assert np.array_equal(trained, decode_rgb(prepare(one.image, rules).data))
    assert np.array_equal(trained, pixels(one, image_size, generator=crop_generator(0, one)))


def test_a_mirrored_centre_square_is_the_mirrored_crop_of_the_image_codes():
    one = sample(blurred_noise(427, 640), 0)
    plain = pixels(one, 256)
    found = [
        pixels(sample(one.image, n), 256, flip=True, generator=crop_generator(0, sample(b"", n))) for n in range(9)
    ]
    assert np.array_equal(plain, crops_of(decode_rgb(one.image), 256, 1)[0])
    assert {np.array_equal(each, plain) for each in found} == {True, False}
    assert all(np.array_equal(each, plain) or np.array_equal(each, plain[:, ::-1]) for each in found)


def test_an_image_too_long_and_thin_to_be_scaled_is_a_bad_sample_and_takes_no_memory():
    thin = sample(np.zeros((1, 60_000, 3), np.uint8), 7)
    with pytest.raises(BadSample, match="'key-7'.*too_much_memory"):
        pixels(thin, 512)


def test_a_crop_is_a_square_of_the_image_with_an_area_in_the_scale():
    for number in range(30):
        one = sample(GRADIENT, number)
        found = pixels(one, 60, (0.25, 0.5), False, crop_generator(0, one)).astype(int)
        side = np.sqrt(found[-1, 0, 0] - found[0, 0, 0] + 1) ** 2
        assert 60 * 0.5 - 3 <= side <= 60 * 0.71 + 3


def test_a_crop_depends_on_seed_epoch_and_sample_and_not_on_the_position():
    def crop(seed: int, number: int, epoch: int, position: int) -> bytes:
        one = sample(GRADIENT, number, epoch, position)
        return pixels(one, 32, (0.2, 0.9), True, crop_generator(seed, one)).tobytes()

    assert crop(0, 1, 2, 3) == crop(0, 1, 2, 99)
    assert len({crop(0, 1, 2, 3), crop(1, 1, 2, 3), crop(0, 2, 2, 3), crop(0, 1, 3, 3)}) == 4


def test_a_resized_crop_has_an_area_and_a_ratio_from_their_ranges():
    found = []
    for number in range(200):
        one = sample(GRADIENT, number)
        crop = pixels(one, 60, (0.3, 0.6), False, crop_generator(0, one), (0.5, 2.0)).astype(int)
        height, width = crop[-1, 0, 0] - crop[0, 0, 0] + 1, (crop[0, -1, 1] - crop[0, 0, 1]) / 2 + 1
        found.append((width * height / 3600, width / height))
    areas, ratios = np.array(found).T
    assert 0.25 < areas.min() < 0.35 and 0.55 < areas.max() < 0.65
    assert 0.45 < ratios.min() < 0.6 and 1.7 < ratios.max() < 2.2
    assert abs(np.log(ratios).mean()) < 0.1  # as often wide as high


def test_a_crop_wider_than_the_image_is_cut_to_it():
    tall = sample(np.zeros((90, 20, 3), np.uint8))
    assert pixels(tall, 16, (1.0, 1.0), False, crop_generator(0, tall), (4.0, 4.0)).shape == (16, 16, 3)


def test_half_of_the_samples_are_flipped():
    whole = pixels(sample(GRADIENT), 60)
    flips = 0
    for number in range(200):
        one = sample(GRADIENT, number)
        found = pixels(one, 60, (1.0, 1.0), True, crop_generator(0, one))
        flips += np.array_equal(found, whole[:, ::-1])
        assert np.array_equal(found, whole) or np.array_equal(found, whole[:, ::-1])
    assert 70 < flips < 130


@pytest.mark.parametrize("image_size", [16, 60, 100])
def test_resizing_keeps_a_plain_colour(image_size):
    plain = np.full((60, 60, 3), (10, 200, 30), np.uint8)
    found = pixels(sample(plain), image_size)
    assert (found == plain[0, 0]).all() and found.shape[0] == image_size


def test_jpeg_and_png_are_decoded_alike():
    plain, file = np.full((32, 32, 3), (10, 200, 30), np.uint8), io.BytesIO()
    Image.fromarray(plain).save(file, "JPEG", quality=95)
    ours = pixels(sample(file.getvalue()), 32).astype(int)
    assert np.abs(ours - pixels(sample(plain), 32)).max() <= 2


def test_an_image_that_does_not_decode_is_named():
    with pytest.raises(DataError, match="'key-4'.*cannot be decoded"):
        pixels(sample(b"no image at all", 4), 32)


def test_pixels_become_minus_one_to_one_and_back():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = to_tensor(images)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert float(tensor.min()) == -1 and float(tensor.max()) == 1
    assert np.array_equal(to_images(tensor), images)
    assert np.array_equal(
        to_images(tensor * 3),
        np.clip(np.rint((tensor.numpy() * 3 + 1) * 127.5), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1),
    )


def test_a_sample_without_an_image_is_refused_by_the_task_that_needs_one():
    with pytest.raises(BadSample, match="'key-3' has no image"):
        pixels(Sample(0, 0, 0, "key-3", texts=("a caption",)), 16)
