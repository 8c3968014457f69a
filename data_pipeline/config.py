"""Configuration of a build. Read with `load_settings(BuildConfig, path, overrides)`."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, IPvAnyNetwork, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipeline.settings import Location, OptionalLocation, Seed, Settings
from data_pipeline.text_files import encoding_of, newline_of

# --------------------------------------------------------------------------------------------- sources


def _checked_encoding(name: str) -> str:
    try:
        newline_of(encoding_of(b"", name)[0])
    except (LookupError, UnicodeError):
        raise ValueError(f"{name!r}: not a text encoding; use one such as utf-8, latin-1, cp1252, gb18030") from None
    return name


TextEncoding = Annotated[str, pydantic.AfterValidator(_checked_encoding)]


class ScenesSource(Settings):
    """Synthetic captioned scenes, drawn by `data_pipeline.scenes`."""

    kind: Literal["scenes"] = "scenes"
    count: PositiveInt
    image_size: PositiveInt = 32
    seed: Seed = 0
    split: Literal["train", "heldout"] = "train"


class FolderSource(Settings):
    """Images anywhere below `path`, each with its captions beside it: in NAME.json, or else NAME.txt (one per line).

    `path`: a folder, local or on s3://, or several, with {00..99} and `::`; keys then begin with the folder's name.
    encoding: of text without a byte order mark, such as latin-1; UTF-8 by default.
    """

    kind: Literal["folder"] = "folder"
    path: Location
    encoding: TextEncoding | None = None


class TarsSource(Settings):
    """WebDataset tars: a folder of them, one file, or a pattern such as `dir/{00000..00099}.tar`, joined by `::`.

    A sample is the consecutive files with one name: an image, and captions in its .json (`captions`, `caption` or
    `text`, each a text or a list) or else its .txt (one per line). A sample is rejected for links, duplicate files and
    files that are not neighbours; dot files and `__MACOSX/` are skipped. Compressed tars must be unpacked first.
    If img2dataset left a NAME.parquet beside NAME.tar, local or remote, its columns become attributes of the samples.
    """

    kind: Literal["tars"] = "tars"
    path: Location


class TableSource(Settings):
    """Rows of tables. `path`: files or folders, local or on s3:// and http(s)://, with {00..99}, * and `::`. Folders
    `column=value` below it are partitions of the table, and their names become columns.

    table: name of the table where `path` is the folder that holds it.
    key: column of unique names; by default a row is named by its number. A row without a key is rejected (no_key).
    image: column of http(s) addresses, of file names within `images` (a folder or a tar, beside the table), or, in
    parquet, of bytes; with `base64` the column holds the file itself, in either alphabet.
    captions: columns, each of text or of lists of text.
    columns: column names of csv or tsv files without a header line.
    quotes: whether quotation marks enclose fields, which may then hold delimiters and line ends; if false, the mark is
    an ordinary character. By default true for csv, false for tsv.
    encoding: of text files without a byte order mark, such as latin-1; UTF-8 by default. Other bytes reject their row.
    sha256, md5: columns with the expected digests of fetched files.
    Other columns become attributes of the samples: times as ISO 8601, decimals as text, values that JSON lacks (NaN) as
    null, `key` and `captions` as source_key and source_captions; columns of bytes are left out.
    parse_rule: version of the text parser; a dataset begun with rule 1 keeps it.
    """

    kind: Literal["csv", "tsv", "json", "jsonl", "parquet"]
    path: Location
    table: str | None = None
    images: Location = "."
    key: str | None = None
    image: str = "image"
    captions: tuple[str, ...] = Field(("caption",), min_length=1)
    columns: tuple[str, ...] | None = None
    quotes: bool | None = None
    encoding: TextEncoding | None = None
    base64: bool = False
    sha256: str | None = None
    md5: str | None = None
    parse_rule: Literal[1, 2] = 2

    @property
    def quoted(self) -> bool:
        """Whether quotation marks enclose fields."""
        return self.quotes if self.quotes is not None else self.kind != "tsv" or self.parse_rule == 1

    @pydantic.model_validator(mode="after")
    def _columns_are_there(self) -> "TableSource":
        asked = [self.key, self.image, *self.captions, self.sha256, self.md5]
        missing = [name for name in asked if name is not None and self.columns is not None and name not in self.columns]
        if missing:
            raise ValueError(f"{missing[0]!r} is not in columns={list(self.columns or ())}; use one of them")
        return self


class PairsSource(Settings):
    """Published tables with known columns: cc3m (caption TAB address), muge (id TAB caption TAB base64 image).

    parse_rule: as in `TableSource`.
    """

    kind: Literal["cc3m", "muge"]
    path: Location
    parse_rule: Literal[1, 2] = 2


class CocoSource(Settings):
    """COCO's captions JSON (also .gz): one row per image, with all of its captions.

    images: folder or tar of the files, beside each JSON; without it they are fetched from the JSON's coco_url.
    encoding: of JSON without a byte order mark; UTF-8 by default.
    """

    kind: Literal["coco"] = "coco"
    path: Location
    images: OptionalLocation = None
    encoding: TextEncoding | None = None


SourceConfig = Annotated[
    ScenesSource | FolderSource | TarsSource | TableSource | PairsSource | CocoSource, Field(discriminator="kind")
]

# ----------------------------------------------------------------------------------------------- rules


class ImageRules(Settings):
    """How an image is stored.

    mode: none; fit (longer side at most `size`); keep_ratio (shorter side `size`); keep_ratio_largest (longer side
    `size`); border (the same, padded with white to a square); center_crop (square, the shorter side scaled); stretch
    (square). For image codes use center_crop or stretch: their sizes are exact.
    format: keep stores the file unchanged if it is a plain 8-bit RGB JPEG or PNG and `mode` is none.
    quality: of JPEG and WebP.
    decode: scaled lets libjpeg shrink JPEGs of three times the size or more while decoding: to a half where 1.5 times
    the size remains, to a quarter or an eighth where twice the size does. Faster, with nearly the same result: PSNR
    against exact 36 to 42 dB in the median of 39 photographs, at least 28. tests/benchmarks/bench_decode.py times it.
    """

    mode: Literal["none", "fit", "keep_ratio", "keep_ratio_largest", "border", "center_crop", "stretch"] = "none"
    size: PositiveInt | None = None
    format: Literal["keep", "jpeg", "png", "webp"] = "keep"
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    decode: Literal["exact", "scaled"] = "exact"
    max_pixels: PositiveInt = 89_478_485
    min_side: NonNegativeInt = 0

    @pydantic.model_validator(mode="after")
    def _size_given(self) -> "ImageRules":
        if (self.mode == "none") != (self.size is None):
            raise ValueError(
                f"mode={self.mode!r} with size={self.size}: every mode except 'none' needs a size in pixels"
            )
        return self


class CaptionRules(Settings):
    """How captions are cleaned. A caption that breaks a rule is dropped, a row without any caption is rejected.

    Lengths in characters. languages: ISO 639-1 codes; a caption that is clearly in another language is dropped.
    deny: file of words and phrases, one per line; a caption with one is dropped, whatever its letter case and width.
    """

    fix_text: bool = True
    min_chars: PositiveInt = 1
    max_chars: PositiveInt | None = None
    languages: tuple[str, ...] = ()
    deny: OptionalLocation = None

    @pydantic.model_validator(mode="after")
    def _some_length_passes(self) -> "CaptionRules":
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"min_chars={self.min_chars} is above max_chars={self.max_chars}: no caption would pass")
        return self


class FetchRules(Settings):
    """How images are fetched over http(s).

    concurrency: concurrent requests of one fetching process (one per two workers), per_host: of those to one host.
    timeout_s: of one whole attempt; the pauses between attempts are at most attempts * timeout_s.
    opt_out: directives of the X-Robots-Tag header that exclude an image. allow_networks: private networks that may be
    contacted, such as 10.1.0.0/16; they bypass a proxy that http_proxy or https_proxy names in the environment.
    Host names must resolve on this machine, even behind a proxy: their addresses are checked before a request.
    cache: folder or s3:// prefix that keeps fetched bytes by sha256, also for other builds; without it they are kept in
    the output until the build is done.
    """

    concurrency: PositiveInt = 64
    per_host: PositiveInt = 16
    timeout_s: PositiveFloat = 10.0
    attempts: PositiveInt = 3
    max_bytes: PositiveInt = 50_000_000
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    allow_networks: tuple[IPvAnyNetwork, ...] = ()
    cache: OptionalLocation = None


class DedupRules(Settings):
    """How duplicate images are removed: the first row of equal ones is kept, across all shards.

    exact: compare bytes. near_bits: images whose 64-bit perceptual hashes differ in at most this many bits and whose
    colours agree; None disables it. Both read every image once before any shard is written.
    """

    exact: bool = False
    near_bits: Annotated[int, Field(ge=0, le=12)] | None = None

    @property
    def wanted(self) -> bool:
        """Whether any kind of duplicate is removed."""
        return self.exact or self.near_bits is not None


class BuildConfig(Settings):
    """Raw pairs -> shards. Shard k holds what remains of rows [k * shard_size, (k + 1) * shard_size).

    filters: name -> condition that a row must meet, else it is rejected under that name; over the columns of the
    source and width, height, aspect, area, bytes, key, caption, chars. grow: add the rows that a finished output lacks.
    image_tokenizer: folder of an exported image tokenizer, whose codes are added after the shards are written: one
    crop, float32, on CPUs; `tessera data encode` offers other choices.
    """

    renamed = {"tokenizer": "image_tokenizer"}

    source: SourceConfig
    output: Location
    workers: PositiveInt = 2
    shard_size: PositiveInt = 1000
    images: ImageRules = ImageRules()
    captions: CaptionRules = CaptionRules()
    fetch: FetchRules = FetchRules()
    filters: dict[str, str] = {}
    dedup: DedupRules = DedupRules()
    grow: bool = False
    image_tokenizer: OptionalLocation = None
    ray_address: str | None = None
