"""The schema of a training run. Read with `load_run(path, overrides)`; imports no torch.

Sections: the model and its objective (`model`, `task`, see schema/), its data (`data`), the training (`train`, `optim`,
`guards`), tracking, and DeepSpeed.
"""

import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data_pipeline.errors import ConfigError
from data_pipeline.settings import (
    Location,
    OptionalLocation,
    Seed,
    Settings,
    expand_home,
    local_path,
    override_settings,
    read_yaml,
)
from data_pipeline.stream.weights import check_changes
from pretrain.runtime.goodput import METRICS
from pretrain.schema import ModelConfig, TaskConfig, tasks_of
from pretrain.schema.common import TaskSettings, TextRead
from pretrain.schema.names import RENAMED
from pretrain.schema.schedule import ScheduleConfig, check_schedule
from pretrain.schema.tasks import EVALUATED, check_best, figure_name, fill_model, parsed

# ---------------------------------------------------------------------------------------- the run itself


class MixedDataset(Settings):
    """One dataset of a mixture; `weight` is relative to the others: a number, or a fraction such as "1/3"."""

    path: Location
    weight: float | str = 1.0


class ReweighConfig(Settings):
    """New weights of the datasets, from a position (samples consumed so far) onwards."""

    position: PositiveInt
    weights: tuple[float | str, ...]


class ShuffleConfig(Settings):
    """Shuffling: on each of `lanes` lanes, `window` blocks of `block` consecutive samples are shuffled together.

    lanes * window * block samples are mixed with each other. More lanes than ranks let a rank read blocks of its own.
    """

    lanes: PositiveInt = 64
    block: PositiveInt = 64
    window: PositiveInt = 16


AUGMENTATION = ("crop_scale", "crop_ratio", "flip")
"""Fields of DataConfig for random image augmentation; their defaults disable it."""


def _ascending(span: tuple[float, float]) -> tuple[float, float]:
    low, high = span
    if low > high:
        raise ValueError(f"the lower bound comes first; use [{high:g}, {low:g}]")
    return span


EVALUATION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def _evaluation(given: Any) -> Any:
    """Check the dataset, or the datasets by name, to evaluate on; empty text or mapping means None."""
    if isinstance(given, str):
        return expand_home(given) or None
    if not isinstance(given, dict):
        return given
    for name, path in given.items():
        if not isinstance(name, str) or not EVALUATION_NAME.fullmatch(name):
            raise ValueError(
                f"the name {name!r} of an evaluation: use up to 64 letters A-Z, digits, '_', '-' and '.', a letter or "
                "digit first, as text in quotation marks"
            )
        if not isinstance(path, str) or not path:
            raise ValueError(f"{name}={path!r} names no dataset; give a folder or an address")
    return {name: expand_home(path) for name, path in given.items()} or None


Evaluation = Annotated[str | dict[str, str] | None, pydantic.BeforeValidator(_evaluation)]
"""One dataset, or several by name."""

Span = Annotated[tuple[PositiveFloat, PositiveFloat], pydantic.AfterValidator(_ascending)]


class DataConfig(Settings):
    """The dataset (or `datasets`, mixed by weight), the tokenizers and how samples become tensors.

    workers: processes that prepare batches; 0 uses a thread. max_bad_rate: share of samples that may be replaced as
    unusable before the run stops. evaluation: the held-out dataset, or several by name.
    """

    dataset: OptionalLocation = None
    datasets: tuple[MixedDataset, ...] = ()
    reweigh: tuple[ReweighConfig, ...] = ()
    shuffle: ShuffleConfig = ShuffleConfig()
    text_tokenizer: OptionalLocation = None
    image_tokenizer: OptionalLocation = None
    evaluation: Evaluation = None
    crop_scale: Span = (1.0, 1.0)
    crop_ratio: Span = (1.0, 1.0)
    flip: bool = False
    prefetch_steps: PositiveInt = 2
    workers: NonNegativeInt = 0
    max_bad_rate: NonNegativeFloat = Field(0.001, le=1.0)

    def without_augmentation(self) -> "DataConfig":
        """Return a copy for evaluation: every image is cropped to its centre square and never flipped."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in AUGMENTATION})

    @pydantic.model_validator(mode="after")
    def _one_kind_of_data(self) -> "DataConfig":
        if (self.dataset is None) == (not self.datasets):
            raise ValueError("set either data.dataset, or data.datasets with weights")
        if self.reweigh and not self.datasets:
            raise ValueError("data.reweigh needs data.datasets, and data.dataset is set; leave data.reweigh out")
        if self.datasets:
            try:
                check_changes(self.changes)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of everything that is read: datasets, text and image tokenizer, held-out data."""
        sources = (source.path for source in self.datasets)
        named = (self.dataset, *sources, self.text_tokenizer, self.image_tokenizer, *self.evaluations.values())
        return tuple(path for path in named if path)

    @property
    def evaluations(self) -> dict[str, str]:
        """Held-out datasets by name; the name of a single one is empty."""
        if isinstance(self.evaluation, dict):
            return self.evaluation
        return {"": self.evaluation} if self.evaluation else {}

    @property
    def changes(self) -> list[tuple[int, tuple[float | str, ...]]]:
        """Schedule of the weights: (first position, weights of the datasets), starting at position 0."""
        first = (0, tuple(source.weight for source in self.datasets))
        return [first, *((change.position, change.weights) for change in self.reweigh)]


class TrainConfig(Settings):
    """Length, batch, precision, sharding, and when to evaluate and to write checkpoints, logs and previews.

    `recompute`: activation checkpointing. Blocks keep only their inputs and are recomputed in the backward: less
    memory, one more forward, the same numbers.
    These checkpoints are kept: the last `keep_checkpoints` regular ones (and a newer one that a stop signal caused);
    those whose step is a multiple of `keep_every_steps`; the one with the best mean of the metric `keep_best` since the
    previous save (lowest loss, highest accuracy; "min:NAME" and "max:NAME" set the direction); and named ones. A figure
    of an evaluation ("eval/NAME/FIGURE", or "eval/FIGURE" of a single dataset) counts for the checkpoint of its step.
    `evaluate_every_steps`: evaluate on all of `data.evaluation` that often, and at the last step; 0 never.
    `patience`: end after so many evaluations in a row in which the figure `keep_best` (the loss of a single dataset if
    it is empty) did not improve; 0 never.
    `checkpoints`: a folder or s3:// prefix for checkpoints, instead of the run's folder.
    `batch_warmup`: [[steps, batch], ...]: so many first steps have this smaller batch; after them it is `global_batch`.
    """

    added = frozenset({"batch_warmup", "evaluate_every_steps", "patience"})
    steps: PositiveInt
    global_batch: PositiveInt
    batch_warmup: tuple[tuple[PositiveInt, PositiveInt], ...] = ()
    micro_batch: PositiveInt | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 3
    clip_norm: NonNegativeFloat = 1.0
    recompute: bool = False
    checkpoint_every_steps: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    keep_every_steps: NonNegativeInt = 0
    keep_best: str = ""
    checkpoints: OptionalLocation = None
    log_every_steps: PositiveInt = 10
    sample_every_steps: NonNegativeInt = 0
    evaluate_every_steps: NonNegativeInt = 0
    patience: NonNegativeInt = 0
    collective_timeout_s: PositiveInt = Field(120, le=7 * 86400)

    @property
    def batches(self) -> tuple[int, ...]:
        """All sizes of a global batch, in their order."""
        return (*(batch for _, batch in self.batch_warmup), self.global_batch)

    @property
    def warmup(self) -> int:
        """The number of steps of `batch_warmup`."""
        return sum(steps for steps, _ in self.batch_warmup)

    @property
    def samples(self) -> int:
        """The number of samples that all steps consume."""
        warmup = sum(steps * batch for steps, batch in self.batch_warmup)
        return warmup + (self.steps - self.warmup) * self.global_batch

    def batch_at(self, step: int) -> int:
        """Return the global batch of the step from `step` to `step + 1`."""
        for steps, batch in self.batch_warmup:
            if step < steps:
                return batch
            step -= steps
        return self.global_batch


Beta = Annotated[float, Field(ge=0, lt=1)]


def _is_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error}); escape literal characters") from None
    return pattern


Pattern = Annotated[str, pydantic.AfterValidator(_is_pattern)]
"""A regular expression, for `re.search` in parameter names."""


class AdamWConfig(ScheduleConfig):
    """AdamW with decay and no-decay groups, and the schedule of its learning rate.

    Weight decay applies to matrices, not to vectors (biases, gains), and not to parameters whose name matches a regular
    expression of `no_decay` (`re.search`).
    """

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    no_decay: tuple[Pattern, ...] = ()


class FreezeConfig(Settings):
    """Parameters that do not train: those whose name matches `pattern` (`re.search`), until `until_step` steps are made
    or, without it, throughout the run.
    """

    pattern: Pattern
    until_step: PositiveInt | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _only_a_pattern(cls, tree: Any) -> Any:
        return {"pattern": tree} if isinstance(tree, str) else tree

    @pydantic.field_validator("pattern")
    @classmethod
    def _spares_something(cls, pattern: str) -> str:
        if re.search(pattern, "") and re.search(pattern, "a parameter"):
            raise ValueError(f"{pattern!r} matches every name, so nothing would train; name what is to stand still")
        return pattern


class OptimConfig(AdamWConfig):
    """The model's optimizer. `roles`: further optimizers by name; each lists only what differs from the model's.

    A reconstruction has the role "discriminator". `freeze`: patterns of parameter names, of all roles, that do not
    train; an entry is a pattern or {pattern, until_step}. `layer_decay`: the rate of a block is multiplied by it
    once for every block above, and once for the head.
    `ema`: decay of the exponential moving average of the weights, 0 for none.
    """

    added = AdamWConfig.added | {"freeze", "layer_decay", "ema"}
    roles: dict[str, AdamWConfig] = {}
    freeze: tuple[FreezeConfig, ...] = ()
    layer_decay: PositiveFloat = Field(1.0, le=1.0)
    ema: Beta = 0.0

    @pydantic.model_validator(mode="before")
    @classmethod
    def _differences(cls, tree: Any) -> Any:
        """Fill a role's missing settings from the model's."""
        if not isinstance(tree, dict) or not isinstance(tree.get("roles"), dict):
            return tree
        own = {key: value for key, value in tree.items() if key in AdamWConfig.model_fields}
        roles = {name: own | given if isinstance(given, dict) else given for name, given in tree["roles"].items()}
        return tree | {"roles": roles}

    def of(self, role: str) -> AdamWConfig:
        """Return the settings of a role's optimizer."""
        return self.roles.get(role, self)


class GuardsConfig(Settings):
    """Handling of steps whose loss or gradient norm is not finite, or spikes.

    skip: omit the update. roll_back: also restore the last regular checkpoint's weights, and continue with the next
    batch. stop: end the run before the update. More than `patience_steps` refused steps in a row always end the run.
    """

    non_finite: Literal["skip", "roll_back", "stop"] = "stop"
    spike: Literal["ignore", "skip", "roll_back", "stop"] = "ignore"
    spike_sigmas: PositiveFloat = 6.0
    window_steps: PositiveInt = 128
    patience_steps: PositiveInt = 10


TRACKING_SCHEMES = (
    "http",
    "https",
    "sqlite",
    "postgresql",
    "mysql",
    "mssql",
    "databricks",
    "databricks-uc",
    "uc",
    "file",
)


def known_to_mlflow(uri: str) -> str:
    """Return `uri`. Raises ValueError when MLflow, with its installed plug-ins, has no store for its scheme."""
    scheme, colon, rest = uri.partition(":")
    kind = scheme.lower().partition("+")[0] if colon and "/" not in scheme else "file"
    if kind not in TRACKING_SCHEMES and kind not in entry_points(group="mlflow.tracking_store").names:
        raise ValueError(f"MLflow does not support {kind!r}; use http(s)://HOST, sqlite:///FILE, or leave it empty")
    if kind == "sqlite" and not (rest.startswith("///") and rest.strip("/")):
        raise ValueError("a database path needs three slashes: sqlite:///runs/mlflow.db")
    if kind in ("http", "https") and not _names_host(uri):
        raise ValueError(f"the host is missing; use {kind}://HOST:PORT")
    if uri and not uri.strip():
        raise ValueError("only spaces; leave it empty to disable tracking")
    return uri


def _names_host(address: str) -> bool:
    """Return whether an http(s) address has a host and a valid port (1 to 65535), if any."""
    try:
        parts = urlsplit(address)
        return parts.port != 0 and bool(parts.hostname)
    except ValueError:  # unclosed brackets or an invalid port
        return False


TrackingUri = Annotated[str, pydantic.AfterValidator(expand_home), pydantic.AfterValidator(known_to_mlflow)]


class TrackingConfig(Settings):
    """MLflow tracking. An empty `uri` disables it; metrics.jsonl in the run folder is always written."""

    uri: TrackingUri = "sqlite:///runs/mlflow.db"
    experiment: str = "tessera"


class DeepSpeedConfig(Settings):
    """Overrides of the generated DeepSpeed JSON, for options that the other sections do not offer."""

    extra: dict[str, Any] = {}


SAVED = "config.json"
"""File name of the configuration in a run's folder."""
FINGERPRINTS = "fingerprints"
"""Key of config.json for the fingerprints of what a run or an export depends on."""


NOTES_FILE = "tessera.json"
"""File name, in an export of another layout, for what that layout cannot hold, such as fingerprints."""


class RunConfig(Settings):
    """One training run. `initial`: a run or an exported model whose weights to start from, as far as they fit."""

    renamed = RENAMED
    run: Location
    initial: OptionalLocation = None
    seed: Seed = 0
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    guards: GuardsConfig = GuardsConfig()
    tracking: TrackingConfig = TrackingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_fingerprints(cls, tree: Any) -> Any:
        """Drop the fingerprints that the program adds to RUN/config.json; they are not settings."""
        return {key: tree[key] for key in tree if key != FINGERPRINTS} if isinstance(tree, dict) else tree

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_defaults_of_task(cls, tree: Any) -> Any:
        return fill_model(tree)

    @property
    def checkpoint_root(self) -> str:
        """Folder or s3:// prefix of the checkpoints: `train.checkpoints`, or else RUN/checkpoints."""
        return checkpoint_root(self.run, self.train.checkpoints)

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the evaluations that are made in training."""
        return tuple(self.data.evaluations) if self.train.evaluate_every_steps else ()

    @property
    def watched(self) -> str:
        """The figure, as `train.keep_best` names it, that decides when patience ends; empty if there is none."""
        best = self.train.keep_best or ("" if self.data.evaluations.keys() - {""} else figure_name("", "loss"))
        return best if self.evaluated and parsed(best)[0].startswith(EVALUATED) else ""

    @pydantic.model_validator(mode="after")
    def _sections_fit(self) -> "RunConfig":
        check_sections(self)
        return self


def checkpoint_root(run: str | Path, elsewhere: str | None) -> str:
    """Return where the checkpoints of the run in this folder are: `elsewhere`, or else RUN/checkpoints."""
    return elsewhere or f"{run}/checkpoints"


def check_sections(config: RunConfig) -> None:
    """Check the rules that span sections. Raises ValueError with value, rule and remedy."""
    model, task, reads = config.model, config.task, config.model.reads
    if not isinstance(model, task.trains):
        fitting = " or ".join(map(repr, tasks_of(model.kind)))
        raise ValueError(f"task.kind={task.kind!r} does not train a {model.kind}; use {fitting}")
    if reads.text and config.data.text_tokenizer is None:
        raise ValueError(
            f"data.text_tokenizer is missing; a {model.kind} reads text, set it to a SentencePiece .model file"
        )
    if reads.codes and config.data.image_tokenizer is None:
        raise ValueError(
            f"data.image_tokenizer is missing; a {model.kind} reads image codes, set it to the image tokenizer's folder"
        )
    if task.replicated and config.train.zero_stage != 0:
        raise ValueError(
            f"train.zero_stage={config.train.zero_stage}: {task.kind!r} needs the full weights of a {model.kind} on "
            "every rank; use 0"
        )
    check_best(config.train.keep_best, task, config.train.steps, config.evaluated)
    _check_evaluation(config)
    if reads.text:
        _check_text(reads.text, task)
    _check_batches(config.train)
    task.check(model, min(config.train.batches))
    _check_optimizers(config)


def has_begun(config: RunConfig) -> bool:
    """Return whether the run has logged a step; it may then resume from a checkpoint and no longer reads `initial`."""
    path = Path(config.run) / METRICS
    return path.is_file() and path.stat().st_size > 0


def check_initial(config: RunConfig) -> None:
    """Raise ConfigError when a run that has not begun names an `initial` folder that does not exist."""
    path = local_path(config.initial) if config.initial else None
    if path is not None and not path.exists() and not has_begun(config):
        raise ConfigError(
            f"initial={config.initial} does not exist; use the folder of a run or of an exported model, or leave it out"
        )


def _check_evaluation(config: RunConfig) -> None:
    """Check that there are data to evaluate on in training, and a figure that the patience is for."""
    train = config.train
    if train.evaluate_every_steps and not config.data.evaluations:
        raise ValueError(
            f"train.evaluate_every_steps={train.evaluate_every_steps} has no data to evaluate on; name a dataset in "
            "data.evaluation, or leave it out"
        )
    if train.patience and not train.evaluate_every_steps:
        raise ValueError(
            f"train.patience={train.patience} counts evaluations, and there are none; set train.evaluate_every_steps"
        )
    if train.patience and not config.watched:
        one = figure_name(next(iter(config.data.evaluations)), "loss")
        raise ValueError(
            f"train.patience={train.patience}: train.keep_best={train.keep_best!r} names no figure of an evaluation "
            f"that must improve; use for example min:{one}"
        )


def _check_text(text: TextRead, task: TaskSettings) -> None:
    """Check that there are ids besides the special ones, and room for the task's shortest row."""
    shortest = task.shortest_row()
    if shortest and text.context < len(shortest.split()):
        raise ValueError(
            f"model.{text.context_field}={text.context} has no room for {shortest}; use {len(shortest.split())} or more"
        )
    if text.vocab_size <= len(task.specials):
        raise ValueError(
            f"model.{text.vocab_field}={text.vocab_size} has no ids beyond the special ones of {task.kind!r} "
            f"({', '.join(task.specials)}); use the size of the text tokenizer"
        )


def _check_batches(train: TrainConfig) -> None:
    """Check that the batches of the warm-up grow to the global batch, and end before the run."""
    if sorted(set(train.batches)) != [*train.batches]:
        raise ValueError(
            f"train.batch_warmup: the batches are {', '.join(map(str, train.batches))} with train.global_batch last; "
            "each must be above the previous one"
        )
    if train.warmup >= train.steps:
        raise ValueError(
            f"train.batch_warmup takes {train.warmup} steps, which must be below train.steps={train.steps}; use fewer"
        )


def _check_optimizers(config: RunConfig) -> None:
    known = config.task.roles[1:]
    for role in config.optim.roles:
        if role not in known:
            raise ValueError(
                f"optim.roles.{role}: {config.task.kind!r} has no such optimizer; "
                + (f"use {', '.join(known)}" if known else "leave optim.roles out")
            )
    for name, own in [("optim", config.optim), *((f"optim.roles.{role}", o) for role, o in config.optim.roles.items())]:
        check_schedule(name, own, config.train.steps)
    for frozen in config.optim.freeze:
        if frozen.until_step is not None and frozen.until_step >= config.train.steps:
            raise ValueError(
                f"optim.freeze: {frozen.pattern!r} until_step={frozen.until_step} must be below "
                f"train.steps={config.train.steps}; leave until_step out to freeze it throughout"
            )


def micro_batch_of(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Return (micro-batch per rank, accumulation steps) of a step with the whole global batch.

    Without `micro_batch`, a step of any size is one micro-batch. Raises ValueError when a batch does not divide.
    """
    unit = world_size * (train.micro_batch or 1)
    for batch in reversed(train.batches):
        if batch % unit:
            name = "global_batch=" if batch == train.global_batch else "batch_warmup: batch "
            low = batch // unit * unit
            usable = f"{low} or {low + unit}" if low else str(unit)
            raise ValueError(
                f"{name}{batch} is not divisible by {world_size} ranks x micro_batch {train.micro_batch or 1} = "
                f"{unit}; use {usable}"
            )
    per_rank = train.global_batch // world_size
    micro = train.micro_batch or per_rank
    return micro, per_rank // micro


# ------------------------------------------------------------------------------- what a run may change when it resumes

CHANGEABLE = (
    "train.steps",
    *(f"optim.{name}" for name in ScheduleConfig.model_fields),
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.no_decay",
    "optim.ema",
    "optim.freeze",
    "optim.layer_decay",
    "data.evaluation",
)
"""Settings that --change accepts, with what is below them; those of `optim` also in `optim.roles.NAME`."""


def changeable(key: str) -> str | None:
    """Return the setting of CHANGEABLE, or the same one of a role, that a dotted key is or belongs to, else None."""
    plain = re.sub(r"^optim\.roles\.[^.]+\.", "optim.", key)
    row = next((row for row in CHANGEABLE if f"{plain}.".startswith(f"{row}.")), None)
    return None if row is None else key[: len(key) - len(plain) + len(row)]


def load_run(path: str | Path, overrides: Sequence[str], changes: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a run. changes: `--change key=value` overrides, which consent to a new value.

    path: a YAML file, or a run's config.json, which may come from an earlier version. Raises ConfigError for a change
    of a setting that a run may not change.
    """
    from pretrain.schema.saved import saved_run

    consented_keys(changes)
    tree = read_yaml(Path(path))
    tree = saved_run(tree) if Path(path).name == SAVED else tree
    return override_settings(RunConfig, tree, [*overrides, *changes], str(path))


def consented_keys(changes: Sequence[str]) -> frozenset[str]:
    """Return the settings that `key=value` words change. Raises ConfigError for one that cannot change within a run."""
    found = set()
    for key in (change.partition("=")[0] for change in changes):
        setting = changeable(key)
        if setting is None:
            raise ConfigError(
                f"--change {key}: a run may change {', '.join(CHANGEABLE)} (those of optim also in optim.roles.NAME); "
                "for others start a new run, from this one's weights with `initial`"
            )
        found.add(setting)
    return frozenset(found)
