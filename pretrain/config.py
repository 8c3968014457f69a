"""The schema of a training run. Read with `load_settings(RunConfig, path, overrides)`; imports no torch.

Sections: what is learnt (`model`, `objective`), from what (`data`), how (`train`, `optim`), and where it is written.
"""

import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipeline.errors import ConfigError
from data_pipeline.schema import SPECIALS
from data_pipeline.settings import (
    Location,
    OptionalLocation,
    Seed,
    Settings,
    expand_home,
    load_settings,
    local_path,
)
from data_pipeline.stream.weights import check_changes
from pretrain.best import check_best
from pretrain.goodput import METRICS

# ---------------------------------------------------------------------------------------------- models


def check_heads(width: int, heads: int, name: str = "width") -> None:
    """Raise ValueError where the heads of an attention do not share its width evenly."""
    if width % heads:
        near = [number for number in range(1, width + 1) if width % number == 0]
        best = min(near, key=lambda number: (abs(number - heads), number))
        raise ValueError(f"{name}={width} is not divisible by heads={heads}; use {best} heads, or another width")


class VisionTower(Settings):
    """ViT of CLIP: patches -> one embedding."""

    image_size: PositiveInt = 224
    patch_size: PositiveInt = 32
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "VisionTower":
        if self.image_size % self.patch_size:
            fits = self.image_size // self.patch_size * self.patch_size or self.patch_size
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; use {fits} pixels, or "
                "another patch"
            )
        check_heads(self.width, self.heads)
        return self


class TextTower(Settings):
    """Causal transformer of CLIP, pooled at the end-of-text token."""

    vocab_size: PositiveInt = 49408
    context: PositiveInt = 77
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "TextTower":
        check_heads(self.width, self.heads)
        return self


class ClipConfig(Settings):
    """CLIP, Radford et al. 2021, arXiv:2103.00020."""

    kind: Literal["clip"] = "clip"
    vision: VisionTower = VisionTower()
    text: TextTower = TextTower()
    embed_dim: PositiveInt = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: PositiveFloat = 1e-5


Activation = Literal["gelu", "gelu_new", "relu"]
"""gelu is exact; gelu_new its approximation by tanh, as in GPT-2 and Google's BERT."""


class EncoderConfig(Settings):
    """The bidirectional encoder that BERT and ELECTRA share."""

    vocab_size: PositiveInt = 30522
    context: PositiveInt = 512
    layers: PositiveInt = 12
    width: PositiveInt = 768
    heads: PositiveInt = 12
    embedding_width: PositiveInt = 768
    type_vocab: PositiveInt = 2
    activation: Activation = "gelu"
    norm_eps: PositiveFloat = 1e-12
    dropout: NonNegativeFloat = Field(0.1, lt=1.0)

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "EncoderConfig":
        check_heads(self.width, self.heads)
        return self


class BertConfig(EncoderConfig):
    """BERT for pretraining (MLM + NSP), Devlin et al. 2018, arXiv:1810.04805."""

    kind: Literal["bert"] = "bert"


class ElectraConfig(EncoderConfig):
    """ELECTRA, Clark et al. 2020, arXiv:2003.10555: the encoder fields are the discriminator's."""

    kind: Literal["electra"] = "electra"
    generator_fraction: PositiveFloat = Field(0.25, le=1.0)

    @property
    def generator_size(self) -> tuple[int, int]:
        """Width and heads of the generator: the fraction of the width, in heads of 64, at least one."""
        width = round(self.width * self.generator_fraction)
        return width, max(1, width // 64)

    @pydantic.model_validator(mode="after")
    def _generator_fits(self) -> "ElectraConfig":
        width, heads = self.generator_size
        if not width:
            raise ValueError(
                f"generator_fraction={self.generator_fraction:g} of width={self.width} leaves the generator no width; "
                f"use {1 / self.width:.2g} or more"
            )
        if width % heads:
            raise ValueError(
                f"generator_fraction={self.generator_fraction:g} of width={self.width} gives the generator {width} in "
                f"{heads} heads, which does not divide; use another one, for example {64 * heads / self.width:.4g}"
            )
        return self


class GptConfig(Settings):
    """Autoregressive text-to-image transformer over text tokens and image codes (EasyNLP's pai-painter)."""

    kind: Literal["gpt"] = "gpt"
    text_vocab: PositiveInt = 21128
    image_vocab: PositiveInt = 16384
    text_tokens: PositiveInt = 32
    image_tokens: PositiveInt = 256
    layers: PositiveInt = 12
    width: PositiveInt = 768
    heads: PositiveInt = 12
    activation: Activation = "gelu"
    norm_eps: PositiveFloat = 1e-5
    dropout: NonNegativeFloat = Field(0.0, lt=1.0)

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "GptConfig":
        check_heads(self.width, self.heads)
        return self


NormGroups = PositiveInt | Literal["width/4"]


def group_count(channels: int, groups: "int | Literal['width/4']") -> int:
    """Groups of a GroupNorm over so many channels."""
    return min(32, channels // 4) if groups == "width/4" else groups


MIDDLE: Literal["middle"] = "middle"


def sides_of_levels(image_size: int, levels: int) -> list[int]:
    """Pixels a side of each level of a VQGAN, the finest first."""
    return [image_size // 2**index for index in range(levels)]


class VqganConfig(Settings):
    """VQGAN, Esser et al. 2021, arXiv:2012.09841 (taming f16-16384 by default).

    norm_groups: groups of every GroupNorm: 32, as in all published weights; where 32 does not divide the widths, which
    nothing published has, the default is "width/4": four channels a group, at most 32 groups. Narrow models of one's
    own want that too: a group of one channel forgets that channel's mean, and with it the colours of flat areas.

    attention_at: sides of the levels that have attention, and the middle blocks with them; "middle": these alone, which
    is the default where no level has the side 16; an empty list: none at all.

    local_encoder: every code is a function of its own patch and a rim of a few pixels. As published, normalisation and
    wide kernels put what stands elsewhere in the picture into each code, which a small model cannot compose anew.
    """

    kind: Literal["vqgan"] = "vqgan"
    image_size: PositiveInt = 256
    channels: PositiveInt = 128
    multipliers: tuple[PositiveInt, ...] = Field((1, 1, 2, 2, 4), min_length=1)
    res_blocks: PositiveInt = 2
    attention_at: tuple[int | Literal["middle"], ...] = (16,)
    latent_channels: PositiveInt = 256
    codebook_size: int = Field(16384, ge=2, le=65536)
    code_width: PositiveInt = 256
    local_encoder: bool = False
    norm_groups: NormGroups = 32
    discriminator_channels: PositiveInt = 64
    discriminator_layers: PositiveInt = 3

    @property
    def sides(self) -> list[int]:
        """Pixels a side of each level, the finest first."""
        return sides_of_levels(self.image_size, len(self.multipliers))

    @property
    def widths(self) -> list[int]:
        """Channels of each level, the finest first."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def group_counts(self, groups: "int | Literal['width/4'] | None" = None) -> list[int]:
        """Groups of the norms of each width, the finest first."""
        return [group_count(width, groups or self.norm_groups) for width in (self.channels, *self.widths)]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _groups_of_narrow_widths(cls, tree: Any) -> Any:
        """The default where 32 groups are impossible."""
        channels = tree.get("channels", 128) if isinstance(tree, dict) else 128
        if not isinstance(channels, int) or channels % 32 == 0 or "norm_groups" in tree:
            return tree
        return tree | {"norm_groups": "width/4"}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _attention_of_other_sides(cls, tree: Any) -> Any:
        """The default where no level has its side."""
        if not isinstance(tree, dict) or "attention_at" in tree:
            return tree
        defaults = {name: cls.model_fields[name].default for name in ("image_size", "multipliers")}
        side, multipliers = (tree.get(name, default) for name, default in defaults.items())
        if not isinstance(side, int) or not isinstance(multipliers, list | tuple):
            return tree
        return tree if 16 in sides_of_levels(side, len(multipliers)) else tree | {"attention_at": (MIDDLE,)}

    @pydantic.model_validator(mode="after")
    def _sides_halve(self) -> "VqganConfig":
        """Each level but the last halves the side."""
        factor = 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by {factor}, the pixels of a code with "
                f"{len(self.multipliers)} multipliers; use {max(factor, self.image_size // factor * factor)}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _groups_divide(self) -> "VqganConfig":
        for width, groups in zip((self.channels, *self.widths), self.group_counts(), strict=True):
            if not groups or width % groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups}: {width} channels are not divisible by {groups} groups; take "
                    "channels that are a multiple of 32, or of 4 with norm_groups=width/4"
                )
        if self.grid == 1 and self.group_counts()[-1] == self.widths[-1]:
            raise ValueError(
                f"norm_groups={self.norm_groups}: {self.widths[-1]} channels of one code are groups of a single value, "
                "which a norm makes 0; use fewer groups or a larger image"
            )
        return self

    @property
    def grid(self) -> int:
        """Codes per side."""
        return self.image_size // 2 ** (len(self.multipliers) - 1)


ModelConfig = Annotated[ClipConfig | BertConfig | ElectraConfig | GptConfig | VqganConfig, Field(discriminator="kind")]

# ------------------------------------------------------------------------------------------ objectives


class ContrastiveConfig(Settings):
    """Symmetric cross-entropy over the global batch (CLIP)."""

    kind: Literal["contrastive"] = "contrastive"


class MaskingConfig(Settings):
    """What is masked: pieces, whole words (Chinese ones by jieba), or n-grams of one to three words.

    packing: several samples share a row, each attending to itself alone, so that next to no padding is computed.
    """

    mask_rate: PositiveFloat = Field(0.15, lt=1.0)
    masking: Literal["piece", "word", "ngram"] = "piece"
    packing: bool = False


class MlmNspConfig(MaskingConfig):
    """Masked language model, with next-sentence prediction where `nsp` is set (BERT)."""

    kind: Literal["mlm"] = "mlm"
    nsp: bool = True


class RtdConfig(MaskingConfig):
    """Replaced-token detection: MLM + weight * RTD (ELECTRA)."""

    kind: Literal["rtd"] = "rtd"
    rtd_weight: NonNegativeFloat = 50.0


class AutoregressiveConfig(Settings):
    """Cross-entropy of the image codes given the text (and, with `caption_drop`, given nothing, for guidance)."""

    kind: Literal["autoregressive"] = "autoregressive"
    caption_drop: NonNegativeFloat = Field(0.0, lt=1.0)


class ReconstructionConfig(Settings):
    """Training of the VQGAN: pixels + perceptual + adversarial + codebook."""

    kind: Literal["reconstruction"] = "reconstruction"
    codebook_weight: PositiveFloat = 1.0
    commitment: PositiveFloat = 0.25
    legacy_commitment: bool = False
    perceptual_weight: NonNegativeFloat = 1.0
    discriminator_weight: NonNegativeFloat = 0.8
    discriminator_start_step: NonNegativeInt = 250_001
    revive_after_steps: NonNegativeInt = 0


ObjectiveConfig = Annotated[
    ContrastiveConfig | MlmNspConfig | RtdConfig | AutoregressiveConfig | ReconstructionConfig,
    Field(discriminator="kind"),
]

# ---------------------------------------------------------------------------------------- the run itself


class SourceConfig(Settings):
    """One dataset of a mixture; `weight` is relative to the others: a number, or a fraction such as "1/3"."""

    path: Location
    weight: float | str = 1.0


class ReweighConfig(Settings):
    """Other weights from a position (samples consumed so far) on."""

    position: PositiveInt
    weights: tuple[float | str, ...]


class ShuffleConfig(Settings):
    """How far samples are shuffled: blocks of consecutive samples, windows of so many blocks, on so many lanes.

    lanes * window * block samples are mixed with each other. More lanes than ranks keep a rank on blocks of its own.
    """

    lanes: PositiveInt = 64
    block: PositiveInt = 64
    window: PositiveInt = 16


AUGMENTATION = ("crop_scale", "crop_ratio", "flip")
"""Fields of DataConfig that draw what of an image is shown; their defaults draw nothing."""


def _ascending(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    if low > high:
        raise ValueError(f"the lower end comes first; use [{high:g}, {low:g}]")
    return span


Span = Annotated[tuple[PositiveFloat, PositiveFloat], pydantic.AfterValidator(_ascending)]


class DataConfig(Settings):
    """The dataset (or `datasets`, mixed by weight), the vocabulary and how samples become tensors.

    workers: processes that prepare batches; 0 is a thread. max_bad_rate: share of samples that may be replaced because
    they cannot be used, before the run stops.
    """

    dataset: OptionalLocation = None
    datasets: tuple[SourceConfig, ...] = ()
    reweigh: tuple[ReweighConfig, ...] = ()
    shuffle: ShuffleConfig = ShuffleConfig()
    vocabulary: OptionalLocation = None
    tokenizer: OptionalLocation = None
    evaluation: OptionalLocation = None
    crop_scale: Span = (1.0, 1.0)
    crop_ratio: Span = (1.0, 1.0)
    flip: bool = False
    prefetch_steps: PositiveInt = 2
    workers: NonNegativeInt = 0
    max_bad_rate: NonNegativeFloat = Field(0.001, le=1.0)

    def without_augmentation(self) -> "DataConfig":
        """The same data, shown as evaluation shows them: every image its centre square, never mirrored."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in AUGMENTATION})

    @pydantic.model_validator(mode="after")
    def _one_kind_of_data(self) -> "DataConfig":
        if (self.dataset is None) == (not self.datasets):
            raise ValueError("name either data.dataset, or data.datasets with a weight each")
        if self.reweigh and not self.datasets:
            raise ValueError("data.reweigh changes the weights of data.datasets; with one data.dataset there are none")
        if self.datasets:
            try:
                check_changes(self.changes)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that is read: datasets, vocabulary, image tokenizer, held-out data."""
        sources = (source.path for source in self.datasets)
        return tuple(
            path for path in (self.dataset, *sources, self.vocabulary, self.tokenizer, self.evaluation) if path
        )

    @property
    def changes(self) -> list[tuple[int, tuple[float | str, ...]]]:
        """(first position, weights of the datasets), the first at 0."""
        first = (0, tuple(source.weight for source in self.datasets))
        return [first, *((change.position, change.weights) for change in self.reweigh)]


class TrainConfig(Settings):
    """Length, batch, precision, sharding, and what is written when.

    `recompute`: the blocks of the model keep their inputs alone and are computed again in the backward: less memory, a
    forward more, the same numbers.
    Of the checkpoints stay the last `keep_checkpoints` regular ones (and a newer one that a stop signal asked for),
    every one whose step `keep_every_steps` divides, the one with the best mean of the metric `keep_best` since the save
    before (the lowest of a loss, the highest of an accuracy; "min:NAME" and "max:NAME" say which), and named ones.
    `checkpoints`: a folder or s3:// prefix for them, instead of the run's own.
    """

    steps: PositiveInt
    global_batch: PositiveInt
    micro_batch: PositiveInt | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 3
    clip_norm: NonNegativeFloat = 1.0
    recompute: bool = False
    checkpoint_every_steps: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    keep_every_steps: NonNegativeInt = 0
    keep_best: str = ""
    checkpoints: OptionalLocation = None
    log_every_steps: PositiveInt = 10
    sample_every_steps: NonNegativeInt = 0
    collective_timeout_s: PositiveInt = Field(120, le=7 * 86400)


Beta = Annotated[float, Field(ge=0, lt=1)]
MAIN = "main"
"""The role of all parameters that no other optimizer of an objective has."""


class AdamWConfig(Settings):
    """AdamW with decay and no-decay groups, and the learning-rate schedule over the steps of the run.

    Matrices decay, vectors (biases, gains) do not; nor does a parameter in whose name a regular expression of
    `no_decay` is found.
    """

    lr: PositiveFloat
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    no_decay: tuple[str, ...] = ()
    schedule: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_lr_fraction: NonNegativeFloat = Field(0.0, le=1.0)
    power: PositiveFloat = 1.0

    @pydantic.field_validator("no_decay")
    @classmethod
    def _are_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"{pattern!r} is no regular expression ({error}); escape what is meant as it stands"
                raise ValueError(message) from None
        return patterns


class OptimConfig(AdamWConfig):
    """The optimizer of the model; `roles`: those beside it, by name, as far as they differ from it.

    A reconstruction has the role "discriminator".
    """

    roles: dict[str, AdamWConfig] = {}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _differences(cls, tree: Any) -> Any:
        """What a role does not say is as for the model."""
        if not isinstance(tree, dict) or not isinstance(tree.get("roles"), dict):
            return tree
        own = {key: value for key, value in tree.items() if key != "roles"}
        roles = {name: own | given if isinstance(given, dict) else given for name, given in tree["roles"].items()}
        return own | {"roles": roles}

    def of(self, role: str) -> AdamWConfig:
        """The settings of a role's optimizer."""
        return self.roles.get(role, self)


class GuardsConfig(Settings):
    """What happens to a step whose loss or gradient norm is not finite, or spikes.

    skip: leave out its update. roll_back: go back to the last regular checkpoint's weights as well, and on with the
    next batch. stop: end the run before the update. More than `patience_steps` refused steps in a row always stop it.
    """

    non_finite: Literal["skip", "roll_back", "stop"] = "stop"
    spike: Literal["ignore", "skip", "roll_back", "stop"] = "ignore"
    spike_sigmas: PositiveFloat = 6.0
    window_steps: PositiveInt = 128
    patience_steps: PositiveInt = 10


TRACKING_SCHEMES = (
    "http",
    "https",
    "sqlite",
    "postgresql",
    "mysql",
    "mssql",
    "databricks",
    "databricks-uc",
    "uc",
    "file",
)


def known_to_mlflow(uri: str) -> str:
    """`uri` itself. Raises ValueError where MLflow, with its installed plug-ins, has no store of that scheme."""
    scheme, colon, rest = uri.partition(":")
    kind = scheme.lower().partition("+")[0] if colon and "/" not in scheme else "file"
    if kind not in TRACKING_SCHEMES and kind not in entry_points(group="mlflow.tracking_store").names:
        raise ValueError(f"MLflow knows no {kind!r}; use http(s)://HOST, sqlite:///FILE, or nothing for no tracking")
    if kind == "sqlite" and not (rest.startswith("///") and rest.strip("/")):
        raise ValueError("a database file has three slashes before its path: sqlite:///runs/mlflow.db")
    if kind in ("http", "https") and not _names_host(uri):
        raise ValueError(f"a server has a host: {kind}://HOST:PORT")
    if uri and not uri.strip():
        raise ValueError("only of spaces; leave it empty for no tracking")
    return uri


def _names_host(address: str) -> bool:
    """Whether an address of http(s) has a host, and a port below 65536 if any."""
    try:
        parts = urlsplit(address)
        return parts.port != 0 and bool(parts.hostname)
    except ValueError:  # brackets that do not close, a port that is none
        return False


TrackingUri = Annotated[str, pydantic.AfterValidator(expand_home), pydantic.AfterValidator(known_to_mlflow)]


class TrackingConfig(Settings):
    """MLflow: `uri` empty switches it off; metrics.jsonl in the run folder is always written."""

    uri: TrackingUri = "sqlite:///runs/mlflow.db"
    experiment: str = "tessera"


class DeepSpeedConfig(Settings):
    """What the generated DeepSpeed JSON is overlaid with, for what the other sections do not offer."""

    extra: dict[str, Any] = {}


FINGERPRINTS = "fingerprints"
"""The key of config.json under which a run or an export keeps the fingerprints of what it depends on."""


NOTES_FILE = "tessera.json"
"""Beside an export in another layout: what its own files cannot say, fingerprints among it."""


class RunConfig(Settings):
    """One training run. `initial`: a run or an exported model to start from, as far as its tensors fit."""

    run: Location
    initial: OptionalLocation = None
    seed: Seed = 0
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_fingerprints(cls, tree: Any) -> Any:
        """RUN/config.json is a configuration too; the fingerprints that the program adds there are no setting."""
        return {key: tree[key] for key in tree if key != FINGERPRINTS} if isinstance(tree, dict) else tree

    @pydantic.model_validator(mode="after")
    def _sections_fit(self) -> "RunConfig":
        check_sections(self)
        return self


OBJECTIVE_OF = {
    "clip": "contrastive",
    "bert": "mlm",
    "electra": "rtd",
    "gpt": "autoregressive",
    "vqgan": "reconstruction",
}
ROLES = {"reconstruction": ("discriminator",)}
"""Objectives that train by optimizers beside the main one."""


def check_sections(config: RunConfig) -> None:
    """The rules that span sections; raises ValueError with value, rule and remedy."""
    wanted = OBJECTIVE_OF[config.model.kind]
    if config.objective.kind != wanted:
        raise ValueError(
            f"objective.kind={config.objective.kind!r} does not train a {config.model.kind}; use {wanted!r}"
        )
    if config.model.kind != "vqgan" and config.data.vocabulary is None:
        raise ValueError(
            f"data.vocabulary is missing; a {config.model.kind} reads text, name a SentencePiece .model file"
        )
    if config.objective.kind == "mlm" and config.objective.nsp and config.objective.packing:
        raise ValueError("objective.packing leaves no row of its own to a pair of sentences; set objective.nsp=false")
    if config.model.kind == "gpt" and config.data.tokenizer is None:
        raise ValueError("data.tokenizer is missing; a gpt reads image codes, name the folder of the image tokenizer")
    if config.model.kind == "vqgan" and config.train.zero_stage != 0:
        raise ValueError(
            f"train.zero_stage={config.train.zero_stage}: a vqgan trains replicated, its codebook is revived in place; "
            "use 0"
        )
    check_best(config.train.keep_best, config.objective.model_dump(), config.train.steps)
    _check_text(config)
    _check_images(config)
    _check_optimizers(config)


def has_begun(config: RunConfig) -> bool:
    """Has the run logged a step? It may go on from a checkpoint then, and reads `initial` no more."""
    path = Path(config.run) / METRICS
    return path.is_file() and path.stat().st_size > 0


def check_initial(config: RunConfig) -> None:
    """Raise ConfigError where a run that has not begun would start from a folder that is not there."""
    path = local_path(config.initial) if config.initial else None
    if path is not None and not path.exists() and not has_begun(config):
        raise ConfigError(
            f"initial={config.initial} is not there; name the folder of a run or of an exported model, or leave it out"
        )


def _check_text(config: RunConfig) -> None:
    """What the inputs of a family need of its text model: ids for the special pieces, room for them and a word."""
    model, pairs = config.model, config.objective.kind == "mlm" and config.objective.nsp
    if model.kind == "vqgan":
        return
    if model.kind == "gpt":
        name, size = "text_vocab", model.text_vocab
    else:
        of_clip = model.kind == "clip"
        text = model.text if model.kind == "clip" else model
        name, size = f"{'text.' if of_clip else ''}vocab_size", text.vocab_size
        least, row = (5, "[CLS] a [SEP] b [SEP]") if pairs else (3, "[CLS] a [SEP]")
        if text.context < least:
            raise ValueError(
                f"model.{'text.' if of_clip else ''}context={text.context} has no room for {row}; use {least} or more"
            )
    if size <= len(SPECIALS):
        raise ValueError(
            f"model.{name}={size} leaves no id beside the {len(SPECIALS)} special ones; use the size of the vocabulary"
        )
    if model.kind == "bert" and pairs and model.type_vocab < 2:
        raise ValueError("model.type_vocab=1 cannot tell two sentences apart; use 2, or objective.nsp=false")


SMALLEST_SIDE = 8
"""Pixels of the least image that a reconstruction is compared in: its edges are looked at down to a quarter."""


def _check_images(config: RunConfig) -> None:
    """What the losses of a family need of its images."""
    model, objective = config.model, config.objective
    if objective.kind == "contrastive" and config.train.global_batch < 2:
        raise ValueError("train.global_batch=1 has no other pair to tell a pair from; use 2 or more")
    if model.kind == "gpt" and model.image_vocab < 2:
        raise ValueError(f"model.image_vocab={model.image_vocab} leaves nothing to predict; use the codebook's size")
    if model.kind != "vqgan" or objective.kind != "reconstruction":
        return
    if model.image_size < SMALLEST_SIDE:
        raise ValueError(f"model.image_size={model.image_size} is too small to compare; use {SMALLEST_SIDE} or more")
    for side in model.attention_at:
        if side != MIDDLE and side not in model.sides:
            raise ValueError(
                f"model.attention_at={list(model.attention_at)}: no level has the side {side}; there are "
                f"{', '.join(map(str, model.sides))}, and {MIDDLE} for the middle blocks alone"
            )
    if objective.discriminator_weight:
        _check_discriminator(model)


def _check_discriminator(model: VqganConfig) -> None:
    """The widths of its norms must divide into groups, and its convolutions must leave a patch to judge."""
    channels, layers = model.discriminator_channels, model.discriminator_layers
    for wider in discriminator_widths(channels, layers):
        groups = group_count(wider, "width/4")
        if not groups or wider % groups:
            raise ValueError(
                f"model.discriminator_channels={channels}: {wider} channels are not divisible by {groups} groups; use "
                "a multiple of 2 up to 16, or of 16"
            )
    if model.image_size // 2**layers < 3:
        raise ValueError(
            f"model.discriminator_layers={layers} leave no patch of {model.image_size} pixels; use fewer, or "
            "objective.discriminator_weight=0"
        )


def discriminator_widths(channels: int, layers: int) -> list[int]:
    """Channels of the discriminator's normalised layers."""
    return [channels * min(2**index, 8) for index in range(1, layers + 1)]


def _check_optimizers(config: RunConfig) -> None:
    known = ROLES.get(config.objective.kind, ())
    for role in config.optim.roles:
        if role not in known:
            raise ValueError(
                f"optim.roles.{role}: {config.objective.kind!r} has no such optimizer beside the main one; "
                + (f"use {', '.join(known)}" if known else "leave optim.roles out")
            )
    for name, own in [("optim", config.optim), *((f"optim.roles.{role}", o) for role, o in config.optim.roles.items())]:
        if own.warmup_steps >= config.train.steps:
            raise ValueError(f"{name}.warmup_steps={own.warmup_steps} must be below train.steps={config.train.steps}")


def micro_batch_of(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """-> (micro batch per rank, accumulation steps) of a `world_size`; raises ValueError when it does not divide."""
    per_rank, rest = divmod(train.global_batch, world_size)
    micro = train.micro_batch or per_rank
    if rest or per_rank % micro:
        unit = world_size * (train.micro_batch or 1)
        low = train.global_batch // unit * unit
        usable = f"{low} or {low + unit}" if low else str(unit)
        raise ValueError(
            f"global_batch={train.global_batch} is not divisible by {world_size} ranks x micro_batch "
            f"{train.micro_batch or 1} = {unit}; use {usable}"
        )
    return micro, per_rank // micro


# ------------------------------------------------------------------------------- what a run may change on its way

CHANGEABLE = re.compile(r"train\.steps|optim\.(roles\.[^.]+\.)?(lr|schedule|warmup_steps|final_lr_fraction|power)")
"""What --change may change: read at every step, kept in no tensor and no count."""
CHANGEABLE_NAMES = (
    "train.steps, optim.lr, optim.schedule, optim.warmup_steps, optim.final_lr_fraction, optim.power "
    "(and those of optim.roles.NAME)"
)


def load_run(path: str | Path, overrides: Sequence[str], changes: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run; `changes` (--change key=value) are overrides that consent to another value.

    Raises ConfigError for a change of what a run may not change on the way.
    """
    consented_keys(changes)
    return load_settings(RunConfig, path, [*overrides, *changes])


def consented_keys(changes: Sequence[str]) -> frozenset[str]:
    """The keys of `key=value` words. Raises ConfigError for one that cannot be changed within a run."""
    keys = [change.partition("=")[0] for change in changes]
    for key in keys:
        if not CHANGEABLE.fullmatch(key):
            raise ConfigError(
                f"--change {key}: a run may change {CHANGEABLE_NAMES}; for anything else start another run, from this "
                "one's weights with `initial`"
            )
    return frozenset(keys)
