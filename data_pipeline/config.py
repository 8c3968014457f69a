"""What a build and a vocabulary can be told. Read with `load_settings(BuildConfig, path, overrides)`."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipeline.settings import Settings

# --------------------------------------------------------------------------------------------- sources


class ScenesSource(Settings):
    """Captioned scenes that the project draws itself."""

    kind: Literal["scenes"] = "scenes"
    count: PositiveInt
    image_size: PositiveInt = 32
    seed: NonNegativeInt = 0
    split: Literal["train", "heldout"] = "train"


class FolderSource(Settings):
    """Images anywhere below `path`, each with its captions beside it: NAME.txt (one a line) or NAME.json."""

    kind: Literal["folder"] = "folder"
    path: str


class TarsSource(Settings):
    """WebDataset tars: a folder of them, one file, or a pattern such as `dir/{00000..00099}.tar`."""

    kind: Literal["tars"] = "tars"
    path: str


class TableSource(Settings):
    """Rows of a table. `path`: the table, or the folder that holds it under the name `table`.

    key: column of unique names; without it a row is named by its number.
    image: column of file names within `images` (a folder or a tar, beside the table), or, in parquet, of bytes.
    captions: columns, each of text or of a list of texts.
    """

    kind: Literal["csv", "tsv", "jsonl", "parquet"]
    path: str
    table: str | None = None
    images: str = "."
    key: str | None = None
    image: str = "image"
    captions: tuple[str, ...] = Field(("caption",), min_length=1)


SourceConfig = Annotated[ScenesSource | FolderSource | TarsSource | TableSource, Field(discriminator="kind")]

# ----------------------------------------------------------------------------------------------- rules


class ImageRules(Settings):
    """How an image is stored.

    mode: none; fit (longer side at most `size`); center_crop (square, the shorter side scaled); stretch (square).
    format: keep stores the file as it came where it is a plain 8-bit RGB JPEG or PNG and `mode` is none.
    quality: of JPEG.
    """

    mode: Literal["none", "fit", "center_crop", "stretch"] = "none"
    size: PositiveInt | None = None
    format: Literal["keep", "jpeg", "png"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    max_pixels: PositiveInt = 89_478_485
    min_side: NonNegativeInt = 0

    @pydantic.model_validator(mode="after")
    def _size_given(self) -> "ImageRules":
        if (self.mode == "none") != (self.size is None):
            raise ValueError(f"mode={self.mode!r} with size={self.size}: every mode but 'none' has a size in pixels")
        return self


class CaptionRules(Settings):
    """How captions are cleaned; lengths in characters, a caption outside of them is left out."""

    fix_text: bool = True
    min_chars: PositiveInt = 1
    max_chars: PositiveInt | None = None


class BuildConfig(Settings):
    """Raw pairs -> shards. Shard k holds what remains of rows [k * shard_size, (k + 1) * shard_size)."""

    source: SourceConfig
    output: str
    workers: PositiveInt = 2
    shard_size: PositiveInt = 1000
    images: ImageRules = ImageRules()
    captions: CaptionRules = CaptionRules()
    ray_address: str | None = None


class VocabConfig(Settings):
    """Captions of a dataset -> SentencePiece vocabulary, written to `output`/vocab.model."""

    dataset: str
    output: str
    size: PositiveInt = 8192
    kind: Literal["unigram", "bpe"] = "unigram"
    character_coverage: PositiveFloat = Field(0.9995, le=1.0)
    max_captions: PositiveInt = 1_000_000
