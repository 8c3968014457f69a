"""Learning rate as a pure function of the step, so there is no state to save."""

import math

from pretrain.config import AdamWConfig


def learning_rate(step: int, steps: int, optim: AdamWConfig) -> float:
    """Return the rate of the update from the weights of `step` to those of `step + 1`, 0 <= step < steps.

    Linear warm-up to `lr` over `warmup_steps`, then from `lr` to `final_lr_fraction * lr` at `steps` along the
    schedule.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / (steps - optim.warmup_steps)
    left = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "polynomial": (1.0 - done) ** optim.power,
    }[optim.schedule]
    return optim.lr * (optim.final_lr_fraction + (1.0 - optim.final_lr_fraction) * left)
