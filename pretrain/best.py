"""Which checkpoint is the best: the metrics of each objective, and whether less or more of one is better.

`train.keep_best` is a name of METRICS, or "min:NAME" or "max:NAME"; imports no torch.
"""

from collections.abc import Mapping
from typing import Any, Literal

Direction = Literal["min", "max"]

STEP: dict[str, Direction | None] = {"loss": "min", "grad_norm": None, "lr": None}
MASKED: dict[str, Direction | None] = {"mlm_loss": "min", "mlm_accuracy": "max"}
METRICS: dict[str, dict[str, Direction | None]] = {
    "contrastive": {
        **STEP, "image_to_text_accuracy": "max", "text_to_image_accuracy": "max", "logit_scale": None,
    },
    "mlm": {**STEP, **MASKED, "nsp_loss": "min", "nsp_accuracy": "max"},
    "rtd": {
        **STEP, **MASKED, "rtd_loss": "min", "rtd_accuracy": "max", "rtd_precision": "max", "rtd_recall": "max",
    },
    "autoregressive": {**STEP, "code_accuracy": "max"},
    "reconstruction": {
        **STEP, "absolute_error": "min", "codebook_loss": "min", "psnr": "max", "codes_used": "max",
        "perplexity": "max", "adversarial_weight": None, "discriminator_loss": None, "discriminator_logits_real": None,
        "discriminator_logits_fake": None, "discriminator_grad_norm": None, "discriminator_lr": None,
    },
}  # fmt: skip
"""Names in a step's row by the objective's kind; None: neither end is better by itself, so the direction is given."""


def parsed(best: str) -> tuple[str, Direction | None]:
    """`train.keep_best` -> the metric's name, and its direction where one is given or known."""
    front, colon, name = best.partition(":")
    if colon and front in ("min", "max"):
        return name, "min" if front == "min" else "max"
    return best, next((names[best] for names in METRICS.values() if best in names), None)


def yields(name: str, objective: Mapping[str, Any], steps: int) -> bool:
    """Does a run of so many steps with this objective's settings ever yield the metric?"""
    if name.startswith("nsp_"):
        return bool(objective.get("nsp", True))
    if name.startswith(("adversarial_", "discriminator_")):
        return bool(objective["discriminator_weight"]) and objective["discriminator_start_step"] < steps
    return True


def check_best(best: str, objective: Mapping[str, Any], steps: int) -> None:
    """Raises ValueError with the known names for one that the objective does not yield, or without a direction."""
    if not best:
        return
    name, direction = parsed(best)
    names = [known for known in METRICS[objective["kind"]] if yields(known, objective, steps)]
    if name not in names:
        raise ValueError(
            f"train.keep_best={best!r}: {objective['kind']!r} yields no such metric; use one of {', '.join(names)}, "
            "with min: or max: in front for another direction than usual"
        )
    if direction is None:
        raise ValueError(
            f"train.keep_best={best!r}: neither less nor more of it is better by itself; say min:{name} or max:{name}"
        )
