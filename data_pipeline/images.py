"""Safe decoding, resizing and encoding of images: headers are checked before decoding, every failure has a reason.

JPEG is decoded by simplejpeg, plain PNG by OpenCV, the rest by Pillow with a fixed list of formats (none of which runs
other programs). 16-bit images keep their upper eight bits, transparency is composited on white, an animation gives its
first frame, EXIF orientation is applied. Letters: H, W height and width in pixels.
This is the only code that decodes and resizes: the build, image codes, training and evaluation use these functions.
They run in the calling process; the build calls them through `sandbox`.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from data_pipeline.config import ImageRules


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "ICO", "AVIF", "PPM", "JPEG2000")

Image.init()  # registers the formats, so that they can be named

MAX_PIXELS = 100_000_000
"""Limit for one decoded image; a file that claims more is taken for an attack."""
MAX_SCALED_PIXELS = 2**31 // 3
"""Limit for an image scaled before cropping: 2 GiB, as much as a decoder may use. A long thin image can exceed it."""
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
# (divisor, least ratio of remaining to wanted pixels per side): libjpeg's fractions that decode faster than full size
# and come close to it. PSNR against exact, median of 39 photographs: a half at 1.5 has 37.5 dB, the others at 2 have
# 36.5 dB; three eighths take as long as a half.
SCALED = ((8, 2.0), (4, 2.0), (2, 1.5))

_ORIENTATION = 0x0112
_START_OF_SCAN = 0xDA
_JPEG = b"\xff\xd8\xff"
_ICO = b"\0\0\1\0"
_PNG = b"\x89PNG\r\n\x1a\n"


class Reject(Exception):
    """An image that does not become a sample. `reason` is counted, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Decoded(NamedTuple):
    """pixels: uint8 [H, W, 3]. kept: "jpeg" or "png" if the file may be stored unchanged, else empty.

    width, height: of the upright image, larger than those of `pixels` if a JPEG was decoded at a fraction.
    """

    pixels: np.ndarray
    kept: str
    width: int
    height: int
    frames: int = 1


class PreparedImage(NamedTuple):
    """An image as stored, with its size before (source_) and after; frames: in the source, the first is stored."""

    data: bytes
    extension: str
    width: int
    height: int
    source_width: int
    source_height: int
    frames: int


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image -> uint8 [H, W, 3], upright.

    Raises Reject: empty_file, not_an_image, too_many_pixels, too_much_memory, truncated, corrupt.
    """
    return decode(data, max_pixels).pixels


def prepare(data: bytes, rules: ImageRules) -> PreparedImage:
    """Decode a file and make the one to store by the rules. Raises Reject, also too_small."""
    return store(data, decode(data, rules.max_pixels, rules if rules.decode == "scaled" else None), rules)


def store(data: bytes, decoded: Decoded, rules: ImageRules) -> PreparedImage:
    """Make the file to store from an image that is decoded already. Raises Reject."""
    check_side(decoded, rules)
    width, height = decoded.width, decoded.height
    pixels = decoded.pixels
    if rules.mode == "none" and decoded.kept and rules.format in ("keep", decoded.kept):
        stored, kind = data, decoded.kept
    else:
        if rules.size is not None:
            pixels = resize(pixels, rules.mode, rules.size, (width, height))
        kind = rules.format if rules.format != "keep" else ("jpeg" if data.startswith(_JPEG) else "png")
        stored = encode(pixels, kind, rules.quality)
    return PreparedImage(
        stored, EXTENSIONS[kind], pixels.shape[1], pixels.shape[0], width, height, frames=decoded.frames
    )


def check_side(decoded: Decoded, rules: ImageRules) -> None:
    """Raise Reject, too_small, for an image with a side below `min_side`."""
    if min(decoded.width, decoded.height) < rules.min_side:
        shape = f"{decoded.width} x {decoded.height}"
        raise Reject("too_small", f"{shape}, the shorter side must be at least {rules.min_side}")


def scaled_size(width: int, height: int, mode: str, size: int) -> tuple[int, int]:
    """Return W and H after scaling and before cropping or padding, by `ImageRules.mode`."""
    if mode == "none" or (mode == "fit" and max(width, height) <= size):
        return width, height
    if mode == "stretch":
        return size, size
    side = min(width, height) if mode in ("center_crop", "keep_ratio") else max(width, height)
    return max(1, round(width * size / side)), max(1, round(height * size / side))


def resize(pixels: np.ndarray, mode: str, size: int, source: tuple[int, int] | None = None) -> np.ndarray:
    """Resize uint8 [H, W, 3] by `ImageRules.mode`; source: W, H of the full image if the pixels are a fraction of it.

    Shrinking averages areas, enlarging is cubic interpolation. Raises Reject, too_much_memory, for an image so long and
    thin that it cannot be scaled as a whole.
    """
    width, height = source or (pixels.shape[1], pixels.shape[0])
    scaled = _scale(pixels, *scaled_size(width, height, mode, size))
    if mode not in ("center_crop", "border"):
        return scaled
    height, width = scaled.shape[:2]
    if mode == "center_crop":
        top, left = (height - size) // 2, (width - size) // 2
        return np.ascontiguousarray(scaled[top : top + size, left : left + size])
    square = np.full((size, size, 3), 255, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = scaled
    return square


def encode(pixels: np.ndarray, kind: str, quality: int) -> bytes:
    """Encode uint8 [H, W, 3] as a JPEG (4:4:4), WebP or PNG file; quality: 1 to 100, PNG is lossless."""
    if kind == "jpeg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444"))
    options = [cv2.IMWRITE_PNG_COMPRESSION, 6] if kind == "png" else [cv2.IMWRITE_WEBP_QUALITY, quality]
    done, data = cv2.imencode(f".{kind}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
    assert done
    return data.tobytes()


# --------------------------------------------------------------------------------------------- decoding


def decode(data: bytes, max_pixels: int, wanted: ImageRules | None = None) -> Decoded:
    """Decode to upright RGB; a JPEG possibly at a fraction that suffices for the `wanted` size. Raises Reject."""
    if not data:
        raise Reject("empty_file", "0 bytes")
    if data.startswith(_JPEG):
        decoded = _fast_jpeg(data, max_pixels, wanted)
        if decoded is not None:
            return decoded
    elif data.startswith(_PNG) and _is_plain_png(data):
        width, height = struct.unpack(">II", data[16:24])
        _check_pixels(width, height, max_pixels)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if pixels is not None and pixels.shape[:2] == (height, width):
            return Decoded(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), "png" if data[25] == 2 else "", width, height)
    return _slow(data, max_pixels)


def _fast_jpeg(data: bytes, max_pixels: int, wanted: ImageRules | None) -> Decoded | None:
    """Decode an upright three- or one-channel JPEG without defects; None leaves it to Pillow."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_pixels(width, height, max_pixels)
    head = data[: _image_data(data)]
    if colours in ("CMYK", "YCCK") or (b"Exif\0\0" in head and _orientation(data) not in (0, 1)):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **_fraction(width, height, wanted))
    except ValueError:
        return None
    one_picture = b"MPF\0" not in head
    return Decoded(pixels, "jpeg" if colours != "Gray" and one_picture else "", width, height)


def _image_data(data: bytes) -> int:
    """Return the offset of the first scan of a JPEG, at most 65,536; metadata come before it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _START_OF_SCAN:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return min(at, 65_536) if at + 4 <= len(data) and data[at] == 0xFF else 65_536


def _fraction(width: int, height: int, wanted: ImageRules | None) -> dict[str, int]:
    """Return simplejpeg's arguments for the smallest fraction of SCALED that keeps enough pixels."""
    if wanted is None or wanted.size is None:
        return {}
    target_width, target_height = scaled_size(width, height, wanted.mode, wanted.size)
    for divisor, guard in SCALED:
        if width >= divisor * guard * target_width and height >= divisor * guard * target_height:
            return {"min_width": width // divisor, "min_height": height // divisor, "min_factor": 2}
    return {}


def _orientation(data: bytes) -> int:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF of any kind: upright
        return 1


def _is_plain_png(data: bytes) -> bool:
    """Return whether a PNG is 8-bit grey or RGB, complete, of one frame, opaque, without orientation, colour profile
    and compressed text (a bomb)."""
    if len(data) < 57 or data[24:26] not in (b"\x08\x00", b"\x08\x02") or data[-8:-4] != b"IEND":
        return False
    head = data[: data.find(b"IDAT")]
    return not any(chunk in head for chunk in (b"tRNS", b"acTL", b"eXIf", b"fcTL", b"iCCP")) and not any(
        chunk in data for chunk in (b"zTXt", b"iTXt")
    )


def _slow(data: bytes, max_pixels: int) -> Decoded:
    """Decode with Pillow, turning everything that it can raise into a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_icons(data, max_pixels)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(*image.size, max_pixels)
                frames = int(getattr(image, "n_frames", 1))
                image.seek(0)
                image.load()
                pixels = _to_rgb(image)
                return Decoded(pixels, "", pixels.shape[1], pixels.shape[0], frames)
    except Reject:
        raise
    except Image.DecompressionBombError as error:
        raise Reject("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Reject("not_an_image", f"begins with {data[:16]!r}") from None
    except MemoryError:
        raise Reject(
            "too_much_memory", f"{len(data)} bytes decompress to more than the decoder's memory limit"
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = "truncated" if "runcated" in str(error) or isinstance(error, EOFError) else "corrupt"
        raise Reject(reason, f"{type(error).__name__}: {error}"[:200]) from None


def _check_icons(data: bytes, max_pixels: int) -> None:
    """Check the sizes of the pictures in an ICO before Pillow opens it, which decodes them."""
    if not data.startswith(_ICO):
        return
    (count,) = struct.unpack_from("<H", data, 4)
    for entry in range(count):
        (start,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        if data[start : start + 8] == _PNG:
            width, height = struct.unpack_from(">II", data, start + 16)
        else:  # a bitmap, with its mask below it
            width, height = (abs(side) for side in struct.unpack_from("<ii", data, start + 4))
            height //= 2
        _check_pixels(width, height, max_pixels)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a loaded Pillow image -> uint8 [H, W, 3]."""
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
    """Convert [H, W] of 16 or 32 bits -> uint8 [H, W]; floats count as 0..1 if none is above 1, else as 0..255."""
    if mode == "F":
        finite = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
        return np.clip(np.rint(finite * 255 if finite.max() <= 1 else finite), 0, 255).astype(np.uint8)
    return (np.clip(grey.astype(np.int64), 0, 65535) >> 8).astype(np.uint8)


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise Reject("too_many_pixels", f"{width} x {height} pixels, at most {max_pixels} in total")
    if width * height == 0:
        raise Reject("corrupt", f"{width} x {height} pixels")


def _scale(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    if (height, width) == pixels.shape[:2]:
        return pixels
    if width * height > MAX_SCALED_PIXELS:
        raise Reject(
            "too_much_memory", f"{pixels.shape[1]} x {pixels.shape[0]} would be scaled to {width} x {height} pixels"
        )
    shrinks = width * height < pixels.shape[0] * pixels.shape[1]
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
