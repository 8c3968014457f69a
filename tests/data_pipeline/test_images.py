import io
import json
import math
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin

from data_pipeline.config import ImageRules
from data_pipeline.images import Reject, decode, decode_rgb, encode, prepare, resize, scaled_size
from data_pipeline.ingest.report import write_report
from data_pipeline.shards.verify import verify


def picture(mode="RGB", size=(40, 30), kind="png", **options):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert("RGBA").resize(size).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data):
    """On white, upright: the plain way."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6

KINDS = [
    (picture(), 0),
    (picture("L"), 0),
    (picture("P"), 0),
    (picture("RGBA"), 0),
    (picture("LA"), 0),
    (picture("1"), 0),
    (picture(kind="webp", lossless=True), 0),
    (picture(kind="gif"), 0),
    (picture(kind="bmp"), 0),
    (picture("CMYK", kind="tiff"), 0),
    (picture("CMYK", kind="jpeg"), 0),
    (picture(kind="jpeg"), 3),  # another libjpeg's rounding and chroma upsampling
    (picture("L", kind="jpeg"), 3),
    (picture(kind="jpeg", exif=EXIF_TURNED), 3),
    (picture(kind="png", exif=EXIF_TURNED), 0),
]


@pytest.mark.parametrize(("data", "tolerance"), KINDS, ids=[str(number) for number in range(len(KINDS))])
def test_every_kind_of_image_decodes_to_upright_rgb_on_white(data, tolerance):
    found, expected = decode_rgb(data), by_pillow(data)
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("F", np.float32)])
def test_deep_greys_keep_their_upper_eight_bits(mode, dtype):
    grey = np.arange(0, 256, dtype=dtype).reshape(16, 16) * (257 if mode == "I;16" else 1)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "tiff")
    np.testing.assert_array_equal(decode_rgb(file.getvalue())[..., 0], np.arange(256).reshape(16, 16))


def bomb():
    data = bytearray(picture())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>not found</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (bomb(), "too_many_pixels"),
        (picture(kind="jpeg")[:-200], "truncated"),
        (picture()[: len(picture()) // 2], "truncated"),
        (picture(kind="png")[:60] + b"\0" * 40 + picture()[100:], "corrupt"),
    ],
)
def test_what_does_not_decode_is_rejected_with_its_reason(data, reason):
    with pytest.raises(Reject) as caught:
        decode_rgb(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "jpeg2000", "ico", "dib"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_pixel_limit_counts_before_anything_is_decoded(kind, mode, monkeypatch):
    def decoded(*_, **__):
        raise AssertionError("decoded before the header was looked at")

    data = picture(mode, kind=kind, **({"sizes": [(40, 30)]} if kind == "ico" else {}))
    decode_rgb(data, max_pixels=1200)
    for owner, name in [(simplejpeg, "decode_jpeg"), (cv2, "imdecode"), (ImageFile.ImageFile, "load")]:
        monkeypatch.setattr(owner, name, decoded)
    with pytest.raises(Reject, match="too_many_pixels: 40 x 30 pixels, at most 1199"):
        decode_rgb(data, max_pixels=1199)


@pytest.mark.parametrize(
    ("mode", "size", "height", "width"),
    [
        ("none", None, 30, 40),
        ("fit", 20, 15, 20),
        ("fit", 80, 30, 40),
        ("center_crop", 24, 24, 24),
        ("keep_ratio", 20, 20, 27),
        ("keep_ratio", 60, 60, 80),
        ("keep_ratio_largest", 20, 15, 20),
        ("keep_ratio_largest", 80, 60, 80),
        ("border", 24, 24, 24),
        ("stretch", 9, 9, 9),
    ],
)
def test_resize_modes_give_the_sizes_that_they_state(mode, size, height, width):
    assert resize(decode_rgb(picture()), mode, size or 0).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("mode", "size", "factor"),
    [("keep_ratio", 16, 2), ("keep_ratio_largest", 10, 4), ("fit", 20, 2), ("stretch", 8, 4)],
)
def test_shrinking_averages_areas(mode, size, factor):
    shape = (32, 32, 3) if mode == "stretch" else (32, 40, 3)
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    found = resize(pixels, mode, size)
    assert found.shape == (shape[0] // factor, shape[1] // factor, 3)
    for y in range(found.shape[0]):
        for x in range(found.shape[1]):
            block = pixels[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].astype(float)
            assert np.abs(found[y, x] - block.mean((0, 1))).max() <= 1


def test_center_crop_takes_the_middle():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert resize(pixels, "center_crop", 10).min() == 255


@pytest.mark.parametrize(
    ("data", "rules", "extension", "same"),
    [
        (picture(), {}, "png", True),
        (picture(kind="jpeg"), {}, "jpg", True),
        (picture(kind="jpeg", exif=EXIF_TURNED), {}, "jpg", False),
        (picture("RGBA"), {}, "png", False),
        (picture(kind="webp"), {}, "png", False),
        (picture(), {"format": "jpeg"}, "jpg", False),
        (picture(), {"format": "webp"}, "webp", False),
        (picture(kind="jpeg"), {"mode": "fit", "size": 20}, "jpg", False),
    ],
)
def test_plain_files_are_kept_and_others_written_anew(data, rules, extension, same):
    stored, kind, width, height, *_ = prepare(data, ImageRules(**rules))
    assert kind == extension and (stored == data) == same
    assert decode_rgb(stored).shape == (height, width, 3)


def test_a_border_is_white_and_on_both_sides():
    square = resize(np.zeros((10, 30, 3), np.uint8), "border", 30)
    assert square[:10].min() == square[20:].min() == 255 and square[10:20].max() == 0


def photo(width=1024, height=768):
    """A photograph-like JPEG: smooth, with edges and some grain."""
    y, x = np.mgrid[:height, :width]
    plane = 128 + 60 * np.sin(x / 37) + 50 * np.cos(y / 23) + 15 * ((x // 40 + y // 40) % 2)
    grain = np.random.default_rng(0).normal(0, 4, (height, width))
    return encode(
        np.clip(np.stack([plane, plane[::-1], 255 - plane], -1) + grain[..., None], 0, 255).astype("u1"), "jpeg", 90
    )


def psnr(first, second):
    return 10 * np.log10(255**2 / max(np.mean((first.astype(float) - second) ** 2), 1e-9))


@pytest.mark.parametrize("mode", ["fit", "keep_ratio", "keep_ratio_largest", "border", "center_crop", "stretch"])
@pytest.mark.parametrize("width", [1024, 1023, 300])
@pytest.mark.parametrize("size", [256, 96])
def test_scaled_decoding_gives_the_same_size_and_nearly_the_same_picture(mode, width, size):
    exact, scaled = (
        prepare(photo(width), ImageRules(mode=mode, size=size, format="png", decode=way)) for way in ("exact", "scaled")
    )
    assert exact[1:] == scaled[1:] and (exact.source_width, exact.source_height) == (width, 768)
    assert psnr(decode_rgb(exact.data), decode_rgb(scaled.data)) > 40


@pytest.mark.parametrize("mode", ["fit", "keep_ratio", "keep_ratio_largest", "border", "center_crop", "stretch"])
@pytest.mark.parametrize(("width", "height"), [(1024, 768), (1600, 1200), (700, 2000)])
def test_scaled_decoding_takes_the_smallest_fraction_that_keeps_enough(mode, width, height):
    data = photo(width, height)
    fractions = set()
    for size in (16, 64, 100, 128, 192, 256, 400, 900):
        rules = ImageRules(mode=mode, size=size, decode="scaled")
        rows, columns = decode(data, rules.max_pixels, rules).pixels.shape[:2]
        target_width, target_height = scaled_size(width, height, mode, size)
        left = min(width / target_width, height / target_height)
        fraction = 1 / 8 if left >= 16 else 1 / 4 if left >= 8 else 1 / 2 if left >= 3 else 1
        assert (rows, columns) == (math.ceil(height * fraction), math.ceil(width * fraction))
        fractions.add(fraction)
    assert len(fractions) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divisor", "remains", "median", "least"), [(2, 1.5, 37, 30), (2, 2, 41, 32), (4, 2, 36, 27.5)]
)
def test_scaled_decoding_of_real_photographs_has_the_stated_psnr(shared, divisor, remains, median, least):
    found = []
    with tarfile.open(shared / "data/photo-captions/images.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                data = tar.extractfile(member).read()
                width, height = Image.open(io.BytesIO(data)).size
                size = int(min(width, height) / divisor / remains)
                rules = {"mode": "keep_ratio", "size": size, "format": "png"}
                exact, scaled = (
                    decode_rgb(prepare(data, ImageRules(**rules, decode=way)).data) for way in ("exact", "scaled")
                )
                found.append(psnr(exact, scaled))
    assert len(found) >= 30 and np.median(found) > median and min(found) > least


def test_webp_quality_is_the_one_asked_for():
    pixels = decode_rgb(photo(256, 256))
    sizes = [len(encode(pixels, "webp", quality)) for quality in (30, 60, 90)]
    assert sizes == sorted(sizes) and psnr(decode_rgb(encode(pixels, "webp", 90)), pixels) > 33


def test_the_first_of_several_frames_is_taken_and_their_number_told():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:])
    prepared = prepare(file.getvalue(), ImageRules())
    assert prepared.frames == 3
    np.testing.assert_array_equal(decode_rgb(prepared.data), np.asarray(frames[0]))


def test_small_images_are_rejected_where_asked():
    with pytest.raises(Reject, match="too_small"):
        prepare(picture(), ImageRules(min_side=31))


LUMINANCE = [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55]  # ITU-T T.81, table K.1, its first rows


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_jpeg_quality_is_libjpegs_and_no_colour_is_thrown_away(quality):
    with Image.open(io.BytesIO(encode(decode_rgb(picture()), "jpeg", quality))) as image:
        table, sampling = image.quantization[0], JpegImagePlugin.get_sampling(image)
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality  # libjpeg, jpeg_quality_scaling
    wanted = [min(255, max(1, (value * scale + 50) // 100)) for value in LUMINANCE]
    assert list(table[: len(wanted)]) == wanted and sampling == 0  # 4:4:4


def test_png_is_lossless_and_jpeg_close():
    pixels = decode_rgb(picture(size=(64, 64)))
    np.testing.assert_array_equal(decode_rgb(encode(pixels, "png", 95)), pixels)
    assert np.abs(decode_rgb(encode(pixels, "jpeg", 95)).astype(int) - pixels).mean() < 2


def outcome(data):
    try:
        prepared = prepare(data, ImageRules())
    except Reject as reject:
        return "reject", reject.reason
    return ("decode" if prepared[0] == data else "convert"), ""


# what the index of nasty-images calls it -> what we may count it under; formats that we do not read are no images to us
REASONS = {
    "not_an_image_or_unsupported_format": {"not_an_image"},
    "truncated": {"truncated", "not_an_image", "too_many_pixels"},
    "corrupt": {"corrupt", "not_an_image"},
    "unsupported_variant": {"corrupt"},
    "too_many_pixels": {"too_many_pixels"},
    "uncommon_format": {"not_an_image"},
    "fuzzer_input": {"too_many_pixels"},
}


def expected_reasons(case):
    reasons = {name.rpartition("_")[0] if name.startswith("uncommon_format") else name for name in case["reasons"]}
    return set.union(set(), *(REASONS.get(name, set()) for name in reasons))


@pytest.mark.slow
def test_every_nasty_image_ends_as_its_index_says_in_bounded_time(shared):
    folder = shared / "data" / "nasty-images"
    cases = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    wrong = []
    with tarfile.open(folder / "images.tar") as tar:
        for case in cases:
            data = tar.extractfile(case["file"]).read()
            start = time.perf_counter()
            found, reason = outcome(data)
            if time.perf_counter() - start > 10:
                wrong.append((case["file"], "took more than 10 s"))
            # the index calls every RGB file plain; one that is neither JPEG nor PNG is stored anew
            acceptable = {*case["acceptable"], *(["convert"] if "decode" in case["acceptable"] else [])}
            if found not in acceptable or (found == "reject" and reason not in expected_reasons(case)):
                wrong.append((case["file"], found, reason, case["acceptable"], case["reasons"]))
            if found != "reject" and "high_bit_depth_or_float" not in case["reasons"]:
                ours, plain = decode_rgb(data), by_pillow(data)
                if ours.shape != plain.shape or np.abs(ours.astype(int) - plain).mean() > 1:
                    wrong.append((case["file"], "not the picture that Pillow shows"))
    assert len(cases) >= 117 and wrong == []


@pytest.mark.slow
def test_a_build_of_every_nasty_image_accounts_for_each_and_can_be_looked_at(shared, build_here, make_config, tmp_path):
    folder = shared / "data" / "nasty-images"
    cases = {json.loads(line)["file"]: json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()}
    rows = [json.dumps({"id": name, "image": name, "caption": name}) for name in cases]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    source = {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl", "key": "id", "images": f"{folder}/images.tar"}
    images = {"mode": "center_crop", "size": 32, "format": "jpeg"}
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": 50, "images": images}
    stats = build_here(**tree)
    assert stats["in"] == len(cases) == stats["out"] + sum(stats["rejected"].values())
    rejected = {row["key"]: row["reason"] for row in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()}
    for name, case in cases.items():
        stored = {"decode", "convert"} & set(case["acceptable"])
        assert (
            ("reject" in case["acceptable"] and rejected[name] in expected_reasons(case))
            if name in rejected
            else stored
        )
    verify(tmp_path / "out")
    assert "too_many_pixels" in Path(write_report(tmp_path / "out", build=make_config(**tree))).read_text()
