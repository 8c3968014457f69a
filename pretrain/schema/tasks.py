"""Settings of each task, the models it trains, and the metrics of its steps. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from pretrain.schema.clip import ClipConfig
from pretrain.schema.common import MAIN, STEP, Direction, Metrics, ModelSettings, TaskSettings
from pretrain.schema.encoders import BertConfig, ElectraConfig
from pretrain.schema.gpt import GptConfig
from pretrain.schema.vit import VitConfig
from pretrain.schema.vqgan import MIDDLE, VqganConfig, discriminator_widths, group_count

MASKED: Metrics = {"mlm_loss": "min", "mlm_accuracy": "max"}
SMALLEST_SIDE = 8
"""Smallest side in pixels for the reconstruction loss, which compares edges down to a quarter of the side."""


class PairsConfig(TaskSettings):
    """Losses that compare every image of the global batch with every text."""

    trains = (ClipConfig,)
    specials = ("cls", "sep", "pad")
    metrics = {**STEP, "image_to_text_accuracy": "max", "text_to_image_accuracy": "max", "logit_scale": None}
    evaluated = {"retrieval_r1": "max", "candidates": None, "groups": None}

    def shortest_row(self) -> str:
        """A text of one piece."""
        return "[CLS] a [SEP]"

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require a second pair to contrast with."""
        if global_batch < 2:
            raise ValueError("train.global_batch=1: a contrastive loss needs at least 2 pairs; use 2 or more")


class ContrastiveConfig(PairsConfig):
    """Symmetric cross-entropy over the global batch (CLIP)."""

    kind: Literal["contrastive"] = "contrastive"

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require a second pair, and a model without a bias, which the softmax cancels."""
        super().check(model, global_batch)
        assert isinstance(model, ClipConfig)
        if model.logit_bias is not None:
            raise ValueError(
                f"model.logit_bias={model.logit_bias:g} has no effect on 'contrastive', whose softmax cancels it; "
                "leave it out, or use task.kind=sigmoid"
            )


class SigmoidConfig(PairsConfig):
    """Sigmoid loss over all pairs of the global batch, Zhai et al. 2023, arXiv:2303.15343 (SigLIP)."""

    kind: Literal["sigmoid"] = "sigmoid"
    model_defaults = {"logit_scale": 10.0, "logit_bias": -10.0}
    metrics = {**PairsConfig.metrics, "logit_bias": None}

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require a second pair, and a model with a bias."""
        super().check(model, global_batch)
        assert isinstance(model, ClipConfig)
        if model.logit_bias is None:
            raise ValueError("model.logit_bias is null, but 'sigmoid' trains it; leave it out, or use -10")


class MaskingConfig(TaskSettings):
    """Masking of pieces, whole words (Chinese words by jieba), or n-grams of one to three words.

    packing: put several samples in a row, each attending only to itself, so that almost no padding is computed.
    """

    mask_rate: PositiveFloat = Field(0.15, lt=1.0)
    masking: Literal["piece", "word", "ngram"] = "piece"
    packing: bool = False
    specials = ("cls", "sep", "pad", "mask")

    def shortest_row(self) -> str:
        """A text of one piece."""
        return "[CLS] a [SEP]"


class MlmNspConfig(MaskingConfig):
    """Masked language modelling, with next-sentence prediction if `nsp` is set (BERT)."""

    kind: Literal["mlm"] = "mlm"
    nsp: bool = True
    trains = (BertConfig,)
    metrics = {**STEP, **MASKED, "nsp_loss": "min", "nsp_accuracy": "max"}

    def yields(self, metric: str, steps: int) -> bool:
        """Return whether the run reports `metric`; `nsp_*` only with `nsp`."""
        return self.nsp or not metric.startswith("nsp_")

    def shortest_row(self) -> str:
        """A text of one piece, or with `nsp` two such texts."""
        return "[CLS] a [SEP] b [SEP]" if self.nsp else super().shortest_row()

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require unpacked rows and two token types for sentence pairs."""
        assert isinstance(model, BertConfig)
        if self.nsp and self.packing:
            raise ValueError("task.packing does not support pairs of sentences; set task.nsp=false")
        if self.nsp and model.type_vocab < 2:
            raise ValueError(
                "model.type_vocab=1 has no second segment for a pair of sentences; use 2, or task.nsp=false"
            )


class RtdConfig(MaskingConfig):
    """Replaced-token detection: MLM + weight * RTD (ELECTRA)."""

    kind: Literal["rtd"] = "rtd"
    rtd_weight: NonNegativeFloat = 50.0
    trains = (ElectraConfig,)
    metrics = {
        **STEP, **MASKED, "rtd_loss": "min", "rtd_accuracy": "max", "rtd_precision": "max", "rtd_recall": "max",
    }  # fmt: skip


class AutoregressiveConfig(TaskSettings):
    """Cross-entropy of the image codes given the text, which is dropped at rate `caption_drop` (for guidance)."""

    kind: Literal["autoregressive"] = "autoregressive"
    caption_drop: NonNegativeFloat = Field(0.0, lt=1.0)
    trains = (GptConfig,)
    specials = ("pad",)
    metrics = {**STEP, "code_accuracy": "max"}
    evaluated = {
        "prompts": None,
        **{f"{one}{name}_accuracy": "max" for one in ("", "single_") for name in ("prompt", "shape", "colour")},
    }

    def without_noise(self) -> Self:
        """Return a copy that drops no caption."""
        return self.model_copy(update={"caption_drop": 0.0})

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require at least two image codes."""
        assert isinstance(model, GptConfig)
        if model.image_vocab < 2:
            raise ValueError(
                f"model.image_vocab={model.image_vocab} leaves nothing to predict; use the codebook's size"
            )


class ReconstructionConfig(TaskSettings):
    """VQGAN training: pixel, perceptual, adversarial and codebook losses."""

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
    evaluated = {"reconstruction_psnr": "max"}

    def yields(self, metric: str, steps: int) -> bool:
        """Return whether the run reports `metric`; the discriminator's only if it starts before the end."""
        plays = bool(self.discriminator_weight) and self.discriminator_start_step < steps
        return plays or not metric.startswith(("adversarial_", "discriminator_"))

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require attention at known levels, and an image large enough for the edge loss and a discriminator patch."""
        assert isinstance(model, VqganConfig)
        if model.image_size < SMALLEST_SIDE:
            raise ValueError(
                f"model.image_size={model.image_size} is too small for the perceptual loss; use {SMALLEST_SIDE} or more"
            )
        for side in model.attention_at:
            if side != MIDDLE and side not in model.sides:
                raise ValueError(
                    f"model.attention_at={list(model.attention_at)}: no level has side {side}; use "
                    f"{', '.join(map(str, model.sides))}, and {MIDDLE} for the middle blocks alone"
                )
        if self.discriminator_weight:
            _check_discriminator(model)


def _check_discriminator(model: VqganConfig) -> None:
    """Require widths that divide into norm groups, and convolutions that leave at least one patch."""
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
            f"model.discriminator_layers={layers} are too many for {model.image_size} pixels; use fewer, or "
            "task.discriminator_weight=0"
        )


class ClassifyConfig(TaskSettings):
    """Cross-entropy of the sample's label. label_smoothing: share of the target spread evenly over all classes."""

    kind: Literal["classify"] = "classify"
    label_smoothing: NonNegativeFloat = Field(0.0, lt=1.0)
    trains = (VitConfig,)
    metrics = {**STEP, "accuracy": "max"}
    evaluated = {"top_1": "max", "top_5": "max", "samples": None}

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Require a choice."""
        if (model.reads.classes or 0) < 2:
            raise ValueError(f"model.classes={model.reads.classes} leaves nothing to predict; use 2 or more")


TASK_SETTINGS: dict[str, type[TaskSettings]] = {
    "contrastive": ContrastiveConfig,
    "sigmoid": SigmoidConfig,
    "mlm": MlmNspConfig,
    "rtd": RtdConfig,
    "autoregressive": AutoregressiveConfig,
    "reconstruction": ReconstructionConfig,
    "classify": ClassifyConfig,
}


def fill_model(tree: Any) -> Any:
    """Return a run's tree with the task's `model_defaults` where its model leaves them out."""
    if not isinstance(tree, Mapping):
        return tree
    model, task = tree.get("model"), tree.get("task")
    if not isinstance(model, Mapping) or not isinstance(task, Mapping):
        return tree
    settings = TASK_SETTINGS.get(str(task.get("kind")), TaskSettings)
    trained = any(known.model_fields["kind"].default == model.get("kind") for known in settings.trains)
    return {**tree, "model": {**settings.model_defaults, **model}} if trained else tree


# ------------------------------------------------------------------- which checkpoint is the best: train.keep_best

EVALUATED = "eval/"
"""Prefix of the figures of an evaluation in metrics.jsonl."""


def figure_name(evaluation: str, figure: str) -> str:
    """Return the name in metrics.jsonl of a figure of an evaluation; the only evaluation may have the empty name."""
    return f"{EVALUATED}{evaluation}/{figure}" if evaluation else f"{EVALUATED}{figure}"


def figures_of(evaluations: Iterable[str], task: TaskSettings) -> Metrics:
    """Return the figures of the named evaluations, by their names in metrics.jsonl."""
    return {figure_name(name, figure): way for name in evaluations for figure, way in task.figures().items()}


def parsed(best: str) -> tuple[str, Direction | None]:
    """Parse `train.keep_best` -> the metric's name, and its direction if given or known."""
    front, colon, name = best.partition(":")
    if colon and front in ("min", "max"):
        return name, "min" if front == "min" else "max"
    own = best.rpartition("/")[2] if best.startswith(EVALUATED) else best
    known = (settings.metrics | settings.evaluated for settings in TASK_SETTINGS.values())
    return best, next((metrics[own] for metrics in known if own in metrics), None)


def check_best(best: str, task: TaskSettings, steps: int, evaluations: Iterable[str] = ()) -> None:
    """Raise ValueError, listing the known names, for a metric that the run does not report or without a direction.

    evaluations: names of the evaluations that are made in training.
    """
    if not best:
        return
    name, direction = parsed(best)
    names = [known for known in task.metrics if task.yields(known, steps)] + [*figures_of(evaluations, task)]
    if name not in names:
        lacks = name.startswith(EVALUATED) and not any(known.startswith(EVALUATED) for known in names)
        hint = "; a figure of an evaluation needs data.evaluation and train.evaluate_every_steps" if lacks else ""
        raise ValueError(
            f"train.keep_best={best!r}: {task.kind!r} yields no such metric; use one of {', '.join(names)}, "
            f"with min: or max: in front for another direction than usual{hint}"
        )
    if direction is None:
        raise ValueError(f"train.keep_best={best!r}: its better direction is undefined; use min:{name} or max:{name}")
