"""Evaluation of a trained model on `data.evaluation`, or on its training data when that is not set."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, DataError, storage_errors
from data_pipeline.outputs import write_whole
from data_pipeline.sandbox import SandboxDecoder
from data_pipeline.shards.codes import DECODE_S, find_meta
from data_pipeline.shards.manifest import open_dataset
from data_pipeline.stream.mixture import Mixture
from pretrain.checkpoint.catalog import committed
from pretrain.checkpoint.fingerprints import check_datasets, check_files
from pretrain.checkpoint.trained import NOT_SAID, load_trained, root_of
from pretrain.config import RunConfig
from pretrain.evaluations import EVALUATIONS
from pretrain.evaluations import evaluated as limits
from pretrain.evaluations.evaluated import Evaluated, Figures, for_evaluation, picture_name
from pretrain.inputs.lethal import looking_decoder
from pretrain.inputs.source import codes_id, open_data
from pretrain.interchange.folder import CONFIG_FILE
from pretrain.runtime.goodput import lines_of
from pretrain.runtime.mlflow_feed import send, shown, why_not
from pretrain.runtime.show import png
from pretrain.schema.tasks import EVALUATED, figure_name
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE
from pretrain.tasks.task import Task

CANDIDATES_PER_PROMPT = 8
NOT_TRAINING = ("train.evaluate_every_steps=0", "train.patience=0", "train.keep_best=")
"""Overrides of settings that name the data evaluated in training: other data may be evaluated later."""
LINES = "evaluation.jsonl"
ABOUT = ("step", "data", "data_fingerprint", "reranked_by", "weights")
"""Fields that tell the lines of evaluation.jsonl apart."""


def main(
    run: str | Path,
    rerank: str | Path | None = None,
    candidates: int = CANDIDATES_PER_PROMPT,
    step: int | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[dict[str, Any]], None] = lambda told: None,
    every: bool = False,
    ema: bool = False,
) -> dict[str, Any]:
    """Evaluate an exported model or a run's newest checkpoint (or that of `step` or `label`) -> step, data and metrics.

    The result is passed to `say`, then written to RUN/evaluation.json, as a line of RUN/evaluation.jsonl, to
    RUN/samples (pictures) and MLflow. every: evaluate all checkpoints in the order of their steps; the newest counts.
    rerank: for a gpt, the run or export of a CLIP that picks the best of `candidates` images per prompt, as in DALL-E
    (Ramesh et al. 2021, arXiv:2102.12092). ema: evaluate the average of the weights.
    """
    folder, settings = Path(run), [*overrides, *NOT_TRAINING]
    steps = _steps(folder, settings, step, label) if every else [step]
    data: dict[str, Evaluated] = {}
    with contextlib.closing(looking_decoder(DECODE_S)) as decoder:
        for chosen in steps:
            model, config, at = load_trained(folder, chosen, label, settings, ema)
            task = TASKS[config.task.kind](model, config.task, ONE_DEVICE).eval()
            data = data or dict(_opened(config, folder, task, decoder, rerank, candidates))
            about, figures = _evaluated(task, config, at, data, rerank)
            about |= {"weights": "ema"} if ema else {}
            say(about | figures)
            _write(folder, about, figures, data)
    _send(folder, config, {f"ema_{name}": value for name, value in figures.items()} if ema else figures)
    return about | figures


def _evaluated(
    task: Task, config: RunConfig, at: int | None, data: Mapping[str, Evaluated], rerank: str | Path | None
) -> tuple[dict[str, Any], Figures]:
    """Evaluate one checkpoint -> step and data, and the figures, after the name of their data if there are several."""
    named: Figures = {}
    for name, given in data.items():
        given.task = task
        found = EVALUATIONS[config.task.kind].figures(given)
        named |= {figure_name(name, key).removeprefix(EVALUATED): value for key, value in found.items()}
    about = {"step": at, **_data_of(data, config)} | ({"reranked_by": str(rerank)} if rerank else {})
    return {key: value for key, value in about.items() if value is not None}, named


def _steps(folder: Path, settings: Sequence[str], step: int | None, label: str | None) -> list[int]:
    """Return the steps of all checkpoints. Raises ConfigError if one is named, DataError if there is none."""
    if step is not None or label is not None:
        raise ConfigError("--all evaluates every checkpoint; leave --step and --name out")
    steps = sorted({saved.step for saved in committed(root_of(folder, settings))})
    if not steps:
        raise DataError(f"{folder}: no committed checkpoint; train the run first")
    return steps


def _opened(
    config: RunConfig,
    folder: Path,
    task: Task,
    decoder: SandboxDecoder,
    rerank: str | Path | None,
    candidates: int,
) -> Iterator[tuple[str, Evaluated]]:
    """Open the data to evaluate on, by name; the name of a single dataset is empty."""
    evaluation = EVALUATIONS[config.task.kind]
    if rerank and not evaluation.draws:
        raise ConfigError(f"--rerank {rerank}: a {config.model.kind} generates no images; use the run of a gpt")
    check_files(folder, config)
    held_out: dict[str, str | None] = {**config.data.evaluations} or {"": None}
    if None in held_out.values() and config.data.dataset == NOT_SAID:
        raise ConfigError(f"{folder} has no data.evaluation; add data.evaluation=DATASET")
    for name, path in held_out.items():
        with_codes = path is None or not evaluation.draws or _has_codes(config, path)
        stream, tokenizer = open_data(config, path, with_codes)
        if path is None:
            check_datasets(folder, config, stream)
        count = stream.samples if path else min(stream.samples, limits.SAMPLES)
        given = Evaluated(task, for_evaluation(config), stream, tokenizer, folder, count, decoder)
        given.rerank, given.candidates, given.with_codes = rerank, candidates, with_codes
        yield name, given


def _has_codes(config: RunConfig, path: str) -> bool:
    """Return whether a dataset has the image codes that the model reads."""
    reads, tokenizer = config.model.reads.codes, Path(str(config.data.image_tokenizer))
    if reads is None or not (tokenizer / CONFIG_FILE).is_file():  # which the evaluation itself reports
        return False
    return find_meta(*open_dataset(path), codes_id(config, reads, path)) is not None


def _data_of(data: Mapping[str, Evaluated], config: RunConfig) -> dict[str, Any]:
    """Describe the evaluated data, by name if there are several. held_out: whether they are not the training data."""
    paths, fingerprints = {}, {}
    for name, given in data.items():
        streams = given.stream.streams if isinstance(given.stream, Mixture) else [given.stream]
        paths[name] = given.stream.dataset
        fingerprints[name] = " + ".join(one.fingerprint[:12] for one in streams)
    of_one = "" in paths
    return {
        "data": paths[""] if of_one else paths,
        "data_fingerprint": fingerprints[""] if of_one else fingerprints,
        "held_out": bool(config.data.evaluation),
    }


def _write(folder: Path, about: dict[str, Any], figures: Figures, data: Mapping[str, Evaluated]) -> None:
    """Write the metrics and pictures. Raises DataError when the folder cannot be written."""
    told = about | figures
    pictures = {
        picture_name(name, key): picture for name, given in data.items() for key, picture in given.pictures.items()
    }
    samples = folder / "samples"
    if pictures:
        with storage_errors(samples):
            samples.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "evaluation.json", (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
    for name, picture in pictures.items():
        write_whole(samples / f"{name}.png", png(picture))
    _add_line(folder, about, {f"{EVALUATED}{key}": value for key, value in figures.items()})


def _add_line(folder: Path, about: dict[str, Any], figures: Figures) -> None:
    """Write the figures, named as in metrics.jsonl, to evaluation.jsonl; replace the line of the same checkpoint."""
    rows = [row for row in lines_of(folder / LINES) if any(row.get(key) != about.get(key) for key in ABOUT)]
    rows.append(about | figures)
    write_whole(folder / LINES, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _send(folder: Path, config: RunConfig, figures: Figures) -> None:
    """Send the figures to MLflow; say if it does not take them."""
    if config.tracking.uri:
        try:
            send(folder, config, figures)
        except Exception as error:  # a tracking error must not lose the metrics
            why = f"did not take the figures ({why_not(error)}); they are in {folder}"
            print(f"MLflow at {shown(config.tracking.uri)} {why}", file=sys.stderr)
