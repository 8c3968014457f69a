"""Strikes of a campaign as a function of its seed: target, step, point within the step, and kind."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

Whom = Literal["rank", "launcher", "tree", "stop", "freeze", "storage", "nobody"]
When = Literal["step", "start", "load", "staging", "shard", "commit", "retention"]
Damage = Literal["", "cut", "flip"]
Fault = Literal["", "full", "503", "refuse", "slow", "torn"]

BLOWS: dict[Whom, int] = {"rank": 4, "launcher": 2, "tree": 2, "stop": 2, "freeze": 1}
"""Weights, out of 11: SIGKILL to a rank, to the launcher, to all; SIGTERM to the launcher; SIGSTOP to a rank."""
WHEN: dict[When, int] = {"step": 5, "start": 1, "load": 2, "staging": 1, "shard": 2, "commit": 2, "retention": 1}
"""Weights of the points: anywhere; before the first step; while reading a checkpoint; before a save is staged; while a
shard is written; shards written, no manifest yet; manifest written, older checkpoints being removed.

Saves are written and uploaded by a thread of each rank, which is struck together with its rank at the last four points.
"""
FAULTS_OF_DISK: tuple[Fault, ...] = ("full",)
FAULTS_OF_S3: tuple[Fault, ...] = ("503", "refuse", "slow", "torn")
STORAGE_SHARE = 0.12
"""Probability that a strike hits the storage instead of processes, where that is possible."""
DAMAGE_SHARE = 0.15
"""Probability that a shard of the newest checkpoint is truncated or gets a bit flipped while nothing runs."""

_BLOW = {
    "rank": "SIGKILL to rank {rank}", "launcher": "SIGKILL to the launcher", "tree": "SIGKILL to everything",
    "stop": "SIGTERM to the launcher", "freeze": "SIGSTOP to rank {rank}", "storage": "",
    "nobody": "no strike, the run ended by itself",
}  # fmt: skip
_FAULT = {"": "", "full": "the disk is full", "503": "S3 answers 503", "refuse": "S3 refuses connections",
          "slow": "S3 is slow", "torn": "S3 takes half of each upload"}  # fmt: skip
_POINT = {
    "step": "at step {step}", "start": "at the start", "load": "while reading a checkpoint",
    "staging": "before a save, from step {step}", "shard": "within a shard, from step {step}",
    "commit": "before a manifest, from step {step}", "retention": "after a manifest, from step {step}",
}  # fmt: skip
_DAMAGE = {"": "", "cut": ", then a shard cut short", "flip": ", then a shard with a bit flipped"}


@dataclasses.dataclass(frozen=True)
class Strike:
    """One signal or one storage fault, its point, and the damage done to the newest checkpoint afterwards.

    after: relative time within the point, in [0, 1). whom "nobody" is never planned: it records an unexplained end.
    """

    whom: Whom
    rank: int
    step: int
    when: When
    after: float
    damage: Damage = ""
    fault: Fault = ""

    def __str__(self) -> str:
        text = f"{_BLOW[self.whom]}{_FAULT[self.fault]} {_POINT[self.when]}{_DAMAGE[self.damage]}"
        return text.format(rank=self.rank, step=self.step)


def plan(seed: int, kills: int, steps: int, world: int, faults: Sequence[Fault] = ()) -> list[Strike]:
    """Return `kills` strikes in order of step, as a function of the arguments only. faults: possible storage faults.

    A freeze is always at a step, since it needs peers; a storage fault is at a step or present from the start.
    """
    draw = random.Random(seed)
    return [
        _draw(draw, step, world, faults) for step in sorted(draw.randrange(1, max(2, steps - 1)) for _ in range(kills))
    ]


def _draw(draw: random.Random, step: int, world: int, faults: Sequence[Fault]) -> Strike:
    whom = draw.choices(list(BLOWS), list(BLOWS.values()))[0]
    when = draw.choices(list(WHEN), list(WHEN.values()))[0]
    rank, after = draw.randrange(world), draw.random()
    damages: tuple[Damage, ...] = ("cut", "flip")
    damage: Damage = draw.choice(damages) if draw.random() < DAMAGE_SHARE else ""
    if faults and draw.random() < STORAGE_SHARE:
        fault = draw.choice(faults)
        return Strike(
            "storage", rank, step, "start" if when == "start" and fault != "full" else "step", after, "", fault
        )
    return Strike(whom, rank, step, "step" if whom == "freeze" else when, after, damage)
