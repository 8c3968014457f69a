"""READ FIRST. The training loop: next batch -> forward -> backward -> update -> log -> save, the same lines everywhere.

`train` is the loop; `Run.start` builds what it needs. Nothing in the loop depends on when it was started or how often
it was interrupted: batches and randomness are functions of the position, the learning rate is one of the step.
"""

import dataclasses
import json
import math
import resource
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, NodeFault, Requeue
from data_pipeline.settings import digest
from data_pipeline.stream.mixture import Source
from data_pipeline.vocabulary import Vocabulary
from pretrain.checkpoint.catalog import Retention, Saved, checkpoint_root
from pretrain.checkpoint.identity import check_identity, identity
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.saver import Checkpoints, start_attempt
from pretrain.config import RunConfig, micro_batch_of
from pretrain.engine import Engine
from pretrain.inputs import INPUTS
from pretrain.inputs.bad import Ledger
from pretrain.inputs.feed import Batch, Feed
from pretrain.inputs.source import open_stream
from pretrain.interchange.folder import load_config
from pretrain.mesh import Mesh
from pretrain.metrics import ProgressLine, save_grid
from pretrain.models import MODELS
from pretrain.objectives import OBJECTIVES, FollowsSteps, Previews
from pretrain.objectives.collectives import Collectives
from pretrain.schedule import learning_rate
from pretrain.tracking import MetricsLog, MlflowFeed


def main(config: RunConfig) -> None:
    """Train to the end, or until asked to stop (then raises Requeue, after a save)."""
    with StopFlag() as stop:
        mesh = Mesh.start(config.train.collective_timeout_s)
        try:
            run = Run.start(config, mesh)
            try:
                train(run, stop)
            finally:
                run.close()
        finally:
            mesh.stop()


def train(run: "Run", stop: "StopFlag") -> None:
    """The loop."""
    config, engine = run.config, run.engine
    for positions, batches in run.feed.steps(run.step, config.train.steps, run.position):
        began = time.monotonic()
        losses: list[dict[str, Tensor]] = []
        for index, batch in enumerate(run.with_counts(batches)):
            seed_model(config.seed, positions[0], run.mesh.rank, index)
            losses.append(engine.forward(batch | {"step": torch.tensor(run.step)}))
            engine.backward(losses[-1]["loss"])
        means = run.mean_over_batches_and_ranks(losses)
        refuse_non_finite(means["loss"], run.step, config.train.steps)
        lr = learning_rate(run.step, config.train.steps, config.optim)
        means["grad_norm"] = engine.update(lr)
        run.after_update()
        run.log(positions, means | {"lr": lr}, time.monotonic() - began)
        run.checkpoints.note(means)
        stopping = bool(run.mesh.maximum([stop.count])[0])
        if stopping or run.step % config.train.checkpoint_every_steps == 0 or run.step == config.train.steps:
            run.save()
        if stopping and run.step < config.train.steps:
            run.checkpoints.finish()
            raise Requeue(f"stopped and saved at step {run.step} of {config.train.steps}; the same command goes on")
    run.checkpoints.finish()


@dataclasses.dataclass
class Run:
    """Everything the loop holds; `step` counts updates made, `position` samples consumed."""

    config: RunConfig
    mesh: Mesh
    stream: Source
    feed: Feed
    objective: nn.Module
    engine: Engine
    checkpoints: Checkpoints
    writer: "Writer | None"
    step: int = 0
    position: int = 0

    @classmethod
    def start(cls, config: RunConfig, mesh: Mesh) -> "Run":
        """Build the run and put it where its newest checkpoint stands.

        Bad input is refused before anything is written.
        """
        micro_batch, accumulation = check_batch(config, mesh.world)
        stream, vocabulary = open_data(config)
        objective = build_objective(config, mesh)
        root = checkpoint_root(config.run, config.train.checkpoints)
        attempt = start_attempt(root, mesh, attempts_noted(Path(config.run)))
        checkpoints = Checkpoints(root, mesh, attempt, Retention.of(config.train))
        saved = checkpoints.newest()
        if saved is None and config.initial:
            start_from_initial(config.initial, objective, mesh)
        inputs = INPUTS[config.objective.kind](config, stream, vocabulary)
        shard = (mesh.rank, mesh.world)
        ledger = Ledger(Path(config.run) / f"bad_samples/rank-{mesh.rank:05d}.jsonl", config.data.max_bad_rate)
        ahead, workers = config.data.prefetch_steps, config.data.workers
        feed = Feed(stream, inputs, config.train.global_batch, shard, micro_batch, ahead, workers, ledger)
        engine = Engine(objective, config, mesh, micro_batch, accumulation)
        run = cls(config, mesh, stream, feed, objective, engine, checkpoints, None)
        if saved is not None:
            run.resume(saved)
        if mesh.rank == 0:
            run.writer = Writer(config, attempt, run.step, mesh.world)
        return run

    def resume(self, saved: Saved) -> None:
        """Go to a checkpoint. Raises ConfigError or DataError when it is of another configuration or dataset."""
        check_identity(saved.state["identity"], identity(self.config), saved.folder)
        self.stream.check(saved.state["stream"])
        restore(saved, self.engine)
        self.step, self.position = saved.step, saved.state["stream"]["position"]

    def save(self) -> None:
        """Stage a checkpoint of the present step; it is written and committed beside the next ones."""
        state = {
            "step": self.step,
            "optimizer": self.engine.scalars(),
            "stream": self.stream.state(self.position),
            "identity": identity(self.config),
            "config": digest(self.config),
            "world": self.mesh.world,
            "zero_stage": self.config.train.zero_stage,
            "versions": {"torch": torch.__version__},
        }
        self.checkpoints.save(self.engine, self.step, state)

    def after_update(self) -> None:
        """What follows a step: dead codes are revived, pictures drawn."""
        self.step, self.position = self.step + 1, self.position + self.config.train.global_batch
        if isinstance(self.objective, FollowsSteps):
            self.objective.after_step(self.step)
        every = self.config.train.sample_every_steps
        if self.writer and every and self.step % every == 0 and isinstance(self.objective, Previews):
            shown = self.feed.inputs(self.stream.read(0, 16))
            self.writer.picture(self.objective.preview(shown), "reconstructions", self.step)

    def log(self, positions: tuple[int, int], means: dict[str, float], step_s: float) -> None:
        """One line of metrics.jsonl, and now and then one for the person who watches."""
        if self.writer:
            self.writer.step(self.step, positions, means, step_s, self.feed.waited_s)

    def with_counts(self, batches: list[Batch]) -> list[Batch]:
        """Accumulation must not weigh words by the micro-batch they stand in: each gets the step's mean counts."""
        counts = getattr(self.objective, "counts", None)
        if len(batches) == 1 or counts is None:
            return batches
        rows = [counts(batch) for batch in batches]
        means = self.mesh.mean([sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]])
        shared = {name: torch.tensor(max(mean, 1e-9)) for name, mean in zip(rows[0], means, strict=True)}
        return [batch | shared for batch in batches]

    def mean_over_batches_and_ranks(self, losses: list[dict[str, Tensor]]) -> dict[str, float]:
        """Means in float64, in a fixed order: the logged loss is bitwise repeatable at the same world size."""
        names = list(losses[0])
        table = torch.stack(
            [torch.stack([row[name].detach().double().reshape(()) for name in names]) for row in losses]
        )
        return dict(zip(names, self.mesh.mean(table.mean(0).tolist()), strict=True))

    def close(self) -> None:
        """End a save under way, flush what is written for people; never raises for MLflow's sake."""
        self.checkpoints.close()
        if self.writer:
            self.writer.close()


# ------------------------------------------------------------------------------------------------ builders


def check_batch(config: RunConfig, world: int) -> tuple[int, int]:
    """-> (micro-batch, accumulation). Raises ConfigError when the batch does not divide, or must not be divided."""
    try:
        micro_batch, accumulation = micro_batch_of(config.train, world)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.objective.kind == "contrastive" and accumulation > 1:
        raise ConfigError(
            f"train.micro_batch={micro_batch}: a contrastive loss compares the whole global batch, which accumulation "
            f"would cut into {accumulation}; leave micro_batch out, or use more ranks"
        )
    return micro_batch, accumulation


def open_data(config: RunConfig, dataset: str | None = None) -> tuple[Source, Vocabulary | None]:
    """The stream of the run's dataset (or of another one read the same way) and its vocabulary, checked for fit."""
    vocabulary = Vocabulary(config.data.vocabulary) if config.data.vocabulary else None
    entries = getattr(config.model, "text_vocab", getattr(config.model, "vocab_size", None))
    if config.model.kind == "clip":
        entries = config.model.text.vocab_size
    if vocabulary and entries is not None and vocabulary.size > entries:
        raise ConfigError(
            f"the vocabulary {config.data.vocabulary} has {vocabulary.size} pieces, the model room for {entries}; "
            "raise the model's vocabulary size or train a smaller vocabulary"
        )
    codes = None
    if config.model.kind == "gpt":
        assert config.data.tokenizer is not None
        codes = tokenizer_id_of(config)
    data = config.data.model_copy(update={"dataset": dataset, "datasets": ()}) if dataset else config.data
    return open_stream(data, config.seed, codes), vocabulary


def tokenizer_id_of(config: RunConfig) -> str:
    """The id of the image tokenizer that the run names; raises ConfigError when its codes do not fit the model."""
    from pretrain.interchange.tokenizer import load_tokenizer

    assert config.model.kind == "gpt" and config.data.tokenizer is not None
    tokenizer = load_config(config.data.tokenizer)
    if tokenizer.kind == "vqgan" and (tokenizer.grid**2, tokenizer.codebook_size) != (
        config.model.image_tokens,
        config.model.image_vocab,
    ):
        raise ConfigError(
            f"{config.data.tokenizer} makes {tokenizer.grid**2} codes of {tokenizer.codebook_size}, the model reads "
            f"{config.model.image_tokens} of {config.model.image_vocab}; set model.image_tokens and model.image_vocab"
        )
    return load_tokenizer(config.data.tokenizer).id


def build_objective(config: RunConfig, mesh: Mesh) -> nn.Module:
    """Model and objective with the initial weights of the seed, the same on every rank."""
    torch.manual_seed(config.seed)
    model = MODELS[config.model.kind](config.model)
    collectives = Collectives(gather=mesh.gather, sum=mesh.sum, world=mesh.world)
    return OBJECTIVES[config.objective.kind](model, config.objective, collectives).train()


def attempts_noted(run: Path) -> int:
    """How many attempts RUN/attempts.jsonl knows of: the next one's number is not below it."""
    path = run / "attempts.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def start_from_initial(source: str, objective: nn.Module, mesh: Mesh) -> None:
    """Weights of another run or of an exported model, as far as they fit; rank 0 prints what did."""
    from pretrain.checkpoint.trained import start_from

    table = start_from(objective.get_submodule("model"), source)
    if mesh.rank == 0:
        print(table, flush=True)


def seed_model(seed: int, position: int, rank: int, index: int) -> None:
    """Dropout's randomness: a function of the seed and the place in the global batch, so nothing needs to be saved."""
    torch.manual_seed((seed * 1_000_003 + position) * 65_537 + rank * 257 + index)


def refuse_non_finite(loss: float, step: int, steps: int) -> None:
    """Raises NodeFault before the update, on every rank alike."""
    if not math.isfinite(loss):
        raise NodeFault(
            f"loss={loss} at step {step} of {steps}, before its update; go on from the last checkpoint with a lower "
            "optim.lr, a longer warm-up or train.precision=fp32"
        )


# ------------------------------------------------------------------------------------------------- writing


class Writer:
    """What rank 0 writes for people and for MLflow."""

    def __init__(self, config: RunConfig, attempt: int, step: int, world: int) -> None:
        self.config = config
        self.attempt = attempt
        self.folder = Path(config.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        with (self.folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"attempt": attempt, "from_step": step, "world": world, "time": time.time()}) + "\n")
        self.metrics = MetricsLog(self.folder)
        self.progress = ProgressLine(config.train.steps, step, config.train.log_every_steps)
        self.mlflow = MlflowFeed(self.folder, config) if config.tracking.uri else None
        if self.mlflow:
            self.mlflow.start()
        self.say(f"{config.model.kind}: steps {step} to {config.train.steps}, {world} processes, attempt {attempt}")

    def step(
        self, step: int, positions: tuple[int, int], means: dict[str, float], step_s: float, waited_s: float
    ) -> None:
        """One line of metrics.jsonl."""
        row: dict[str, Any] = {"step": step, "attempt": self.attempt, "loss": means["loss"]}
        row |= {"loss_hex": means["loss"].hex(), "positions": list(positions)}
        row |= {key: value for key, value in means.items() if key != "loss"}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row |= {"step_s": step_s, "waited_s": waited_s, "peak_memory_gib": peak, "time_ms": int(time.time() * 1000)}
        self.metrics.write(row)
        self.progress.step(step, means)

    def picture(self, pixels: Tensor, name: str, step: int) -> None:
        """pixels float32 [n, 3, S, S] in [-1, 1] -> samples/NAME-step-S.png"""
        save_grid(pixels, self.folder / "samples" / f"{name}-step-{step:08d}.png")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self.metrics.close()
        if self.mlflow:
            self.mlflow.close()


class StopFlag:
    """Counts SIGTERM, SIGINT and SIGUSR1; the first asks for a save at the step's end, the second leaves at once."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopFlag":
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 and number != signal.SIGUSR1:
            raise KeyboardInterrupt
