"""Images from text: a trained GPT writes codes, the image tokenizer draws them."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from data_pipeline.errors import ConfigError
from data_pipeline.shards.codes import ImageTokenizer
from data_pipeline.vocabulary import Vocabulary
from pretrain.checkpoint.trained import load_trained
from pretrain.inputs.codes import text_ids
from pretrain.interchange.tokenizer import load_tokenizer
from pretrain.models.gpt import Gpt

BATCH = 64  # prompts decoded side by side; guidance doubles the rows
LABEL_LINES, LINE_HEIGHT = 2, 12
LABEL_HEIGHT = LABEL_LINES * LINE_HEIGHT + 6
CELL = 160  # pixels of a picture in the grid
FONT = ImageFont.load_default(10)


def main(
    run: str,
    prompt: str,
    count: int = 4,
    out: str | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    seed: int = 0,
) -> list[Path]:
    """Write `count` images of `prompt` and a labelled grid into `out` (default: RUN/samples); -> paths, grid first."""
    if count < 1 or temperature < 0 or top_k < 0:
        raise ConfigError(f"count={count}, temperature={temperature}, top_k={top_k}: count from 1, the others from 0")
    model, config = load_trained(run)
    if not isinstance(model, Gpt) or config.data.tokenizer is None or config.data.vocabulary is None:
        raise ConfigError(f"{run} trained a {config.model.kind}, which draws nothing; name the run of a gpt")
    tokenizer, vocabulary = load_tokenizer(config.data.tokenizer), Vocabulary(config.data.vocabulary)
    check_fit(model, tokenizer, vocabulary)
    images = generate_images(model, tokenizer, vocabulary, [prompt] * count, temperature, top_k, guidance, seed)
    folder = Path(out) if out else Path(run) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", prompt).strip("-")[:60] or "prompt"
    paths = [folder / f"{name}-seed{seed}-grid.png"]
    paths += [folder / f"{name}-seed{seed}-{index}.png" for index in range(count)]
    note = PngImagePlugin.PngInfo()
    note.add_itxt("prompt", prompt)
    pictures = [labelled_grid(images, [prompt] * count), *(Image.fromarray(image) for image in images)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path, pnginfo=note)
        print(path)
    return paths


def check_fit(model: Gpt, tokenizer: ImageTokenizer, vocabulary: Vocabulary) -> None:
    """Raises ConfigError when the three were not made for each other."""
    config = model.config
    asked = {"image_tokens": config.image_tokens, "image_vocab": config.image_vocab}
    given = {"image_tokens": tokenizer.codes_per_image, "image_vocab": tokenizer.codebook_size}
    for name, value in asked.items():
        if given[name] != value:
            raise ConfigError(
                f"the model has {name}={value}, tokenizer {tokenizer.id} has {given[name]}; "
                "name the tokenizer that the run was trained with"
            )
    if vocabulary.size > config.text_vocab:
        raise ConfigError(
            f"the vocabulary has {vocabulary.size} pieces, the model text_vocab={config.text_vocab}; "
            "name the vocabulary that the run was trained with"
        )


def generate_images(
    model: Gpt,
    tokenizer: ImageTokenizer,
    vocabulary: Vocabulary,
    prompts: list[str],
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """-> uint8 [n, S, S, 3], one image per prompt; image i is drawn with the random numbers of (seed, i)."""
    config = model.config
    text = torch.from_numpy(np.stack([text_ids(prompt, vocabulary, config.text_tokens) for prompt in prompts]))
    streams = (np.random.Generator(np.random.Philox(key=[seed, index])) for index in range(len(prompts)))
    uniforms = torch.from_numpy(np.stack([stream.random(config.image_tokens) for stream in streams]))
    was_training = model.training
    model.eval()
    codes = [
        model.sample(some.to(device_of(model)), temperature, top_k, guidance, numbers.to(device_of(model))).cpu()
        for some, numbers in zip(text.split(BATCH), uniforms.split(BATCH), strict=True)
    ]
    model.train(was_training)
    return tokenizer.decode(torch.cat(codes).numpy().astype(np.uint16))


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def labelled_grid(images: np.ndarray, labels: list[str], columns: int | None = None) -> Image.Image:
    """uint8 [n, S, S, 3] and n labels -> one picture, enlarged by whole pixels; about square unless told.

    The built-in font knows Latin letters only: other labels are left out (the PNG's "prompt" text has them).
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    scale = max(1, CELL // images.shape[1])
    side = scale * images.shape[1]
    grid = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + LABEL_HEIGHT + 4) + 4), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = 4 + index % columns * (side + 4), 4 + index // columns * (side + LABEL_HEIGHT + 4)
        grid.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left, top + LABEL_HEIGHT))
        for number, line in enumerate(label_lines(draw, label, side) if label.isascii() else []):
            draw.text((left, top + 3 + number * LINE_HEIGHT), line, fill="black", font=FONT)
    return grid


def label_lines(draw: ImageDraw.ImageDraw, label: str, width: int) -> list[str]:
    """`label` broken between words into lines of at most `width` pixels; what LABEL_LINES cannot hold is cut off."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=FONT) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:LABEL_LINES]
