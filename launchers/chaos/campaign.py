"""Run a campaign: first the undisturbed reference, then the struck run, through all strikes to its end."""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from data_pipeline.errors import ConfigError, DataError, NodeFault
from data_pipeline.storage import open_storage
from launchers.chaos.attempt import Attempt, left_over
from launchers.chaos.plan import Strike, plan
from launchers.chaos.points import moment, newest_save
from launchers.chaos.storage import Ground, damage, empty, ground
from launchers.spec import LocalCluster, describe
from pretrain.checkpoint.catalog import committed
from pretrain.config import RunConfig, checkpoint_root, load_run
from pretrain.runtime.goodput import METRICS, lines_of

MARKER = "chaos.json"
HANG_TIMEOUT_S = 60
UNEXPLAINED = 5
"""Number of attempts that may end without a strike. Each one breaks a law, but does not end the campaign."""

Say = Callable[[str], None]


@dataclasses.dataclass
class Event:
    """Effect of one strike. code: the launcher's exit code, None if it kept running. reached: last step made so far.

    found: state of the newest save right after the strike. newest: step of the newest complete, undamaged checkpoint
    after the damage. damaged: STEP_FOLDER/FILE of the damaged shard. failed: steps whose saves failed because of a
    storage fault. orphans: pids that outlived the launcher.
    """

    strike: Strike
    code: int | None
    reached: int
    struck_at: float
    ended_at: float
    found: str = ""
    newest: int = 0
    damaged: str = ""
    failed: tuple[int, ...] = ()
    orphans: tuple[int, ...] = ()


@dataclasses.dataclass
class Campaign:
    """The two runs and all strikes on the second. elsewhere: root of the checkpoints if not in the run folders."""

    config: RunConfig
    reference: Path
    struck: Path
    elsewhere: str
    events: list[Event]
    last_code: int

    @property
    def every(self) -> int:
        """Steps between saves."""
        return self.config.train.checkpoint_every_steps

    def root(self, run: Path) -> str:
        """Return the checkpoint root of one of the two runs."""
        return checkpoint_root(run, f"{self.elsewhere}/{run.name}" if self.elsewhere else None)


def run_campaign(config_path: Path, overrides: Sequence[str], kills: int, seed: int, procs: int, say: Say) -> Campaign:
    """Train the reference, then the struck run until it is done.

    Raises ConfigError for invalid settings or if a folder of the campaign exists that no campaign created; NodeFault if
    the reference fails.
    """
    config = load_run(config_path, overrides)
    describe(config_path, overrides, LocalCluster(), 1, procs)
    home = Path(f"{config.run}-chaos-{seed}")
    elsewhere = f"{config.train.checkpoints}-chaos-{seed}" if config.train.checkpoints else ""
    campaign = Campaign(config, home / "reference", home / "struck", elsewhere, [], 0)
    clear(campaign)

    def command(run: Path) -> list[str]:
        places = [f"run={run}", *([f"train.checkpoints={campaign.root(run)}"] if elsewhere else [])]
        launch = [sys.executable, "-m", "launchers.cli", "launch", "local", str(config_path), *overrides, *places]
        settings = ["tracking.uri=", f"train.collective_timeout_s={HANG_TIMEOUT_S}"]
        return [*launch, *settings, "--procs-per-node", str(procs), "--restarts", "0"]

    say(f"reference: {config.train.steps} steps on {procs} processes, without strikes")
    attempt = Attempt(command(campaign.reference), campaign.reference)
    if attempt.wait() != 0:
        raise NodeFault(f"the reference run failed, see {attempt.log}; fix it before a campaign")
    place = ground(campaign.root(campaign.struck), procs, "" if elsewhere else campaign.root(campaign.reference))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(NodeFault.exit_code))  # so that `close` runs
    try:
        strikes = plan(seed, kills, config.train.steps, procs, place.faults)
        start = functools.partial(Attempt, command(campaign.struck), campaign.struck, place.environment)
        campaign.last_code = _strike_all(campaign, strikes, start, place, say)
    finally:
        place.close()
    return campaign


def clear(campaign: Campaign) -> None:
    """Create empty folders for this campaign, removing those of an earlier one.

    Raises ConfigError if a folder exists that no campaign created.
    """
    home = campaign.struck.parent
    ours = (home / MARKER).is_file()
    roots = [campaign.root(run) for run in (campaign.reference, campaign.struck)]
    for place in [str(home), *roots]:
        there = home.exists() if place == str(home) else bool(open_storage(place).list())
        if there and not ours:
            raise ConfigError(f"{place} exists and is not a campaign's folder; move it away or choose another --seed")
    for root in roots:
        empty(root)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / MARKER).write_text("{}\n", encoding="utf-8")


def _strike_all(
    campaign: Campaign, strikes: Sequence[Strike], start: Callable[[], Attempt], place: Ground, say: Say
) -> int:
    """Carry out all strikes; an attempt that survives one gets the next. Returns the last attempt's exit code."""
    attempt, unexplained = start(), 0
    for number, strike in enumerate(strikes, 1):
        while True:
            if attempt.done:
                attempt = start()
            event = _strike(campaign, strike, attempt, place)
            if event is None:
                say(f"strike {number}: the run finished first")
                return 0
            campaign.events.append(event)
            outcome = "went on" if event.code is None else f"exit code {event.code}"
            reached = f"{event.reached} steps made, {event.found}"
            say(f"strike {number} of {len(strikes)}: {event.strike}; {outcome}, {reached}")
            if event.strike == strike:
                break
            unexplained += 1
            if unexplained > UNEXPLAINED:
                raise NodeFault(f"{attempt.log}: {unexplained} attempts ended without a strike; fix their cause first")
    code = (start() if attempt.done else attempt).wait()
    struck_storage = bool(campaign.events) and campaign.events[-1].strike.whom == "storage"
    return start().wait() if code == DataError.exit_code and struck_storage else code  # it hit the run's last save


def _strike(campaign: Campaign, strike: Strike, attempt: Attempt, place: Ground) -> Event | None:
    """Wait until the strike is due, strike, and wait for the effect. Returns None if the run was done before."""
    due = moment(strike, attempt, place.points, campaign.every)
    if not due:
        if attempt.wait() == 0:
            return None
        strike = dataclasses.replace(strike, whom="nobody", damage="", fault="")
    event = Event(strike, None, 0, time.time(), 0.0)
    if strike.whom == "storage":
        event.failed = tuple(place.strike(strike.fault, attempt))
        event.code = attempt.wait() if attempt.done else None
    else:
        family = attempt.family()
        hit(strike, attempt, family)
        place.points.go_on()
        event.code = attempt.wait()
        event.orphans = left_over(family)
    _look(campaign, event)
    return event


def _look(campaign: Campaign, event: Event) -> None:
    """Record the state after a strike, then apply the damage that belongs to it."""
    root, strike = campaign.root(campaign.struck), event.strike
    event.ended_at, event.found = time.time(), newest_save(root)
    event.reached = max((int(row["step"]) for row in lines_of(campaign.struck / METRICS)), default=0)
    spared = {past.damaged.partition("/")[0] for past in campaign.events} - {""}
    if strike.damage:
        event.damaged = damage(root, strike, spared)
        spared.add(event.damaged.partition("/")[0])
    event.newest = max((saved.step for saved in committed(root) if saved.name not in spared), default=0)


def hit(strike: Strike, attempt: Attempt, family: list[psutil.Process]) -> None:
    """Send the strike's signal to its target."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if strike.whom == "nobody":
            return
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
