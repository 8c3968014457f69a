"""Progress lines and image grids for people to look at."""

import io
import math
import time
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from data_pipeline.outputs import write_whole

BAR = 24


class ProgressLine:
    """Prints a line every few steps: progress, speed, remaining time and the step's metrics."""

    def __init__(self, steps: int, start: int, every: int) -> None:
        self.steps = steps
        self.start = start
        self.every = every
        self.began = time.monotonic()

    def step(self, step: int, means: dict[str, float]) -> None:
        """Print every `every` steps and at the last step."""
        if step % self.every and step != self.steps:
            return
        rate = (step - self.start) / max(1e-9, time.monotonic() - self.began)
        left = int((self.steps - step) / max(rate, 1e-9))
        filled = BAR * step // self.steps
        bar = "█" * filled + "·" * (BAR - filled)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"{bar} {step}/{self.steps}  {rate:.2f} steps/s  {left // 60}:{left % 60:02d} left  {shown}", flush=True)


def save_grid(pixels: Tensor, path: Path, columns: int = 8, scale: int = 3) -> None:
    """Write the image of `grid` as a PNG, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png(grid(pixels, columns, scale)))


def grid(pixels: Tensor, columns: int = 8, scale: int = 3) -> Image.Image:
    """Arrange pixels float32 [n, 3, S, S] in [-1, 1] in one picture of ceil(n / columns) rows."""
    images = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rows = math.ceil(len(images) / columns)
    side = images.shape[-1]
    sheet = torch.full((rows * columns, 3, side, side), 255, dtype=torch.uint8)
    sheet[: len(images)] = images
    whole = sheet.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    picture = Image.fromarray(whole.contiguous().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png(picture: Image.Image, note: PngImagePlugin.PngInfo | None = None) -> bytes:
    """Encode a picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()
