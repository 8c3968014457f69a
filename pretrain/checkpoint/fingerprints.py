"""Content digests of a run's dependencies: text tokenizer, image tokenizer, initial weights, datasets.

A fingerprint is stored under the name of the setting that holds the path ("data.text_tokenizer"), in RUN/config.json,
in the state of every checkpoint and in exported folders. Every use is checked: different content is refused even if its
shapes fit.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import ConfigError, DataError, TesseraError
from data_pipeline.stream.mixture import Mixture, Source
from pretrain.config import FINGERPRINTS, NOTES_FILE, DataConfig, RunConfig
from pretrain.schema.saved import saved_fingerprints, saved_run

TEXT_TOKENIZER, IMAGE_TOKENIZER, INITIAL = "data.text_tokenizer", "data.image_tokenizer", "initial"
UNKNOWN = "0" * 12
"""Fingerprint of initial weights in a run begun by a version that did not record them."""
Fingerprints = dict[str, str]


def of_files(data: DataConfig, missing_ok: bool = False) -> Fingerprints:
    """Return the fingerprints of the text tokenizer (sha256) and image tokenizer (fp32 id) that `data` names.

    missing_ok: leave out what cannot be read instead of raising DataError.
    """
    from data_pipeline.text.kinds import open_tokenizer
    from pretrain.inputs.image_tokenizer import load_tokenizer

    found: Fingerprints = {}
    makers = {
        TEXT_TOKENIZER: lambda path: open_tokenizer(path).fingerprint,
        IMAGE_TOKENIZER: lambda path: load_tokenizer(path).id,
    }
    for name, path in ((TEXT_TOKENIZER, data.text_tokenizer), (IMAGE_TOKENIZER, data.image_tokenizer)):
        try:
            found |= {name: makers[name](path)} if path is not None else {}
        except DataError:
            if not missing_ok:
                raise
    return found


def of_datasets(data: DataConfig, stream: Source) -> Fingerprints:
    """Return the fingerprints of the datasets in `stream`, under the names of their settings in `data`."""
    if isinstance(stream, Mixture):
        return {f"data.datasets.{number}.path": one.fingerprint for number, one in enumerate(stream.streams)}
    return {"data.dataset": stream.fingerprint}


def of_initial(source: str | Path, like: str = "") -> str | None:
    """Return the sha256 of the weights in an exported folder or a run; for a run, "@step N" is appended.

    like: the fingerprint to compare with; returned if the weights are the same. For a run, the checkpoint of its step
    is read. None if the weights to compare can no longer be read.
    """
    from pretrain.checkpoint.trained import newest_whole, weights_in, weights_of
    from pretrain.interchange.folder import WEIGHTS_FILE

    digest, _, step = like.partition("@step ")
    try:
        if (Path(source) / WEIGHTS_FILE).is_file():
            found, at = _digest(weights_in(source)), ""
        else:
            saved = newest_whole(source, int(step) if step else None)
            found, at = _digest(weights_of(saved)), f"@step {saved.step}"
    except (OSError, TesseraError):
        if like:
            return None
        raise
    return like if found == digest else found + at


def _digest(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------- checks


def recorded(folder: str | Path) -> Fingerprints | None:
    """Return the fingerprints of a run or an exported folder; None if it was written before they were recorded.

    An export in another layout stores them in its tessera.json, one in our own layout in its config.json.
    """
    found = fingerprints_in(_config_of(folder))
    return fingerprints_in(_config_of(folder, NOTES_FILE)) if found is None else found


def fingerprints_in(tree: Mapping[str, Any]) -> Fingerprints | None:
    """Return the fingerprints in a config.json or in a checkpoint's state; None if it has none."""
    found = tree.get(FINGERPRINTS)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return None
    return saved_fingerprints(found)


def _config_of(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    try:
        tree = json.loads(Path(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return saved_run(tree) if isinstance(tree, dict) else {}


def check_files(folder: str | Path, config: RunConfig, missing_ok: bool = False) -> None:
    """Raise ConfigError if `config` names another text or image tokenizer than the model in `folder` was trained with.

    folder: of a run or an export. missing_ok: do not check what cannot be read.
    """
    known = recorded(folder)
    compare(known, {} if known is None else of_files(config.data, missing_ok), config, str(folder))


def check_datasets(folder: str | Path, config: RunConfig, stream: Source) -> None:
    """Raise ConfigError if the training data of the model in `folder`, opened as `stream`, have changed since.

    If an override names other datasets than the training data, nothing is compared.
    """
    known, now = recorded(folder), config.data.model_dump(mode="json")
    data = _config_of(folder).get("data", {})
    if known is not None and all(data.get(key) == now[key] for key in ("dataset", "datasets")):
        compare(known, of_datasets(config.data, stream), config, str(folder))


def warn_of_others(source: str | Path, known: Fingerprints) -> None:
    """Warn if initial weights were trained with another tokenizer: rows of their embeddings have other meanings."""
    theirs = recorded(source) or {}
    for name in (TEXT_TOKENIZER, IMAGE_TOKENIZER):
        if theirs.get(name, known.get(name)) != known.get(name, theirs.get(name)):
            print(
                f"warning: initial={source} was trained with another {name} ({_short(theirs.get(name))}) than this run "
                f"has ({_short(known.get(name))}): its embedding rows belong to other pieces",
                flush=True,
            )


def compare(known: Fingerprints | None, now: Fingerprints, config: RunConfig, where: str, say: bool = True) -> None:
    """Raise ConfigError naming each dependency whose fingerprint differs.

    known: the recorded fingerprints, or None if written before they were recorded; then, with `say`, a note on stderr
    lists what could not be checked.
    """
    if known is None:
        if say and (named := _named(config)):
            print(
                f"note: {where} has no fingerprints, as an older version wrote it: {', '.join(named)} "
                "not compared with its training",
                file=sys.stderr,
                flush=True,
            )
        return
    lines = [
        f"{name}: {_place(config, name)} has fingerprint {fingerprint[:12]}, expected {_short(known.get(name))}"
        for name, fingerprint in sorted(now.items())
        if known.get(name) != fingerprint
    ]
    if lines:
        raise ConfigError(
            f"{where} was trained with another {' and '.join(line.partition(':')[0] for line in lines)}; use the one "
            "it was trained with, or restore it\n  " + "\n  ".join(lines)
        )


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else fingerprint[:12]


def _named(config: RunConfig) -> list[str]:
    """Return the names of settings given in `config` that have a fingerprint, except datasets."""
    values = {
        TEXT_TOKENIZER: config.data.text_tokenizer,
        IMAGE_TOKENIZER: config.data.image_tokenizer,
        INITIAL: config.initial,
    }
    return [name for name, value in values.items() if value]


def _place(config: RunConfig, name: str) -> str:
    """Return the value of the setting `name`, a dotted key: the path of the dependency."""
    value = config.model_dump(mode="json")
    for part in name.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return str(value)
