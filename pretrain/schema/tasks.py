"""What a task can be told: its settings, which models it trains, and the metrics of a step. Imports no torch."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from data_pipeline.settings import Settings
from pretrain.schema.clip import ClipConfig
from pretrain.schema.common import MAIN, ModelSettings
from pretrain.schema.encoders import BertConfig, ElectraConfig
from pretrain.schema.gpt import GptConfig
from pretrain.schema.vqgan import MIDDLE, VqganConfig, discriminator_widths, group_count

Direction = Literal["min", "max"]
Metrics = dict[str, Direction | None]
"""Name in a step's row -> whether less or more of it is better; None: neither by itself."""

STEP: Metrics = {"loss": "min", "grad_norm": None, "lr": None}
MASKED: Metrics = {"mlm_loss": "min", "mlm_accuracy": "max"}
SMALLEST_SIDE = 8
"""Pixels of the smallest image that a reconstruction is compared in: its edges are compared down to a quarter."""


class TaskSettings(Settings):
    """Base of every task's section, which has a `kind` of its own."""

    kind: str
    trains: ClassVar[tuple[type[ModelSettings], ...]] = ()
    """The models that the task trains."""
    roles: ClassVar[tuple[str, ...]] = (MAIN,)
    """One name for each optimizer, the model's first."""
    replicated: ClassVar[bool] = False
    """Does every rank need the whole weights (ZeRO stage 0)?"""
    metrics: ClassVar[Metrics] = STEP
    """What a row of metrics.jsonl may hold."""

    def yields(self, metric: str, steps: int) -> bool:
        """Does a run of so many steps ever have this one of `metrics`?"""
        return True

    def shortest_row(self) -> str:
        """The shortest row of text that the task can use, pieces separated by spaces; empty where any will do."""
        return ""

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Raise ValueError where the task cannot train this model, which is one of `trains`."""


class ContrastiveConfig(TaskSettings):
    """Symmetric cross-entropy over the global batch (CLIP)."""

    kind: Literal["contrastive"] = "contrastive"
    trains = (ClipConfig,)
    metrics = {**STEP, "image_to_text_accuracy": "max", "text_to_image_accuracy": "max", "logit_scale": None}

    def shortest_row(self) -> str:
        """A text of one piece."""
        return "[CLS] a [SEP]"

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """A pair is told apart from other pairs."""
        if global_batch < 2:
            raise ValueError("train.global_batch=1 has no other pair to tell a pair from; use 2 or more")


class MaskingConfig(TaskSettings):
    """What is masked: pieces, whole words (Chinese ones by jieba), or n-grams of one to three words.

    packing: several samples share a row, each attending to itself alone, so that next to no padding is computed.
    """

    mask_rate: PositiveFloat = Field(0.15, lt=1.0)
    masking: Literal["piece", "word", "ngram"] = "piece"
    packing: bool = False

    def shortest_row(self) -> str:
        """A text of one piece."""
        return "[CLS] a [SEP]"


class MlmNspConfig(MaskingConfig):
    """Masked language model, with next-sentence prediction where `nsp` is set (BERT)."""

    kind: Literal["mlm"] = "mlm"
    nsp: bool = True
    trains = (BertConfig,)
    metrics = {**STEP, **MASKED, "nsp_loss": "min", "nsp_accuracy": "max"}

    def yields(self, metric: str, steps: int) -> bool:
        """Those of the pairs only with pairs."""
        return self.nsp or not metric.startswith("nsp_")

    def shortest_row(self) -> str:
        """A text of one piece, or two of them."""
        return "[CLS] a [SEP] b [SEP]" if self.nsp else super().shortest_row()

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Pairs need rows and types of their own."""
        assert isinstance(model, BertConfig)
        if self.nsp and self.packing:
            raise ValueError("task.packing leaves no row of its own to a pair of sentences; set task.nsp=false")
        if self.nsp and model.type_vocab < 2:
            raise ValueError("model.type_vocab=1 cannot tell two sentences apart; use 2, or task.nsp=false")


class RtdConfig(MaskingConfig):
    """Replaced-token detection: MLM + weight * RTD (ELECTRA)."""

    kind: Literal["rtd"] = "rtd"
    rtd_weight: NonNegativeFloat = 50.0
    trains = (ElectraConfig,)
    metrics = {
        **STEP, **MASKED, "rtd_loss": "min", "rtd_accuracy": "max", "rtd_precision": "max", "rtd_recall": "max",
    }  # fmt: skip


class AutoregressiveConfig(TaskSettings):
    """Cross-entropy of the image codes given the text (and, with `caption_drop`, given nothing, for guidance)."""

    kind: Literal["autoregressive"] = "autoregressive"
    caption_drop: NonNegativeFloat = Field(0.0, lt=1.0)
    trains = (GptConfig,)
    metrics = {**STEP, "code_accuracy": "max"}

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """A code has an alternative."""
        assert isinstance(model, GptConfig)
        if model.image_vocab < 2:
            raise ValueError(
                f"model.image_vocab={model.image_vocab} leaves nothing to predict; use the codebook's size"
            )


class ReconstructionConfig(TaskSettings):
    """Training of the VQGAN: pixels + perceptual + adversarial + codebook."""

    kind: Literal["reconstruction"] = "reconstruction"
    codebook_weight: PositiveFloat = 1.0
    commitment: PositiveFloat = 0.25
    legacy_commitment: bool = False
    perceptual_weight: NonNegativeFloat = 1.0
    discriminator_weight: NonNegativeFloat = 0.8
    discriminator_start_step: NonNegativeInt = 250_001
    revive_after_steps: NonNegativeInt = 0
    trains = (VqganConfig,)
    roles = (MAIN, "discriminator")
    replicated = True
    metrics = {
        **STEP, "absolute_error": "min", "codebook_loss": "min", "psnr": "max", "codes_used": "max",
        "perplexity": "max", "adversarial_weight": None, "discriminator_loss": None, "discriminator_logits_real": None,
        "discriminator_logits_fake": None, "discriminator_grad_norm": None, "discriminator_lr": None,
    }  # fmt: skip

    def yields(self, metric: str, steps: int) -> bool:
        """Those of the discriminator once it takes part."""
        plays = bool(self.discriminator_weight) and self.discriminator_start_step < steps
        return plays or not metric.startswith(("adversarial_", "discriminator_"))

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """The image is large enough for the edges that are compared and for a patch of the discriminator."""
        assert isinstance(model, VqganConfig)
        if model.image_size < SMALLEST_SIDE:
            raise ValueError(
                f"model.image_size={model.image_size} is too small to compare; use {SMALLEST_SIDE} or more"
            )
        for side in model.attention_at:
            if side != MIDDLE and side not in model.sides:
                raise ValueError(
                    f"model.attention_at={list(model.attention_at)}: no level has the side {side}; there are "
                    f"{', '.join(map(str, model.sides))}, and {MIDDLE} for the middle blocks alone"
                )
        if self.discriminator_weight:
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
            "task.discriminator_weight=0"
        )


TASK_SETTINGS: dict[str, type[TaskSettings]] = {
    "contrastive": ContrastiveConfig,
    "mlm": MlmNspConfig,
    "rtd": RtdConfig,
    "autoregressive": AutoregressiveConfig,
    "reconstruction": ReconstructionConfig,
}

# ------------------------------------------------------------------- which checkpoint is the best: train.keep_best


def parsed(best: str) -> tuple[str, Direction | None]:
    """`train.keep_best` -> the metric's name, and its direction where one is given or known."""
    front, colon, name = best.partition(":")
    if colon and front in ("min", "max"):
        return name, "min" if front == "min" else "max"
    known = (settings.metrics for settings in TASK_SETTINGS.values())
    return best, next((metrics[best] for metrics in known if best in metrics), None)


def check_best(best: str, task: TaskSettings, steps: int) -> None:
    """Raises ValueError with the known names for one that the task does not yield, or without a direction."""
    if not best:
        return
    name, direction = parsed(best)
    names = [known for known in task.metrics if task.yields(known, steps)]
    if name not in names:
        raise ValueError(
            f"train.keep_best={best!r}: {task.kind!r} yields no such metric; use one of {', '.join(names)}, "
            "with min: or max: in front for another direction than usual"
        )
    if direction is None:
        raise ValueError(
            f"train.keep_best={best!r}: neither less nor more of it is better by itself; say min:{name} or max:{name}"
        )
