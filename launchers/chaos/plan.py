"""Which strikes a seed means: who is struck, at which step and point of it, and how."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Literal

Whom = Literal["rank", "launcher", "tree", "stop", "freeze", "storage", "nobody"]
When = Literal["step", "start", "load", "staging", "shard", "commit", "retention"]
Damage = Literal["", "cut", "flip"]
Fault = Literal["", "full", "503", "refuse", "slow", "torn"]

BLOWS: dict[Whom, int] = {"rank": 4, "launcher": 2, "tree": 2, "stop": 2, "freeze": 1}
"""SIGKILL to a rank, to the launcher, to all; SIGTERM to the launcher; SIGSTOP to a rank. With how often of 11."""
WHEN: dict[When, int] = {"step": 5, "start": 1, "load": 2, "staging": 1, "shard": 2, "commit": 2, "retention": 1}
"""Points: anywhere; before the first step; while a checkpoint is read; before a save is staged; while a shard is
written; shards written, no manifest; the manifest written, older checkpoints being removed.

What writes and uploads a save is a thread of each rank: it is struck with its rank, at the last four of them.
"""
FAULTS_OF_DISK: tuple[Fault, ...] = ("full",)
FAULTS_OF_S3: tuple[Fault, ...] = ("503", "refuse", "slow", "torn")
STORAGE_SHARE = 0.12
"""How often the storage is struck instead of processes, where it can be."""
DAMAGE_SHARE = 0.15
"""How often a shard of the newest checkpoint is cut or flipped while nobody runs."""

_BLOW = {
    "rank": "SIGKILL to rank {rank}", "launcher": "SIGKILL to the launcher", "tree": "SIGKILL to everything",
    "stop": "SIGTERM to the launcher", "freeze": "SIGSTOP to rank {rank}", "storage": "",
    "nobody": "nobody struck, the run ended by itself",
}  # fmt: skip
_FAULT = {"": "", "full": "the disk is full", "503": "S3 answers 503", "refuse": "S3 refuses connections",
          "slow": "S3 is slow", "torn": "S3 takes half of each upload"}  # fmt: skip
_POINT = {
    "step": "at step {step}", "start": "at the start", "load": "while a checkpoint is read",
    "staging": "before a save from step {step} on", "shard": "within a shard from step {step} on",
    "commit": "before a manifest from step {step} on", "retention": "after a manifest from step {step} on",
}  # fmt: skip
_DAMAGE = {"": "", "cut": ", then a shard cut short", "flip": ", then a shard with a bit flipped"}


@dataclasses.dataclass(frozen=True)
class Strike:
    """One blow or one fault of the storage: at which point, and what is done to the newest checkpoint afterwards.

    after: in [0, 1), where within the point. "nobody" is in no plan: it stands for an end that no strike explains.
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
    """`kills` strikes by rising step, a function of the arguments alone; `faults`: what the storage can be struck with.

    A freeze waits for a step: it needs peers. So does a fault of the storage, or it is there from the start on.
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
