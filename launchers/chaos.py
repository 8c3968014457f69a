"""`tessera chaos`: a seeded kill campaign against a run, started the way a user starts it, and what it cost.

The run is trained twice in folders of its own: once undisturbed, once struck again and again, each time started again
with the same command. What was left behind is then held against the laws (laws.py). The seed decides who is struck,
when and how; the machine decides where in a step that falls.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from data_pipeline.errors import ConfigError, NodeFault
from data_pipeline.settings import load_settings
from launchers.local import die_with
from launchers.spec import LocalCluster, describe
from pretrain.config import RunConfig
from pretrain.goodput import METRICS, goodput, lines_of

MARKER = "chaos.json"
POLL_S = 0.005
HANG_TIMEOUT_S = 30
PATIENCE_S = 600.0
"""Longest wait for anything: the next step, the end of an attempt."""

Whom = Literal["rank", "launcher", "tree", "stop", "freeze"]
When = Literal["step", "save", "start"]
Damage = Literal["", "cut", "flip"]
WHOM: dict[Whom, int] = {"rank": 4, "launcher": 2, "tree": 2, "stop": 2, "freeze": 1}
"""SIGKILL to a rank, to the launcher, to all; SIGTERM to the launcher; SIGSTOP to a rank. With how often of 11."""
WHEN: dict[When, int] = {"step": 5, "save": 3, "start": 2}
DAMAGE_SHARE = 0.15
"""How often a shard of the newest checkpoint is cut or flipped while nobody runs."""
EXPECTED: dict[Whom, set[int]] = {
    "rank": {70}, "launcher": {-9}, "tree": {-9}, "stop": {75}, "freeze": {70},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Strike:
    """One blow: to whom, at which step and point of it, and what is done to the newest checkpoint afterwards."""

    whom: Whom
    rank: int
    step: int
    when: When
    after_s: float
    damage: Damage

    def __str__(self) -> str:
        target = {"launcher": "the launcher", "tree": "everything"}.get(self.whom, f"rank {self.rank}")
        verb = {"stop": "SIGTERM to the launcher", "freeze": f"SIGSTOP to rank {self.rank}"}.get(
            self.whom, f"SIGKILL to {target}"
        )
        point = {"step": f"at step {self.step}", "save": f"in a save from step {self.step} on", "start": "at the start"}
        return f"{verb} {point[self.when]}" + (f", then a shard {DAMAGED[self.damage]}" if self.damage else "")


DAMAGED = {"cut": "cut short", "flip": "with a bit flipped"}


@dataclasses.dataclass
class Event:
    """What one strike did."""

    strike: Strike
    code: int
    reached: int
    """The last step in metrics.jsonl when the attempt had ended."""
    struck_at: float
    ended_at: float
    damaged: str = ""
    orphans: tuple[int, ...] = ()


@dataclasses.dataclass
class Campaign:
    """The two runs and all that was done to the second."""

    config: RunConfig
    reference: Path
    struck: Path
    every: int
    events: list[Event]
    last_code: int


def plan(seed: int, kills: int, steps: int, world: int) -> list[Strike]:
    """`kills` strikes by rising step, a function of the arguments alone. A freeze waits for a step: it needs peers."""
    draw = random.Random(seed)
    strikes = []
    for step in sorted(draw.randrange(1, max(2, steps - 1)) for _ in range(kills)):
        whom = draw.choices(list(WHOM), list(WHOM.values()))[0]
        when = draw.choices(list(WHEN), list(WHEN.values()))[0]
        if whom == "freeze":
            when = "step"
        damages: tuple[Damage, Damage] = ("cut", "flip")
        damage: Damage = draw.choice(damages) if draw.random() < DAMAGE_SHARE else ""
        strikes.append(Strike(whom, draw.randrange(world), step, when, draw.random(), damage))
    return strikes


# ------------------------------------------------------------------------------------------- the campaign


def run_campaign(
    config_path: Path, overrides: Sequence[str], kills: int, seed: int, procs: int, say: Callable[[str], None]
) -> Campaign:
    """The reference, then the struck run until it is done.

    Raises ConfigError, and NodeFault when the reference fails.
    """
    config = load_settings(RunConfig, config_path, overrides)
    describe(config_path, overrides, LocalCluster(), 1, procs)
    home = Path(f"{config.run}-chaos-{seed}")
    _empty(home)
    common = [*overrides, "tracking.uri=''", f"train.collective_timeout_s={HANG_TIMEOUT_S}"]
    campaign = Campaign(config, home / "reference", home / "struck", config.train.checkpoint_every_steps, [], 0)

    def command(run: Path) -> list[str]:
        places = [f"run={run}"] + ([f"train.checkpoints={run}/elsewhere"] if config.train.checkpoints else [])
        launch = [sys.executable, "-m", "launchers.cli", "launch", "local", str(config_path), *common, *places]
        return [*launch, "--procs-per-node", str(procs), "--restarts", "0"]

    say(f"reference: {config.train.steps} steps on {procs} processes, undisturbed")
    attempt = Attempt(command(campaign.reference), campaign.reference)
    if attempt.wait() != 0:
        raise NodeFault(f"the undisturbed run failed, see {attempt.log}; mend it before it is struck")
    damaged: set[str] = set()
    for number, strike in enumerate(plan(seed, kills, config.train.steps, procs)):
        event = _strike(strike, Attempt(command(campaign.struck), campaign.struck), damaged)
        if event is None:
            say(f"strike {number + 1}: the run was done before it")
            break
        campaign.events.append(event)
        damaged |= {event.damaged.partition("/")[0]} - {""}
        say(f"strike {number + 1} of {kills}: {strike}; exit code {event.code}, {event.reached} steps made")
    campaign.last_code = Attempt(command(campaign.struck), campaign.struck).wait()
    return campaign


def _empty(home: Path) -> None:
    """A folder for this campaign; what an earlier campaign left is removed, anything else is not."""
    if home.exists() and not (home / MARKER).is_file():
        raise ConfigError(f"{home} exists and is no campaign's folder; move it away or choose another --seed")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / MARKER).write_text("{}\n", encoding="utf-8")


class Attempt:
    """One start of the launcher; its output goes to a log beside the run."""

    def __init__(self, command: list[str], run: Path) -> None:
        self.run = run
        self.log = run.with_suffix(".log")
        self.rows_before = sum(1 for _ in lines_of(run / METRICS))
        with self.log.open("a", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, process_group=0, preexec_fn=die_with(os.getpid())
            )
        self.process = psutil.Process(self.launcher.pid)

    @property
    def done(self) -> bool:
        return self.launcher.poll() is not None

    def wait(self) -> int:
        """The exit code; an attempt that does not end is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.launcher.wait(PATIENCE_S)
        self.launcher.kill()
        return self.launcher.wait()

    def step(self) -> int:
        """The last step that this attempt made; 0 where it made none yet."""
        rows = list(lines_of(self.run / METRICS))[self.rows_before :]
        return int(rows[-1]["step"]) if rows else 0

    def family(self) -> list[psutil.Process]:
        """The launcher and all below it; the ranks are those right below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return [self.process]

    def rank(self, rank: int) -> psutil.Process | None:
        """The process of a rank, once it is there."""
        for child in self.family()[1:]:
            with contextlib.suppress(psutil.Error):
                if child.ppid() == self.process.pid and child.environ().get("RANK") == str(rank):
                    return child
        return None


def _strike(strike: Strike, attempt: Attempt, spared: set[str]) -> Event | None:
    """Wait for the moment, strike, wait for the end; None when the attempt ended before.

    spared: checkpoints that are damaged already.
    """
    if not _moment(strike, attempt):
        attempt.wait()
        return None
    family, struck_at = attempt.family(), time.time()
    _hit(strike, attempt, family)
    code = attempt.wait()
    event = Event(strike, code, 0, struck_at, time.time(), orphans=_orphans(family))
    event.reached = max((int(row["step"]) for row in lines_of(attempt.run / METRICS)), default=0)
    if strike.damage:
        event.damaged = _damage(attempt.run, strike, spared)
    return event


def _moment(strike: Strike, attempt: Attempt) -> bool:
    """Returns when the strike is due; False when the attempt ended by itself."""
    deadline = time.monotonic() + PATIENCE_S
    while attempt.rank(strike.rank) is None and not attempt.done:
        time.sleep(POLL_S)
    if strike.when == "start":
        time.sleep(5 * strike.after_s)
        return not attempt.done
    while attempt.step() < strike.step or (strike.when == "save" and not _saving(attempt.run)):
        if attempt.done:
            return False
        if time.monotonic() > deadline:
            raise NodeFault(f"{attempt.run}: no step {strike.step} within {PATIENCE_S:g} s, see {attempt.log}")
        time.sleep(POLL_S)
    if strike.when == "step":
        time.sleep(0.2 * strike.after_s)
    return not attempt.done


def _saving(run: Path) -> bool:
    """Is there a checkpoint without its manifest?"""
    return any(not (folder / "MANIFEST.json").exists() for folder in checkpoint_folders(run))


def _hit(strike: Strike, attempt: Attempt, family: list[psutil.Process]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if strike.whom in ("rank", "freeze"):
            victim = attempt.rank(strike.rank)
            if victim is not None:
                victim.send_signal(signal.SIGSTOP if strike.whom == "freeze" else signal.SIGKILL)
        elif strike.whom == "tree":
            for process in reversed(family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        else:
            os.kill(attempt.launcher.pid, signal.SIGTERM if strike.whom == "stop" else signal.SIGKILL)


def _orphans(family: list[psutil.Process]) -> tuple[int, ...]:
    """Who is still there seconds after the launcher's end; they are ended here."""
    _, alive = psutil.wait_procs(family, timeout=15)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return tuple(process.pid for process in alive)


def _damage(run: Path, strike: Strike, spared: set[str]) -> str:
    """Cut or flip a shard of the newest checkpoint, if another whole one is left to go on from -> which."""
    folders = [folder for folder in checkpoint_folders(run) if folder.name not in spared]
    whole = [folder for folder in folders if (folder / "MANIFEST.json").exists()]
    if len(whole) < 2:
        return ""
    shards = sorted(whole[-1].glob("r*.safetensors"))
    shard = shards[strike.rank % len(shards)]
    data = bytearray(shard.read_bytes())
    at = int(strike.after_s * (len(data) - 1))
    if strike.damage == "cut":
        data = data[:at]
    else:
        data[at] ^= 1
    shard.write_bytes(data)
    return f"{whole[-1].name}/{shard.name}"


def checkpoint_folders(run: Path) -> list[Path]:
    return sorted([*run.glob("checkpoints/step-*"), *run.glob("elsewhere/step-*")])


# ---------------------------------------------------------------------------------------------- figures


def figures(campaign: Campaign) -> dict[str, Any]:
    """What the strikes cost, in seconds (median and longest) and steps."""
    rows = list(lines_of(campaign.struck / METRICS))
    starts = {line["attempt"]: line["started"] for line in lines_of(campaign.struck / "attempts.jsonl")}
    firsts: dict[int, dict[str, Any]] = {}
    for row in rows:
        firsts.setdefault(row["attempt"], row)
    next_step = [step_after - event.struck_at for event in campaign.events for step_after in _next(rows, event)]
    first_step = [row["time_ms"] / 1000 - starts[attempt] for attempt, row in firsts.items() if attempt in starts]
    noticed = [event.ended_at - event.struck_at for event in campaign.events if event.strike.whom == "freeze"]
    named = {"kill_to_next_step": next_step, "start_to_first_step": first_step, "freeze_to_end": noticed}
    told: dict[str, Any] = {}
    for name, values in named.items():
        if values:
            told |= {f"{name}_median_s": sorted(values)[len(values) // 2], f"{name}_longest_s": max(values)}
    told["steps_made_again"] = len(rows) - len({row["step"] for row in rows})
    told["goodput"] = goodput(campaign.struck)["goodput"]
    told["goodput_undisturbed"] = goodput(campaign.reference)["goodput"]
    return {name: round(value, 3) for name, value in told.items()}


def _next(rows: list[dict[str, Any]], event: Event) -> Iterator[float]:
    """When the first step after the end of a struck attempt was made."""
    after = [row["time_ms"] / 1000 for row in rows if row["time_ms"] / 1000 > event.ended_at]
    yield from after[:1]


def write_report(campaign: Campaign, told: dict[str, Any]) -> Path:
    """All events and figures as JSON, for later."""
    path = campaign.struck.parent / MARKER
    events = [dataclasses.asdict(event) for event in campaign.events]
    path.write_text(json.dumps(told | {"events": events}, indent=1) + "\n", encoding="utf-8")
    return path
