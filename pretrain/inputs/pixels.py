"""Encoded images -> pixel tensors. Crop and flip are drawn per sample, independent of rank and worker.

Letters: b batch, S image side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import BadSample
from data_pipeline.images import decode_rgb, resize
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator

if TYPE_CHECKING:
    from pretrain.config import DataConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], as in the authors' preprocessing
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def drawn_pixels(samples: list[Sample], image_size: int, data: DataConfig, seed: int) -> np.ndarray:
    """Decode each sample with its own random crop and flip -> uint8 [b, S, S, 3], RGB."""
    pictures = [
        pixels(s, image_size, data.crop_scale, data.flip, crop_generator(seed, s), data.crop_ratio) for s in samples
    ]
    return np.stack(pictures)


def crop_generator(seed: int, sample: Sample) -> np.random.Generator:
    """Return the random generator of this sample's crop and flip."""
    return sample_generator(seed, sample.epoch, sample.id, "crop")


def pixels(
    sample: Sample,
    image_size: int,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
    generator: np.random.Generator | None = None,
    crop_ratio: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Decode, crop, scale and randomly flip -> uint8 [S, S, 3], RGB.

    With crop_scale and crop_ratio of (1, 1), or without a generator, the result is that of `images.resize` in mode
    center_crop, which the build stores and image codes are made from. Otherwise it is a random rectangle, stretched to
    the square. Raises BadSample when there is no image, or it does not decode.
    """
    if sample.image is None:
        raise BadSample(f"sample {sample.key!r} has no image; this task needs one, use a dataset with images")
    try:
        image = decode_rgb(sample.image)
        drawn = None
        if generator is not None and (tuple(crop_scale), tuple(crop_ratio)) != ((1.0, 1.0), (1.0, 1.0)):
            drawn = _draw_crop(image, crop_scale, crop_ratio, generator)
        step = -1 if flip and generator is not None and generator.random() < 0.5 else 1
        if drawn is None:
            return np.ascontiguousarray(resize(image, "center_crop", image_size)[:, ::step])
        return resize(np.ascontiguousarray(drawn[:, ::step]), "stretch", image_size)
    except Exception as error:
        raise BadSample(
            f"sample {sample.key!r}: the image cannot be decoded ({error}); run `tessera data verify` on the dataset"
        ) from error


def _draw_crop(
    image: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """Crop a random rectangle: uint8 [H, W, 3] -> uint8 [h, w, 3].

    Its area is uniform in `scale`, in units of the image's largest square; its width / height is log-uniform in
    `ratio`; its place is uniform. A side larger than the image is clipped.
    """
    height, width = image.shape[:2]
    side = min(height, width) * float(np.sqrt(generator.uniform(*scale)))
    stretch = 1.0 if tuple(ratio) == (1.0, 1.0) else np.exp(generator.uniform(*np.log(ratio)) / 2)
    rows = min(height, max(1, round(side / stretch)))
    columns = min(width, max(1, round(side * stretch)))
    top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
    return image[top : top + rows, left : left + columns]


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [b, S, S, 3] -> float32 [b, 3, S, S], x / 127.5 - 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W], (x / 255 - mean) / deviation per channel."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return scaled.sub_(mean).div_(std).contiguous()


def to_images(pictures: Tensor) -> np.ndarray:
    """float [b, 3, S, S] in [-1, 1] -> uint8 [b, S, S, 3], rounded and clamped."""
    scaled = (pictures.detach().float() + 1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
