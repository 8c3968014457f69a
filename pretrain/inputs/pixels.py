"""Encoded images -> tensors of pixels. Crop and flip are drawn from the sample, never from a rank or a worker.

Letters: b batch, S image side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from data_pipeline.build.images import decode_rgb
from data_pipeline.errors import BadSample
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.vocabulary import Vocabulary
    from pretrain.config import RunConfig

MAX_PIXELS = 100_000_000  # of one decoded image; more is taken for an attack


class ReconstructionInputs:
    """Samples -> {"pixels": float32 [b, 3, S, S] in [-1, 1]}, for the VQGAN."""

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "vqgan"
        self.image_size = config.model.image_size
        self.data = config.data
        self.seed = config.seed

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples, in their order."""
        data = self.data
        pictures = [
            pixels(s, self.image_size, data.crop_scale, data.flip, crop_generator(self.seed, s), data.crop_ratio)
            for s in samples
        ]
        return {"pixels": to_tensor(np.stack(pictures))}


def crop_generator(seed: int, sample: Sample) -> np.random.Generator:
    """The random numbers of this sample's crop and flip."""
    return sample_generator(seed, sample.epoch, sample.id, "crop")


def pixels(
    sample: Sample,
    image_size: int,
    crop_scale: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
    generator: np.random.Generator | None = None,
    crop_ratio: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Decode, crop, flip by chance, resize -> uint8 [S, S, 3], RGB.

    The crop's area is drawn from `crop_scale`, in units of the largest square of the image, its width / height from
    `crop_ratio`, evenly in the logarithm, its place uniformly; a side beyond the image is cut to it. At (1, 1) both, or
    without a generator, it is that largest square, centred. Raises BadSample when the image does not decode.
    """
    try:
        image = decode_rgb(sample.image, MAX_PIXELS)
    except Exception as error:
        raise BadSample(
            f"sample {sample.key!r}: the image does not decode ({error}); run `tessera data verify` on the dataset"
        ) from error
    height, width = image.shape[:2]
    whole = min(height, width)
    top, left, rows, columns = (height - whole) // 2, (width - whole) // 2, whole, whole
    if generator is not None and (tuple(crop_scale), tuple(crop_ratio)) != ((1.0, 1.0), (1.0, 1.0)):
        side = whole * float(np.sqrt(generator.uniform(*crop_scale)))
        stretch = 1.0 if tuple(crop_ratio) == (1.0, 1.0) else np.exp(generator.uniform(*np.log(crop_ratio)) / 2)
        rows = min(height, max(1, round(side / stretch)))
        columns = min(width, max(1, round(side * stretch)))
        top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
    crop = image[top : top + rows, left : left + columns]
    if flip and generator is not None and generator.random() < 0.5:
        crop = crop[:, ::-1]
    return resize(crop, image_size)


def resize(image: np.ndarray, image_size: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [S, S, 3]: area average when shrinking, cubic when a side grows."""
    if image.shape[:2] == (image_size, image_size):
        return np.ascontiguousarray(image)
    method = cv2.INTER_AREA if min(image.shape[:2]) > image_size else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), (image_size, image_size), interpolation=method)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [b, S, S, 3] -> float32 [b, 3, S, S], x / 127.5 - 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def to_images(pictures: Tensor) -> np.ndarray:
    """float [b, 3, S, S] in [-1, 1] -> uint8 [b, S, S, 3], rounded and clamped."""
    scaled = (pictures.detach().float() + 1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
