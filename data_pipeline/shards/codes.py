"""Image codes beside the shards: what an image tokenizer is, and how its codes are stored.

This package knows tokenizers only through `ImageTokenizer`; the command line hands one over from outside.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np


class ImageTokenizer(Protocol):
    """Pixels <-> codes. `id`: 12 hex digits over weights, config, preprocessing and dtype policy."""

    @property
    def id(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    @property
    def codes_per_image(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """images: uint8 [B, H, W, 3] -> uint16 [B, codes_per_image]"""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes: uint16 [B, codes_per_image] -> uint8 [B, H, W, 3]"""
        ...


TokenizerFactory = Callable[[str], ImageTokenizer]
