"""Settings of the learning-rate schedule. Imports no torch; the rates themselves are in engine/schedule.py."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipeline.settings import Settings


def _steps_or_share(given: Any) -> Any:
    """Return `given` if it is a whole number of steps, from 1 on, or a share between 0 and 1."""
    whole = type(given) is int and given >= 1
    share = type(given) is float and (0 < given < 1 or (given > 1 and given.is_integer()))
    if not (whole or share):
        raise ValueError("give a whole number of steps, from 1 on, or a share of train.steps between 0 and 1")
    return given if 0 < given < 1 else int(given)


StepsOrShare = Annotated[int | float, pydantic.BeforeValidator(_steps_or_share)]


class ScheduleConfig(Settings):
    """The learning-rate schedule over the steps of the run: a warm-up to `lr`, then one of these shapes.

    cosine, linear, polynomial (of `power`): down to `final_lr_fraction` * lr at the last step. constant: stays at lr.
    wsd: stays at lr, then decays over the last `decay_steps` (below 1: a share of train.steps) in the shape
    `decay_shape`.
    cosine_restarts: `cycles` cosines from lr down to the final rate, each `cycle_growth` times as long as the previous.
    inverse_sqrt: lr until step `timescale_steps` (0: until the end of the warm-up), then lr * sqrt(timescale / step).
    piecewise: lr times the factor of the last of `pieces`, [[step, factor], ...], that has begun; at first lr.
    """

    added: ClassVar[frozenset[str]] = frozenset(
        ("decay_steps", "decay_shape", "cycles", "cycle_growth", "timescale_steps", "pieces")
    )
    lr: PositiveFloat
    schedule: Literal[
        "cosine", "linear", "polynomial", "constant", "wsd", "cosine_restarts", "inverse_sqrt", "piecewise"
    ] = "cosine"
    warmup_steps: NonNegativeInt = 0
    final_lr_fraction: NonNegativeFloat = Field(0.0, le=1.0)
    power: PositiveFloat = 1.0
    decay_steps: StepsOrShare = 0.1
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"
    cycles: PositiveInt = 2
    cycle_growth: PositiveInt = 1
    timescale_steps: NonNegativeInt = 0
    pieces: tuple[tuple[PositiveInt, PositiveFloat], ...] = ()

    def decay_of(self, steps: int) -> int:
        """Return the number of steps over which `wsd` decays in a run of `steps`."""
        return max(1, round(self.decay_steps * steps)) if self.decay_steps < 1 else int(self.decay_steps)

    @property
    def timescale(self) -> int:
        """The last step at which `inverse_sqrt` has the whole rate."""
        return self.timescale_steps or self.warmup_steps

    def cycle_units(self) -> int:
        """Return the length of all cycles in units of the first one."""
        growth = self.cycle_growth
        return self.cycles if growth == 1 else (growth**self.cycles - 1) // (growth - 1)


def check_schedule(name: str, own: ScheduleConfig, steps: int) -> None:
    """Raise ValueError if a schedule does not fit into the steps of the run. name: of its section."""
    if own.warmup_steps >= steps:
        raise ValueError(f"{name}.warmup_steps={own.warmup_steps} must be below train.steps={steps}")
    check = {
        "wsd": _check_decay,
        "cosine_restarts": _check_cycles,
        "inverse_sqrt": _check_timescale,
        "piecewise": _check_pieces,
    }.get(own.schedule)
    if check:
        check(name, own, steps)


def _check_decay(name: str, own: ScheduleConfig, steps: int) -> None:
    decay, left = own.decay_of(steps), steps - own.warmup_steps
    if decay > left:
        told = f" of train.steps={steps} is {decay} steps, which" if own.decay_steps < 1 else ""
        raise ValueError(
            f"{name}.decay_steps={own.decay_steps}{told} must not exceed the {left} steps after the warm-up; use at "
            f"most {left}, or more train.steps"
        )


def _check_cycles(name: str, own: ScheduleConfig, steps: int) -> None:
    left = steps - own.warmup_steps
    if own.cycles < 2:
        raise ValueError(f"{name}.cycles=1 restarts nothing; use 2 or more, or {name}.schedule=cosine")
    longest = own.cycles if own.cycle_growth == 1 else 1 + left.bit_length()  # growth >= 2 exceeds `left` by then
    if own.cycles > longest or own.cycle_units() > left:
        raise ValueError(
            f"{name}.cycles={own.cycles}, {name}.cycle_growth={own.cycle_growth}: {left} steps after the warm-up leave "
            "the first cycle less than one; use fewer cycles, a lower growth, or more train.steps"
        )


def _check_timescale(name: str, own: ScheduleConfig, steps: int) -> None:
    if own.timescale == 0:
        raise ValueError(
            f"{name}.schedule=inverse_sqrt needs {name}.warmup_steps, or {name}.timescale_steps (T5: 10000)"
        )
    if not own.warmup_steps <= own.timescale < steps:
        raise ValueError(
            f"{name}.timescale_steps={own.timescale_steps} must be at least warmup_steps={own.warmup_steps} and below "
            f"train.steps={steps}; leave it out to fall from the end of the warm-up"
        )


def _check_pieces(name: str, own: ScheduleConfig, steps: int) -> None:
    at = [step for step, _ in own.pieces]
    if not at:
        raise ValueError(f"{name}.schedule=piecewise needs {name}.pieces, for example [[{steps // 2 or 1}, 0.1]]")
    if sorted(set(at)) != at:
        raise ValueError(f"{name}.pieces begin at the steps {at}; order them, each step above the previous one")
    if at[0] < own.warmup_steps or at[-1] >= steps:
        raise ValueError(
            f"{name}.pieces begin at the steps {at}; each must be at least warmup_steps={own.warmup_steps} and below "
            f"train.steps={steps}"
        )
