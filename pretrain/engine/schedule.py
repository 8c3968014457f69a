"""Learning rate as a pure function of the step, so there is no state to save."""

import math
from collections.abc import Callable

from pretrain.schema.schedule import ScheduleConfig

Left = Callable[[int, int, ScheduleConfig], float]
"""(step, steps of the run, settings) -> share of the way from the final rate (0) to the peak (1), after the warm-up."""


def ema_rate(step: int, decay: float) -> float:
    """Return the weight of the old average in the update of `step`: min(decay, (1 + step) / (10 + step)), as TF's EMA.

    The start at 0.1 lets the average forget the initial weights.
    """
    return min(decay, (1 + step) / (10 + step))


def learning_rate(step: int, steps: int, optim: ScheduleConfig) -> float:
    """Return the rate of the update from the weights of `step` to those of `step + 1`, 0 <= step < steps.

    Linear warm-up to `lr` over `warmup_steps`, then the schedule. `inverse_sqrt` and `piecewise` never fall below
    `final_lr_fraction * lr`; the others reach it at `steps`.

    transformers and torch agree from the end of the warm-up on. In the warm-up transformers' rates are those of the
    previous step, so that its first update moves nothing.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule in FACTORS:
        return optim.lr * max(optim.final_lr_fraction, FACTORS[optim.schedule](step, steps, optim))
    left = SHAPES[optim.schedule](step, steps, optim)
    return optim.lr * (optim.final_lr_fraction + (1.0 - optim.final_lr_fraction) * left)


def _done(step: int, steps: int, optim: ScheduleConfig) -> float:
    """Return the share of the steps after the warm-up that are done."""
    return (step - optim.warmup_steps) / (steps - optim.warmup_steps)


def _cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _stable_then_decay(step: int, steps: int, optim: ScheduleConfig) -> float:
    """Warm-up, stable, decay. Hu et al. 2024, arXiv:2404.06395; "1-sqrt": Hägele et al. 2024, arXiv:2405.18392."""
    decay = optim.decay_of(steps)
    done = max(0, step - (steps - decay)) / decay
    return {"linear": 1.0 - done, "cosine": _cosine(done), "1-sqrt": 1.0 - math.sqrt(done)}[optim.decay_shape]


def _restarts(step: int, steps: int, optim: ScheduleConfig) -> float:
    """SGDR: cosine with warm restarts. Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5.

    The cycles fill the steps after the warm-up. In whole numbers, so that no restart is missed by rounding: the time
    since the warm-up is `at` of `whole`, in units of 1 / (span * units) of it.
    """
    span, units = steps - optim.warmup_steps, optim.cycle_units()
    at, length = (step - optim.warmup_steps) * units, span
    if optim.cycle_growth == 1:
        at %= length
    while at >= length:
        at, length = at - length, length * optim.cycle_growth
    return _cosine(at / length)


def _inverse_sqrt(step: int, _steps: int, optim: ScheduleConfig) -> float:
    """Noam, Vaswani et al. 2017, arXiv:1706.03762, eq. 3, whose peak here is `lr`; T5's, arXiv:1910.10683, 3.1.2.

    transformers' `timescale` shifts the curve, so that it falls from the end of the warm-up on; the two are equal where
    it is left out.
    """
    return math.sqrt(optim.timescale / max(step, optim.timescale))


def _piecewise(step: int, _steps: int, optim: ScheduleConfig) -> float:
    begun = [factor for at, factor in optim.pieces if at <= step]
    return begun[-1] if begun else 1.0


SHAPES: dict[str, Left] = {
    "constant": lambda _step, _steps, _optim: 1.0,
    "linear": lambda step, steps, optim: 1.0 - _done(step, steps, optim),
    "cosine": lambda step, steps, optim: _cosine(_done(step, steps, optim)),
    "polynomial": lambda step, steps, optim: (1.0 - _done(step, steps, optim)) ** optim.power,
    "wsd": _stable_then_decay,
    "cosine_restarts": _restarts,
}
FACTORS: dict[str, Left] = {"inverse_sqrt": _inverse_sqrt, "piecewise": _piecewise}
"""Schedules that give the factor of `lr` itself."""
