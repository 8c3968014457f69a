"""READ FIRST. The training loop of every task: next batch -> forward -> backward -> update -> log -> save.

A task with several optimizers runs forward to update once for each of them: a step is a sequence of turns.

`train` is the loop; `Run.start` builds what it needs. The results do not depend on when the run started or how often it
was interrupted: batches and randomness are functions of the position, the learning rate is a function of the step.
"""

import contextlib
import dataclasses
import functools
import itertools
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, NodeFault, Overtaken, Requeue, TrainingFault
from data_pipeline.settings import digest
from data_pipeline.stream.mixture import Source
from pretrain.checkpoint.catalog import Retention, Saved
from pretrain.checkpoint.fingerprints import INITIAL, Fingerprints, of_datasets, of_files, of_initial, warn_of_others
from pretrain.checkpoint.identity import Changes, identity, values_of, versions
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.resume import check_resumed
from pretrain.checkpoint.saver import Checkpoints, from_rank_0, start_attempt
from pretrain.config import FINGERPRINTS, RunConfig, micro_batch_of
from pretrain.engine.engine import Engine
from pretrain.engine.optim import check_names, unfreezing_steps
from pretrain.engine.schedule import ema_rate, learning_rate
from pretrain.evaluations import EVALUATIONS
from pretrain.evaluations.evaluated import EvaluationRanks, StopAsked
from pretrain.evaluations.held_out import HeldOut
from pretrain.evaluations.patience import Progress
from pretrain.inputs.bad import FOLDER, Ledger
from pretrain.inputs.feed import Batch, Feed
from pretrain.inputs.lethal import Screened, known_to_all, remember, remembered, screened, search
from pretrain.inputs.source import open_data
from pretrain.models import MODELS
from pretrain.models.layers import recompute
from pretrain.models.noise import name_noise
from pretrain.runtime import deadline
from pretrain.runtime.faults import faults_noted, may_have_been_killed
from pretrain.runtime.goodput import METRICS, PhaseClock, lines_back
from pretrain.runtime.guards import Guards
from pretrain.runtime.mesh import Mesh, own_rank, peer_lost
from pretrain.runtime.mlflow_feed import status_of
from pretrain.runtime.signals import StopSignals, leave_at_once
from pretrain.runtime.watchdog import Watchdog
from pretrain.schema.common import MAIN
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE, Collectives
from pretrain.tasks.task import PREVIEWED, Task
from pretrain.tracking import SystemLog, Writer


def main(config: RunConfig, changes: Iterable[str] = ()) -> None:
    """Train to the end. Raises Requeue, after a save, when a stop signal arrives earlier.

    changes: dotted keys of settings that may differ from those of the newest checkpoint (`--change`).
    """
    killed = may_have_been_killed(Path(config.run))  # checked before this attempt writes anything
    noted = faults_noted(Path(config.run), own_rank(), peer_lost)
    with StopSignals(leave_at_once) as stop, contextlib.ExitStack() as leaving, noted:
        mesh = Mesh.start(config.train.collective_timeout_s)
        leaving.callback(mesh.stop)
        run = Run.start(config, mesh, changes, killed)
        try:
            train(run, stop)
        except BaseException as error:
            run.close(status_of(error))
            raise
        run.close(status_of(None))


def train(run: "Run", stop: StopSignals) -> None:
    """Run the training loop from `run.step` to the last step, or until evaluations improve no more."""
    config = run.config
    if run.ended_before(stop):
        return
    for positions, batches in run.feed.steps(run.step, config.train.steps, run.position):
        run.clock.enter("step")
        run.unfreeze()
        run.engine.accumulate(len(batches))
        means: dict[str, float] = {}
        for turn in run.turns():
            losses: list[dict[str, Tensor]] = []
            for batch in run.with_whole_step(batches, turn):
                losses.append(run.engine.forward(batch | {"step": torch.tensor(run.step), "turn": turn.number}))
                run.engine.backward(losses[-1]["loss"])
            means |= run.update(turn, run.mean_over_batches_and_ranks(losses))
        run.after_updates()
        run.log(positions, means)
        run.follow_guards()
        if run.evaluate_and_save(stop):
            break
        run.clock.enter("wait")
    run.checkpoints.finish()


@dataclasses.dataclass(frozen=True)
class Turn:
    """One optimizer's part of a step. number: int64 [], the index of its role in the task's roles, for `forward`."""

    role: str
    number: Tensor
    last: bool


@dataclasses.dataclass
class Run:
    """State of the training loop. `step` counts the steps made, `position` the samples consumed."""

    config: RunConfig
    mesh: Mesh
    stream: Source
    feed: Feed
    task: Task
    engine: Engine
    checkpoints: Checkpoints
    guards: Guards
    clock: PhaseClock
    watchdog: Watchdog
    held_out: HeldOut
    progress: Progress
    system: SystemLog | None = None
    writer: Writer | None = None
    step: int = 0
    position: int = 0
    known: Fingerprints = dataclasses.field(default_factory=dict)
    """Fingerprints of what the run depends on besides its settings."""
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Changes of settings that were consented to, oldest first: {"step", "settings"}."""

    @classmethod
    def start(cls, config: RunConfig, mesh: Mesh, changes: Iterable[str] = (), killed: bool = False) -> "Run":
        """Build the run and restore its newest checkpoint, if there is one.

        killed: whether an image may have ended the previous attempt; only rank 0's value is used. Invalid input is
        refused before anything is written.
        """
        micro_batch, accumulation = check_batch(config, mesh.world)
        stream, tokenizer = open_data(config)
        known = of_files(config.data) | of_datasets(config.data, stream)
        task = build_task(config, mesh)
        root = config.checkpoint_root
        attempt = start_attempt(root, mesh, attempts_noted(Path(config.run)), values_of(config, changes))
        checkpoints = Checkpoints(root, mesh, attempt, Retention.of(config.train))
        saved = checkpoints.newest()
        if saved is None:
            refuse_early(changes)
        changed = {} if saved is None else check_resumed(saved, config, stream, mesh, known, changes)
        if saved is None and config.initial:
            start_from_initial(config, task, mesh, known)
        inputs = screened(task.inputs(config, stream, tokenizer))
        shard = (mesh.rank, mesh.world)
        bad = Path(config.run) / FOLDER
        ledgers = Ledger(bad / f"rank-{mesh.rank:05d}.jsonl", config.data.max_bad_rate), Ledger(bad / "preview.jsonl")
        ahead, workers = config.data.prefetch_steps, config.data.workers
        sizes = config.train.global_batch, shard, micro_batch
        feed = Feed(stream, inputs, *sizes, ahead, workers, *ledgers, config.train.batch_at)
        engine = Engine(task, config, mesh, micro_batch, accumulation, saved.step if saved else 0)
        held_out = held_out_of(config, mesh, engine, task)
        clock, guards = PhaseClock(), Guards(config.guards)
        watchdog = Watchdog(mesh, Path(config.run), attempt, clock, config.train.collective_timeout_s)
        parts = (task, engine, checkpoints, guards, clock, watchdog, held_out, Progress.of(config))
        run = cls(config, mesh, stream, feed, *parts, known=known)
        if saved is not None:
            run.resume(saved, changed)
        run.refuse_lethal_images(killed)
        if mesh.rank == 0:
            run.writer = Writer(config, attempt, run.step, mesh.world, run.known, changed)
        if mesh.place.local_rank == 0:
            run.system = SystemLog(Path(config.run), socket.gethostname())
            run.system.start()
        watchdog.start()
        run.warn_of_deadline()
        return run

    def resume(self, saved: Saved, changed: Changes) -> None:
        """Restore `saved`, already checked to belong to this run. changed: settings that change at this step."""
        self.step, self.position = saved.step, saved.state["stream"]["position"]
        self.changes = saved.state.get("changes", []) + ([{"step": self.step, "settings": changed}] if changed else [])
        self.restore(saved)
        self.guards.load(saved.state["guards"])
        self.progress.load(saved.state.get("evaluations", self.progress.state()), "data.evaluation" in changed)

    def restore(self, saved: Saved) -> None:
        """Restore the engine; settings of the optimizer that were changed at that step or later are not the saved."""
        since = {key for change in self.changes if change["step"] >= saved.step for key in change["settings"]}
        restore(saved, self.engine, regroup=any(key.startswith("optim.") for key in since))

    def refuse_lethal_images(self, killed: bool) -> None:
        """Give the inputs the known lethal images; search for new ones when the previous attempt was killed."""
        inputs, folder = self.feed.preparer.inputs, Path(self.config.run)
        if not isinstance(inputs, Screened):
            return
        inputs.known = known_to_all(remembered(folder), self.mesh.maximum)
        made = max(self.position, last_position(folder)) if killed and self.mesh.rank == 0 else -1
        [made] = self.mesh.maximum([made])
        if made >= 0:
            # in CPU time; the other ranks wait meanwhile in wall-clock time, and give up after twice the timeout
            suspects, patience_s = self.feed.prepared_by(made, PREVIEWED), self.config.train.collective_timeout_s / 2
            search(self.stream, inputs, suspects, patience_s, self.mesh.maximum)
            remember(folder, inputs.found)

    def warn_of_deadline(self) -> None:
        """Warn when a stop signal would leave no time for a save. All ranks measure their write speed at once."""
        lead = deadline.lead_s()
        if lead < float("inf"):
            speed = deadline.write_speed(Path(self.config.run))
            size = sum(tensor.nbytes for owned in self.engine.owned() for tensor in owned.tensors.values())
            needs, slowest = self.mesh.maximum([size, -int(speed)])
            step_s = deadline.slowest_recent_step_s(Path(self.config.run))
            text = deadline.warning(lead, step_s, needs, -slowest)
            if self.writer and text:
                self.writer.say(text)

    def save(self) -> None:
        """Stage a checkpoint of the current step; it is written and committed during the following steps."""
        self.clock.enter("save")
        state = {
            "step": self.step,
            "optimizer": self.engine.scalars(),
            "stream": self.stream.state(self.position),
            "guards": self.guards.state(),
            "identity": identity(self.config),
            FINGERPRINTS: self.known,
            "changes": self.changes,
            "config": digest(self.config),
            "world": self.mesh.world,
            "zero_stage": self.config.train.zero_stage,
            "versions": versions(),
        }
        if self.config.evaluated:
            state["evaluations"] = self.progress.state()
        figures = self.progress.figures if self.progress.step == self.step else None
        self.checkpoints.save(self.engine, self.step, state, figures)

    def unfreeze(self) -> None:
        """Rebuild the engine at a step in which frozen parameters begin to train, as a resume at this step would."""
        if self.step > self.engine.step and self.step in unfreezing_steps(self.config.optim):
            self.task = build_task(self.config, self.mesh)
            self.engine = self.engine.rebuilt(self.task, self.step)
            self.held_out.use(self.task, ranks_of(self.mesh, self.engine, self.task))

    def turns(self) -> Iterator[Turn]:
        """Yield this step's optimizer turns, in order. Most tasks have one optimizer and one turn."""
        roles = self.task.turns(self.step)
        for role in roles:
            last = role == roles[-1]
            self.engine.take_turn(role, keep=self.guards.may_skip and not last)
            yield Turn(role, torch.tensor(self.engine.roles.index(role)), last)

    def update(self, turn: Turn, means: dict[str, float]) -> dict[str, float]:
        """Apply this turn's gradient if the guards accept it -> its metrics, prefixed by the role unless it is MAIN."""
        lr = learning_rate(self.step, self.config.train.steps, self.config.optim.of(turn.role))
        judge = functools.partial(self.guards.accepts, means["loss"], role=turn.role, last=turn.last)
        found = means | {"grad_norm": self.engine.update(lr, judge), "lr": lr}
        return found if turn.role == MAIN else {f"{turn.role}_{name}": value for name, value in found.items()}

    def after_updates(self) -> None:
        """Finish a step after its turns: undo a refused step, run the task's `after_step`, draw the preview."""
        self.engine.settle(self.guards.action == "accept")
        self.step, self.position = self.step + 1, self.position + self.config.train.batch_at(self.step)
        self.task.after_step(self.step)
        if self.guards.action == "accept":
            self.engine.average(ema_rate(self.step - 1, self.config.optim.ema))
        every = self.config.train.sample_every_steps
        if self.writer and every and self.step % every == 0:
            shown = self.task.preview(self.feed.preview)
            if shown is not None:
                self.writer.picture(shown, "reconstructions", self.step)

    def log(self, positions: tuple[int, int], means: dict[str, float]) -> None:
        """Write the step's line of metrics.jsonl and, every `log_every_steps`, a progress line."""
        if self.guards.action == "accept":
            self.checkpoints.note(means)
        if self.writer:
            seconds = {"step_s": time.monotonic() - self.clock.since, **self.spent()}
            seconds["save_s"] = self.checkpoints.last_save_s
            self.writer.step(self.step, positions, means, seconds, self.guards.told())

    def follow_guards(self) -> None:
        """Act on a refused step: end the run, or restore the last regular checkpoint's weights and continue.

        Checkpoints written because of a stop signal are skipped, so that the signal does not affect the result.
        """
        self.guards.refuse_to_go_on(self.step)
        if self.guards.action == "roll_back":
            saved = self.checkpoints.newest(self.config.train.checkpoint_every_steps)
            if saved is None:
                raise TrainingFault(
                    f"step {self.step}: {self.guards.reason}, and there is no checkpoint yet to roll back to"
                )
            self.restore(saved)
            self.guards.remember(saved.state["guards"])

    def ended_before(self, stop: StopSignals) -> bool:
        """Make the evaluation of the step resumed from if a stop kept it from being made; return whether training ends.

        It ends if it had ended for want of patience.
        """
        if self.evaluation_due():
            ended = self.evaluate_and_save(stop)
        elif ended := self.progress.exhausted:
            self.say(self.progress.told())
        if ended:
            self.checkpoints.finish()
        return ended

    def evaluate_and_save(self, stop: StopSignals) -> bool:
        """Finish a step: evaluate and save if they are due; return whether training ends for want of patience.

        Raises Requeue, after a save, if a rank was asked to stop.
        """
        train = self.config.train
        stopping = self.agree(stop.count) or self.interrupted_evaluation(stop)
        ended = self.progress.exhausted
        if stopping or ended or self.step % train.checkpoint_every_steps == 0 or self.step == train.steps:
            self.save()
        if stopping and (self.step < train.steps or self.evaluation_due()):
            self.checkpoints.finish()
            raise Requeue(f"stopped and saved at step {self.step} of {train.steps}; the same command resumes")
        if ended:
            self.say(self.progress.told())
        return ended

    def evaluation_due(self) -> bool:
        """Return whether this step asks for an evaluation that was not made yet."""
        every, last = self.config.train.evaluate_every_steps, self.config.train.steps
        asks = every > 0 and self.step > 0 and (self.step % every == 0 or self.step == last)
        return asks and self.progress.step < self.step

    def interrupted_evaluation(self, stop: StopSignals) -> bool:
        """Evaluate if this step asks for it; return whether a rank was asked to stop before it was done."""
        if not self.evaluation_due():
            return False
        self.clock.enter("evaluate")
        began = time.monotonic()
        try:
            figures = self.held_out.figures(lambda: stop.count)
        except StopAsked:
            return True
        self.progress.note(self.step, figures)
        self.clock.enter("report")
        if self.writer:
            seconds = {"evaluate_s": time.monotonic() - began, **self.spent()}
            self.writer.evaluation(self.step, figures, seconds, self.held_out.pictures())
        return False

    def spent(self) -> dict[str, float]:
        """Return the attempt's total seconds besides steps, for goodput."""
        seconds = {"waited_s": self.feed.waited_s, "saved_s": self.clock.spent("save")}
        return seconds | ({"evaluated_s": self.clock.spent("evaluate")} if self.config.evaluated else {})

    def say(self, text: str) -> None:
        """Print a message on rank 0."""
        if self.writer:
            self.writer.say(text)

    def agree(self, asked: int) -> bool:
        """Return whether any rank was asked to stop.

        Raises NodeFault when the ranks' guards refused different numbers of steps, Overtaken when a commit was refused
        because a later attempt owns the run.
        """
        told = [asked, self.guards.events, -self.guards.events, int(bool(self.checkpoints.overtaken))]
        asked, most, least, overtaken = self.mesh.maximum(told)
        if overtaken:
            raise Overtaken(self.checkpoints.overtaken or "a later attempt has taken over the run; this one stops")
        if most != -least:
            raise NodeFault(
                f"step {self.step}: ranks rejected {-least} to {most} steps; a device computes wrong results"
            )
        return asked > 0

    def with_whole_step(self, batches: list[Batch], turn: Turn) -> list[Batch]:
        """Add to each micro-batch what its loss needs from the whole step, so that accumulation changes no loss."""
        if len(batches) > 1 and self.task.compares_batch:
            return self.with_slopes(batches, turn)
        return self.with_counts(batches)

    @torch.no_grad()
    def with_slopes(self, batches: list[Batch], turn: Turn) -> list[Batch]:
        """Gradient caching: forward all micro-batches, then add to each its slopes of the global loss."""
        first = {"step": torch.tensor(self.step), "turn": turn.number, "embed": torch.tensor(1)}
        rows = [self.engine.forward(batch | first) for batch in batches]
        with torch.enable_grad():
            slopes = self.task.slopes(rows)
        return [batch | more for batch, more in zip(batches, slopes, strict=True)]

    def with_counts(self, batches: list[Batch]) -> list[Batch]:
        """Add the step's mean counts to each micro-batch, so that every word of the step has the same weight."""
        rows = [self.task.counts(batch) for batch in batches] if len(batches) > 1 else [{}]
        if not rows[0]:
            return batches
        means = self.mesh.mean([sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]])
        shared = {name: torch.tensor(max(mean, 1e-9)) for name, mean in zip(rows[0], means, strict=True)}
        return [batch | shared for batch in batches]

    def mean_over_batches_and_ranks(self, losses: list[dict[str, Tensor]]) -> dict[str, float]:
        """Average in float64, in a fixed order: the logged loss is bitwise repeatable at the same world size."""
        names = list(losses[0])
        table = torch.stack(
            [torch.stack([row[name].detach().double().reshape(()) for name in names]) for row in losses]
        )
        return dict(zip(names, self.mesh.mean(table.mean(0).tolist()), strict=True))

    def close(self, status: str) -> None:
        """Give a save in progress a moment to finish, flush the logs, report `status` to MLflow (without raising)."""
        self.watchdog.stop()
        self.held_out.close()
        if self.system:
            self.system.close()
        self.checkpoints.close()
        if self.writer:
            self.writer.close(status)


# ------------------------------------------------------------------------------------------------ builders


def check_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """Return (micro-batch, accumulation steps). Raises ConfigError when the batch does not divide."""
    try:
        return micro_batch_of(config.train, world)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def refuse_early(changes: Iterable[str]) -> None:
    """Raise ConfigError for a consent to changes in a run without a checkpoint, where there is nothing to change."""
    for key in changes:
        raise ConfigError(
            f"--change {key}: the run has no checkpoint yet, so nothing changes; give {key}=VALUE without it"
        )


def build_task(config: RunConfig, mesh: Mesh) -> Task:
    """Build the model and its task with initial weights drawn from the seed, the same on every rank.

    Raises ConfigError if `optim.freeze` or `optim.layer_decay` do not fit its parameters.
    """
    torch.manual_seed(config.seed)
    model = MODELS[config.model.kind](config.model)
    name_noise(model)
    if config.train.recompute:
        recompute(model)
    collectives = Collectives(gather=mesh.gather, sum=mesh.sum, world=mesh.world)
    task = TASKS[config.task.kind](model, config.task, collectives).train()
    check_names(task, config.optim)
    return task


def held_out_of(config: RunConfig, mesh: Mesh, engine: Engine, task: Task) -> HeldOut:
    """Open the data that the run evaluates on, if it does."""
    evaluation = EVALUATIONS[config.task.kind]
    return HeldOut(config, task, ranks_of(mesh, engine, task), evaluation.figures, evaluation.check)


def ranks_of(mesh: Mesh, engine: Engine, task: Task) -> EvaluationRanks:
    """Return the ranks of the run as those that share an evaluation: each computes whole batches, as one device."""

    def run(compute: Callable[[Batch], Batch], batch: Batch) -> Batch:
        own, task.collectives = task.collectives, ONE_DEVICE
        try:
            return engine.evaluate(compute, batch)
        finally:
            task.collectives = own

    return EvaluationRanks(mesh.rank, mesh.world, lambda x: mesh.sum(x.to(mesh.device)).cpu(), run, asked=lambda: 0)


def attempts_noted(run: Path) -> int:
    """Return the number of attempts in RUN/attempts.jsonl; the next attempt's number is not below it."""
    path = run / "attempts.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def last_position(run: Path) -> int:
    """Return the highest position that the newest lines of RUN/metrics.jsonl reach; 0 when no step was made."""
    newest = itertools.islice(lines_back(run / METRICS), deadline.RECENT_STEPS)
    spans = (row.get("positions") for row in newest)
    return max((span[1] for span in spans if isinstance(span, list) and [*map(type, span)] == [int, int]), default=0)


def start_from_initial(config: RunConfig, task: Task, mesh: Mesh, known: Fingerprints) -> None:
    """Load the weights of another run or of an exported model, as far as they fit; rank 0 prints which did.

    Adds their fingerprint to `known`.
    """
    from pretrain.checkpoint.trained import start_from

    source = str(config.initial)
    table = start_from(task.get_submodule("model"), source, config.model)
    known[INITIAL] = from_rank_0(mesh, INITIAL, lambda: of_initial(source))
    if mesh.rank == 0:
        print(table, flush=True)
        warn_of_others(source, known)
