"""Evaluation of a trained model on `data.evaluation`, or on its training data when that is not set."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.errors import ConfigError, storage_errors
from data_pipeline.outputs import write_whole
from data_pipeline.stream.mixture import Mixture, Source
from data_pipeline.text.tokenizer import TextTokenizer
from pretrain.checkpoint.fingerprints import check_datasets, check_files
from pretrain.checkpoint.trained import NOT_SAID, load_trained
from pretrain.config import RunConfig
from pretrain.evaluations import EVALUATIONS
from pretrain.evaluations.evaluated import Evaluated
from pretrain.inputs.source import open_data
from pretrain.runtime.mlflow_feed import send, shown, why_not
from pretrain.runtime.show import png

CANDIDATES_PER_PROMPT = 8


def main(
    run: str | Path,
    rerank: str | Path | None = None,
    candidates: int = CANDIDATES_PER_PROMPT,
    step: int | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[dict[str, Any]], None] = lambda told: None,
) -> dict[str, Any]:
    """Evaluate an exported model or a run's newest checkpoint (or that of `step` or `label`) -> step, data and metrics.

    The result is passed to `say`, then written to RUN/evaluation.json, RUN/samples (pictures) and MLflow.
    rerank: for a gpt, the run or export of a CLIP that picks the best of `candidates` images per prompt, as in DALL-E
    (Ramesh et al. 2021, arXiv:2102.12092).
    """
    folder = Path(run)
    model, config, at = load_trained(folder, step, label, overrides)
    evaluation = EVALUATIONS[config.task.kind]
    if rerank and not evaluation.draws:
        raise ConfigError(f"--rerank {rerank}: a {config.model.kind} generates no images; use the run of a gpt")
    check_files(folder, config)
    stream, tokenizer = _open_data(config, folder, with_codes=not evaluation.draws)
    readable = config.model_copy(update={"data": config.data.without_augmentation()})
    given = Evaluated(model, readable, stream, tokenizer, folder, rerank, candidates)
    figures = evaluation.figures(given)
    about = {"step": at, **_data_of(config, stream)} | ({"reranked_by": str(rerank)} if rerank else {})
    told = {key: value for key, value in about.items() if value is not None} | figures
    say(told)
    _write(folder, told, given.pictures)
    if config.tracking.uri:
        try:
            send(folder, config, figures)
        except Exception as error:  # a tracking error must not lose the metrics
            why = f"did not store the metrics ({why_not(error)}); they are in {folder}"
            print(f"MLflow at {shown(config.tracking.uri)} {why}", file=sys.stderr)
    return told


def _open_data(config: RunConfig, folder: Path, with_codes: bool) -> tuple[Source, TextTokenizer | None]:
    """Return the data to evaluate on, and the text tokenizer."""
    held_out = config.data.evaluation
    if not held_out and config.data.dataset == NOT_SAID:
        raise ConfigError(f"{folder} has no data.evaluation; add data.evaluation=DATASET")
    stream, tokenizer = open_data(config, held_out, with_codes or not held_out)
    if not held_out:
        check_datasets(folder, config, stream)
    return stream, tokenizer


def _data_of(config: RunConfig, stream: Source) -> dict[str, Any]:
    """Describe the evaluated data. held_out: whether it differs from the training data."""
    streams = stream.streams if isinstance(stream, Mixture) else [stream]
    return {
        "data": stream.dataset,
        "data_fingerprint": " + ".join(one.fingerprint[:12] for one in streams),
        "held_out": bool(config.data.evaluation),
    }


def _write(folder: Path, told: dict[str, Any], pictures: dict[str, Image.Image]) -> None:
    """Write the metrics and pictures. Raises DataError when the folder cannot be written."""
    samples = folder / "samples"
    if pictures:
        with storage_errors(samples):
            samples.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "evaluation.json", (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
    for name, picture in pictures.items():
        write_whole(samples / name, png(picture))
