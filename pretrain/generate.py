"""Text-to-image generation: a trained GPT samples image codes, and the image tokenizer decodes them."""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from data_pipeline.errors import ConfigError, storage_errors
from data_pipeline.outputs import write_whole
from data_pipeline.settings import MAX_SEED
from data_pipeline.shards.codes import ImageTokenizer
from data_pipeline.text.kinds import open_tokenizer
from data_pipeline.text.tokenizer import TextTokenizer
from pretrain.checkpoint.fingerprints import check_files
from pretrain.checkpoint.trained import load_trained
from pretrain.inputs.image_tokenizer import load_tokenizer
from pretrain.inputs.text import text_ids
from pretrain.models.gpt import Gpt
from pretrain.runtime.show import png
from pretrain.schema.tasks import AutoregressiveConfig

BATCH = 64  # prompts sampled together; guidance doubles the rows
LABEL_LINES, LINE_HEIGHT = 2, 12
LABEL_HEIGHT = LABEL_LINES * LINE_HEIGHT + 6
CELL = 160  # target side of an image in the grid, in pixels
WORDS_IN_NAME = 40  # characters of the prompt in a file name; at four bytes each they leave room for the rest
FONT = ImageFont.load_default(10)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. temperature 0: the most likely code; top_k 0: keep all codes; guidance 1: no guidance.

    Raises ConfigError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name}={value} is not usable; use 0 or more")
        if self.seed > MAX_SEED:
            raise ConfigError(f"seed={self.seed} has more than 64 bits; use 0 to {MAX_SEED}")


def main(
    run: str,
    prompt: str,
    count: int = 4,
    out: str | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    seed: int = 0,
    step: int | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    ema: bool = False,
) -> list[Path]:
    """Write `count` images of `prompt` and a labelled grid into `out` (default: RUN/samples) -> paths, grid first.

    run: folder of an exported model or of a run; step and label choose the run's checkpoint, ema the average of its
    weights. Prints a note on stderr where the model cannot follow the prompt or the settings.
    """
    if count < 1:
        raise ConfigError(f"count={count}: use 1 or more")
    sampling = Sampling(temperature, top_k, guidance, seed)
    check_text(prompt)
    model, config, at = load_trained(run, step, label, overrides, ema)
    if not isinstance(model, Gpt) or not isinstance(config.task, AutoregressiveConfig):
        raise ConfigError(f"{run} trained a {config.model.kind}, which generates no images; use the run of a gpt")
    check_files(run, config)
    tokenizer, vocabulary = (
        load_tokenizer(str(config.data.image_tokenizer)),
        open_tokenizer(str(config.data.text_tokenizer)),
    )
    check_fit(model, tokenizer, vocabulary)
    for sentence in notes(prompt, vocabulary, model.config.text_tokens, guidance, config.task.caption_drop):
        print(f"note: {sentence}", file=sys.stderr)
    folder = Path(out) if out else Path(run) / "samples"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    images = generate_images(model, tokenizer, vocabulary, [prompt] * count, temperature, top_k, guidance, seed)
    pictures = [labelled_grid(images, [prompt] * count), *(Image.fromarray(image) for image in images)]
    made_by = [model_digest(model), tokenizer.id, vocabulary.fingerprint]
    names = file_names(prompt, sampling, made_by, count)
    note = PngImagePlugin.PngInfo()
    note.add_itxt("prompt", prompt)
    made_from = {"model": str(run), "step": at} | ({"weights": "ema"} if ema else {})
    note.add_text("settings", json.dumps(dataclasses.asdict(sampling) | made_from))
    for name, picture in zip(names, pictures, strict=True):
        write_whole(folder / name, png(picture, note))
        print(folder / name)
    return [folder / name for name in names]


def check_text(prompt: str) -> None:
    """Raise ConfigError for a prompt whose bytes on the command line were not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the prompt {ascii(prompt)} is not UTF-8; encode it as UTF-8") from None


def notes(prompt: str, vocabulary: TextTokenizer, room: int, guidance: float, caption_drop: float) -> list[str]:
    """Return a sentence for each part of the request that the model cannot follow. room: text tokens that it reads."""
    ids, found = vocabulary.encode(prompt), []
    unknown = sum(number == vocabulary.unk for number in ids)
    if not vocabulary.decode(ids).strip():
        what = "is empty" if not ids else "has no known piece, all of it is [UNK]"
        found.append(f"the prompt {what}: the images do not depend on it")
    elif unknown:
        found.append(f"{unknown} pieces of the prompt are [UNK]; the model reads {vocabulary.decode(ids)!r}")
    if len(ids) > room:
        read = vocabulary.decode(ids[:room])
        found.append(f"the prompt has {len(ids)} tokens, above the model's {room}: it is truncated to {read!r}")
    if guidance != 1.0 and not caption_drop:
        found.append(
            f"guidance={guidance:g} needs a model trained with task.caption_drop, which was 0: its unconditional "
            "output was never trained"
        )
    return found


def file_names(prompt: str, sampling: Sampling, made_by: Sequence[str], count: int) -> list[str]:
    """Return the file names, grid first: the prompt's words and a digest of everything that determines the images."""
    decides = [prompt, dataclasses.asdict(sampling), *made_by]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    words = re.sub(r"\W+", "-", prompt).strip("-")[:WORDS_IN_NAME] or "prompt"
    stem = f"{words}-seed{sampling.seed}-{digest}"
    return [f"{stem}-grid{count}.png", *(f"{stem}-{index}.png" for index in range(count))]


def model_digest(model: torch.nn.Module) -> str:
    """Return a digest of the weights, 32 hex digits."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_fit(model: Gpt, tokenizer: ImageTokenizer, vocabulary: TextTokenizer) -> None:
    """Raise ConfigError when model, image tokenizer and vocabulary do not match."""
    config = model.config
    asked = {"image_tokens": config.image_tokens, "image_vocab": config.image_vocab}
    given = {"image_tokens": tokenizer.codes_per_image, "image_vocab": tokenizer.codebook_size}
    for name, value in asked.items():
        if given[name] != value:
            raise ConfigError(
                f"the model has {name}={value}, tokenizer {tokenizer.id} has {given[name]}; "
                "use the tokenizer that the run was trained with"
            )
    if vocabulary.size > config.text_vocab:
        raise ConfigError(
            f"the vocabulary has {vocabulary.size} pieces, the model text_vocab={config.text_vocab}; "
            "use the vocabulary that the run was trained with"
        )


def generate_images(
    model: Gpt,
    tokenizer: ImageTokenizer,
    vocabulary: TextTokenizer,
    prompts: list[str],
    temperature: float = 1.0,
    top_k: int = 0,
    guidance: float = 1.0,
    seed: int = 0,
    first: int = 0,
) -> np.ndarray:
    """Sample one image per prompt -> uint8 [n, S, S, 3]; image i uses the random numbers of (seed, first + i)."""
    config = model.config
    text = torch.from_numpy(np.stack([text_ids(prompt, vocabulary, config.text_tokens) for prompt in prompts]))
    device = device_of(model)
    empty = torch.from_numpy(text_ids("", vocabulary, config.text_tokens)).to(device)
    keys = (np.array([seed, first + index], np.uint64) for index in range(len(prompts)))
    streams = (np.random.Generator(np.random.Philox(key=key)) for key in keys)
    uniforms = torch.from_numpy(np.stack([stream.random(config.image_tokens) for stream in streams]))
    was_training = model.training
    model.eval()
    codes = [
        model.sample(some.to(device), temperature, top_k, guidance, empty, numbers.to(device)).cpu()
        for some, numbers in zip(text.split(BATCH), uniforms.split(BATCH), strict=True)
    ]
    model.train(was_training)
    return tokenizer.decode(torch.cat(codes).numpy().astype(np.uint16))


def device_of(model: torch.nn.Module) -> torch.device:
    """Return the device of the model's parameters."""
    return next(model.parameters()).device


def labelled_grid(images: np.ndarray, labels: list[str], columns: int | None = None) -> Image.Image:
    """uint8 [n, S, S, 3] and n labels -> one picture, enlarged by an integer factor; about square without `columns`.

    The built-in font has Latin letters only; labels that are not ASCII are omitted (the PNG's "prompt" text has them).
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
    """Wrap `label` at spaces into lines of at most `width` pixels; keep the first LABEL_LINES lines."""
    lines = [""]
    for word in label.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=FONT) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:LABEL_LINES]
