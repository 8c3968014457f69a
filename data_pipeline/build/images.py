"""Bytes -> pixels -> bytes, safely: the header is looked at before anything is decoded, and every failure has a reason.

JPEG goes through simplejpeg, plain PNG through OpenCV, the rest through Pillow with a fixed list of formats (none of
which runs other programs). Sixteen bits keep their upper eight, transparency is laid on white, of an animation the
first frame is taken, EXIF orientation is applied. Letters: H, W height and width in pixels.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from data_pipeline.config import ImageRules


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "ICO", "AVIF", "PPM", "JPEG2000")

Image.init()  # formats can be named once they are registered

_ORIENTATION = 0x0112
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"


class Reject(Exception):
    """An image that becomes no sample; `reason` is what is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def decode_rgb(data: bytes, max_pixels: int = 89_478_485) -> np.ndarray:
    """-> uint8 [H, W, 3], upright. Raises Reject: empty_file, not_an_image, too_many_pixels, truncated, corrupt."""
    return _decode(data, max_pixels)[0]


def prepare(data: bytes, rules: ImageRules) -> tuple[bytes, str, int, int]:
    """-> (file, extension jpg or png, W, H) as it is stored. Raises Reject; also too_small."""
    pixels, kept = _decode(data, rules.max_pixels)
    if min(pixels.shape[:2]) < rules.min_side:
        raise Reject("too_small", f"{pixels.shape[1]} x {pixels.shape[0]}, the shorter side must have {rules.min_side}")
    if rules.mode == "none" and kept and rules.format in ("keep", kept):
        stored, kind = data, kept
    else:
        if rules.size is not None:
            pixels = resize(pixels, rules.mode, rules.size)
        kind = rules.format if rules.format != "keep" else ("jpeg" if data.startswith(_JPEG) else "png")
        stored = encode(pixels, kind, rules.quality)
    return stored, {"jpeg": "jpg", "png": "png"}[kind], pixels.shape[1], pixels.shape[0]


def resize(pixels: np.ndarray, mode: str, size: int) -> np.ndarray:
    """uint8 [H, W, 3] -> by `mode`; none: as it is, fit: longer side at most `size`, center_crop and stretch: square.

    Areas are averaged when shrinking, cubic interpolation when growing.
    """
    height, width = pixels.shape[:2]
    if mode == "none" or (mode == "fit" and max(height, width) <= size):
        return pixels
    if mode == "stretch":
        return _scale(pixels, size, size)
    side = max(height, width) if mode == "fit" else min(height, width)
    scaled = _scale(pixels, max(1, round(width * size / side)), max(1, round(height * size / side)))
    if mode == "fit":
        return scaled
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    return np.ascontiguousarray(scaled[top : top + size, left : left + size])


def encode(pixels: np.ndarray, kind: str, quality: int) -> bytes:
    """uint8 [H, W, 3] -> a JPEG (full colour resolution) or PNG file."""
    if kind == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444"))
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert done
    return data.tobytes()


# --------------------------------------------------------------------------------------------- decoding


def _decode(data: bytes, max_pixels: int) -> tuple[np.ndarray, str]:
    """-> (pixels, "jpeg" or "png" where the file shows them as it is, else empty)."""
    if not data:
        raise Reject("empty_file", "0 bytes")
    if data.startswith(_JPEG):
        pixels, colours = _fast_jpeg(data, max_pixels)
        if pixels is not None:
            one_picture = b"MPF\0" not in data[:65536]
            return pixels, "jpeg" if colours != "Gray" and one_picture else ""
    elif data.startswith(_PNG) and _is_plain_png(data):
        width, height = struct.unpack(">II", data[16:24])
        _check_pixels(width, height, max_pixels)
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if decoded is not None and decoded.shape[:2] == (height, width):
            return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), "png" if data[25] == 2 else ""
    return _slow(data, max_pixels), ""


def _fast_jpeg(data: bytes, max_pixels: int) -> tuple[np.ndarray | None, str]:
    """-> (pixels of an upright three- or one-channel JPEG without defects, colour space); None leaves it to Pillow."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None, ""
    _check_pixels(width, height, max_pixels)
    if colours in ("CMYK", "YCCK") or (b"Exif\0\0" in data[:65536] and _orientation(data) not in (0, 1)):
        return None, colours
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True), colours
    except ValueError:
        return None, colours


def _orientation(data: bytes) -> int:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF of any kind: upright
        return 1


def _is_plain_png(data: bytes) -> bool:
    """Eight bits, grey or RGB, whole, one frame, nothing transparent, no orientation, no compressed text (a bomb)."""
    if len(data) < 57 or data[24:26] not in (b"\x08\x00", b"\x08\x02") or data[-8:-4] != b"IEND":
        return False
    head = data[: data.find(b"IDAT")]
    return not any(chunk in head for chunk in (b"tRNS", b"acTL", b"eXIf", b"fcTL", b"iCCP")) and not any(
        chunk in data for chunk in (b"zTXt", b"iTXt")
    )


def _slow(data: bytes, max_pixels: int) -> np.ndarray:
    """Pillow, with everything that it can raise turned into a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(*image.size, max_pixels)
                image.load()
                return _to_rgb(image)
    except Reject:
        raise
    except Image.DecompressionBombError as error:
        raise Reject("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Reject("not_an_image", f"begins with {data[:16]!r}") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = "truncated" if "runcated" in str(error) or isinstance(error, EOFError) else "corrupt"
        raise Reject(reason, f"{type(error).__name__}: {error}"[:200]) from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded Pillow image -> uint8 [H, W, 3]."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF of any kind: upright
        image = image.copy()
    if image.mode.startswith("I") or image.mode == "F":
        grey = _to_eight_bits(np.asarray(image), image.mode)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, rgba)
    return np.array(image.convert("RGB"))


def _to_eight_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """[H, W] of 16 or 32 bits -> uint8 [H, W]; floats are taken as 0..1 where none is above 1, else as 0..255."""
    if mode == "F":
        finite = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
        return np.clip(np.rint(finite * 255 if finite.max() <= 1 else finite), 0, 255).astype(np.uint8)
    return (np.clip(grey.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Reject("too_many_pixels", f"{width} x {height}, at most {max_pixels} in all")
    if width * height == 0:
        raise Reject("corrupt", f"{width} x {height} pixels")


def _scale(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if (height, width) == pixels.shape[:2]:
        return pixels
    shrinks = width * height < pixels.shape[0] * pixels.shape[1]
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
