"""Synthetic captioned scenes: one coloured shape on a plain background, and a checker that recognises them.

A scene is a pure function of (seed, index). One in eight combinations of its five attributes never occurs in the
training split: to draw one, a generator must compose attributes that it saw separately, and `check_scene` decides from
pixels alone whether it did.
Letters: S image side in pixels. Shapes are drawn in units of their radius, x to the right, y down.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError
from data_pipeline.schema import Pair

Split = Literal["train", "heldout"]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Image = NDArray[np.uint8]

# ----------------------------------------------------------------------------------------------- attributes

SHAPES: dict[str, tuple[str, Callable[[Floats, Floats], Bools]]] = {  # name -> (Chinese name, inside(x, y))
    "circle": ("圆形", lambda x, y: x * x + y * y <= 0.92),
    "square": ("正方形", lambda x, y: np.maximum(abs(x), abs(y)) <= 0.84),
    "triangle": ("三角形", lambda x, y: (y <= 0.84) & (abs(x) <= 0.56 * (y + 1))),
    "cross": ("十字", lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.32) & (np.maximum(abs(x), abs(y)) <= 0.98)),
    "ring": ("圆环", lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.3)),
    "diamond": ("菱形", lambda x, y: abs(x) + abs(y) <= 1),
}
COLOURS: dict[str, tuple[str, tuple[int, int, int]]] = {  # name -> (Chinese name, RGB)
    "red": ("红色", (220, 30, 35)),
    "yellow": ("黄色", (250, 225, 30)),
    "green": ("绿色", (30, 150, 50)),
    "cyan": ("青色", (40, 205, 215)),
    "blue": ("蓝色", (35, 70, 220)),
    "purple": ("紫色", (130, 40, 160)),
}
BACKGROUNDS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "white": ("白色", (250, 250, 250)),
    "black": ("黑色", (12, 12, 12)),
}
SIZES: dict[str, tuple[str, float, tuple[float, ...]]] = {  # name -> (Chinese name, radius, distances from the middle)
    "small": ("小", 0.22, (0.125, 0.25)),
    "big": ("大", 0.33, (0.125,)),
}
POSITIONS: dict[str, tuple[str, int, int]] = {  # name -> (Chinese name, column, row), each -1, 0 or 1
    "top left": ("左上角", -1, -1),
    "top": ("上方", 0, -1),
    "top right": ("右上角", 1, -1),
    "left": ("左边", -1, 0),
    "centre": ("中间", 0, 0),
    "right": ("右边", 1, 0),
    "bottom left": ("左下角", -1, 1),
    "bottom": ("下方", 0, 1),
    "bottom right": ("右下角", 1, 1),
}
ENGLISH = ("a {size} {colour} {shape} at the {position} on {background}",)
CHINESE = ("{shape}，{colour}，{size}，{position}，{background}背景",)
HELD_OUT_OF = 8


def is_held_out(shape: str, colour: str, size: str, position: str, background: str) -> bool:
    """Return whether a combination is held out (one in HELD_OUT_OF); on the other background it is always trained."""
    tables: tuple[Mapping[str, object], ...] = (SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS)
    places = [
        list(table).index(word) for table, word in zip(tables, (shape, colour, size, position, background), strict=True)
    ]
    return sum(weight * place for weight, place in zip((1, 3, 5, 1, 4), places, strict=True)) % HELD_OUT_OF == 0


COMBINATIONS = tuple(itertools.product(SHAPES, COLOURS, SIZES, POSITIONS, BACKGROUNDS))
HELD_OUT = tuple(combination for combination in COMBINATIONS if is_held_out(*combination))
TRAINED = tuple(combination for combination in COMBINATIONS if not is_held_out(*combination))

OVERSAMPLING = 4  # supersampling factor per side, for smooth edges


@dataclass(frozen=True)
class Scene:
    """Attributes of one scene; `x`, `y`, `radius` in units of the image side.

    Centres are multiples of an eighth of the side, so a tokenizer with eight codes per side, or a multiple, sees the
    same patches wherever a shape is.
    """

    shape: str
    colour: str
    size: str
    position: str
    background: str
    x: float
    y: float
    radius: float

    @property
    def attributes(self) -> dict[str, str]:
        """The five words in the captions."""
        return {name: getattr(self, name) for name in ("shape", "colour", "size", "position", "background")}

    @property
    def english(self) -> tuple[str, ...]:
        """One English caption per template."""
        return tuple(template.format(**self.attributes) for template in ENGLISH)

    @property
    def chinese(self) -> tuple[str, ...]:
        """One Chinese caption per template."""
        tables = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS, "background": BACKGROUNDS}
        words = {name: str(tables[name][word][0]) for name, word in self.attributes.items()}  # type: ignore[index]
        return tuple(template.format(**words) for template in CHINESE)

    def draw(self, image_size: int) -> Image:
        """Draw the scene -> uint8 [S, S, 3], RGB."""
        ink, ground = (np.array(rgb, np.float64) for rgb in (COLOURS[self.colour][1], BACKGROUNDS[self.background][1]))
        cover = coverage(self.shape, self.x * image_size, self.y * image_size, self.radius * image_size, image_size)
        return np.rint(ground + cover[..., None] * (ink - ground)).astype(np.uint8)


def scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Return scene number `index` of a split, a pure function of the arguments."""
    if split not in ("train", "heldout"):
        raise ConfigError(f"split={split!r} is not a split of the scenes; use 'train' or 'heldout'")
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    choices = HELD_OUT if split == "heldout" else TRAINED
    shape, colour, size, position, background = choices[generator.integers(len(choices))]
    _, radius, distances = SIZES[size]
    _, column, row = POSITIONS[position]
    x, y = (0.5 + side * distances[generator.integers(len(distances))] for side in (column, row))
    return Scene(shape, colour, size, position, background, x, y, radius)


def scenes(count: int, image_size: int, seed: int = 0, split: Split = "train") -> Iterator[Pair]:
    """Yield the rows of the `scenes` source; the scene in row i depends on (seed, i) and the split alone."""
    return (scene_pair(seed, index, split, image_size) for index in range(count))


def scene_pair(seed: int, index: int, split: Split, image_size: int) -> Pair:
    """Return row `index` of the `scenes` source."""
    one = scene(seed, index, split)
    return Pair(
        key=f"scene-{split}-{index:07d}",
        image=encode_png(one.draw(image_size)),
        captions=one.english + one.chinese,
        meta={**one.attributes, "split": split},
    )


def encode_png(image: Image) -> bytes:
    """Encode uint8 [H, W, 3] RGB as PNG; equal pixels give equal bytes."""
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert done
    return data.tobytes()


def coverage(shape: str, x: float, y: float, radius: float, image_size: int) -> Floats:
    """Return the share of every pixel that the shape covers, float64 [S, S]; centre and radius in pixels."""
    fine = image_size * OVERSAMPLING
    grid = (np.arange(fine) + 0.5) / OVERSAMPLING
    inside = SHAPES[shape][1]((grid[None, :] - x) / radius, (grid[:, None] - y) / radius)
    return inside.reshape(image_size, OVERSAMPLING, image_size, OVERSAMPLING).mean((1, 3))


# -------------------------------------------------------------------------------------------- recognition


@dataclass(frozen=True)
class SceneCheck:
    """What an image shows (None if nothing is recognised), and whether it matches the request.

    `overlap` is the intersection over union with the best fitting shape, `lead` its margin over the second best.
    """

    shape: str | None
    colour: str | None
    shape_found: bool
    colour_found: bool
    overlap: float
    lead: float

    @property
    def found(self) -> bool:
        """Whether the image shows both the requested shape and the requested colour."""
        return self.shape_found and self.colour_found


MIN_OVERLAP = 0.82  # true scenes reach 0.94 or more, blurred or ragged shapes stay below
MIN_LEAD = 0.02
SLACK = 0.1  # an ink share below it counts as 0, above 1 - SLACK as 1, so that faint noise is no shape
MIN_CONTRAST = 40.0  # RGB distance between ink and background; less is an empty image
MAX_COLOUR_DISTANCE = 70.0  # RGB distance to the nearest named colour; the closest two named ones are 86 apart
MIN_AREA, MAX_AREA = 0.03, 0.5  # share of the image


def check_scene(image: Image, shape: str, colour: str) -> SceneCheck:
    """Check whether uint8 [S, S, 3] shows `shape` in `colour`, from pixels alone: background, ink, outline.

    The background is the median colour of the border. A pixel's share of ink is its projection on the line from
    background to ink. Each shape is then drawn at the centre and area found, and compared with those shares. Blurred
    edges count against an image; a wrong position or size does not.
    """
    cover, ink = _separate(image.astype(np.float64))
    if cover is None or ink is None:
        return SceneCheck(None, None, False, False, 0.0, 0.0)
    overlaps = sorted(((_best_overlap(name, cover), name) for name in SHAPES), reverse=True)
    (overlap, best), (second, _) = overlaps[:2]
    seen_shape = best if overlap >= MIN_OVERLAP and overlap - second >= MIN_LEAD else None
    distances = {name: float(np.linalg.norm(ink - np.array(rgb))) for name, (_, rgb) in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    seen_colour = nearest if distances[nearest] <= MAX_COLOUR_DISTANCE else None
    return SceneCheck(seen_shape, seen_colour, seen_shape == shape, seen_colour == colour, overlap, overlap - second)


def _separate(image: Floats) -> tuple[Floats | None, Floats | None]:
    """Return (share of ink float64 [S, S], ink colour float64 [3]); (None, None) unless there is exactly one shape."""
    side = image.shape[0]
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(image - ground, axis=-1)
    contrast = np.quantile(distance, 0.97)
    if contrast < MIN_CONTRAST or np.mean(np.linalg.norm(border - ground, axis=-1) > contrast / 2) > 0.25:
        return None, None
    ink = np.median(image[distance >= 0.8 * contrast], axis=0)
    line = ink - ground
    exact = np.clip((image - ground) @ line / (line @ line), 0, 1)
    share = np.clip((exact - SLACK) / (1 - 2 * SLACK), 0, 1)
    mask = (share > 0.5).astype(np.uint8)
    labels, names, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    if labels < 2 or not MIN_AREA * side * side <= mask.sum() <= MAX_AREA * side * side:
        return None, None
    if stats[1:, cv2.CC_STAT_AREA].max() < 0.9 * mask.sum():
        return None, None
    off_line = np.linalg.norm(image - ground - exact[..., None] * line, axis=-1)
    if np.mean(off_line[mask > 0] > 60) > 0.15:  # several colours inside the shape
        return None, None
    return share, ink


@cache
def _unit_moments(shape: str) -> tuple[float, float]:
    """Return (area, height of the centroid) of a shape of radius 1."""
    cover = coverage(shape, 64.0, 64.0, 50.0, 128)
    rows = (np.arange(128) + 0.5 - 64.0) / 50.0
    return float(cover.sum() / 50.0**2), float((cover.sum(1) * rows).sum() / cover.sum())


def _best_overlap(shape: str, cover: Floats) -> float:
    """Return the best intersection over union of `shape` with `cover`, float64 [S, S], at the centre and area of it."""
    side, total = cover.shape[0], float(cover.sum())
    grid = np.arange(side) + 0.5
    x, y = float((cover.sum(0) * grid).sum() / total), float((cover.sum(1) * grid).sum() / total)
    area, centroid = _unit_moments(shape)
    radius = float(np.sqrt(total / area))
    best = 0.0
    for scale in (0.95, 1.0, 1.05):
        drawn = coverage(shape, x, y - centroid * radius * scale, radius * scale, side)
        best = max(best, float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum()))
    return best
