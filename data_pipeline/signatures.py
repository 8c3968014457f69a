"""Compact signatures of images: similar images have nearly the same ones."""

import cv2
import numpy as np

_SIDE, _KEPT = 32, 8
_PLAIN = 16 * _SIDE  # a coefficient of this size has an amplitude of about one grey level
_CELLS = 8
COLOUR_BYTES = 2 * _CELLS * _CELLS


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """uint8 [H, W, 3] -> 64 bits: signs of the lowest 8 x 8 cosine frequencies about their median (pHash).

    Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1. Depends on
    brightness only (`colour_signature` on colour); None for an image too plain to compare.
    """
    grey = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float64)
    low = np.rint(cv2.dct(small)[:_KEPT, :_KEPT] * 16).ravel()  # integers, so that float rounding decides nothing
    if np.abs(low[1:]).max() < _PLAIN:
        return None
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def colour_signature(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] -> the mean red and blue differences (YCrCb, 128 is grey) of 8 x 8 cells, COLOUR_BYTES long.

    Never all zero, which marks a row with an unknown signature.
    """
    small = cv2.resize(np.ascontiguousarray(pixels), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    cells = cv2.resize(small, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(cells, cv2.COLOR_RGB2YCrCb)[..., 1:].tobytes()
