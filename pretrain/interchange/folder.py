"""Exported models: folders with config.json and model.safetensors, which contain no executable code.

config.json holds "model" and, of the model's run, "task", "data", "seed", "step" and "fingerprints".
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.foreign import foreign_model
from data_pipeline.outputs import new_folder
from data_pipeline.settings import Settings
from pretrain.config import NOTES_FILE
from pretrain.models import MODELS
from pretrain.schema import ModelConfig
from pretrain.schema.saved import saved_model

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def export_model(
    directory: str | Path,
    config: Settings,
    state: Mapping[str, Tensor],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a new folder -> its path. Raises ConfigError if it is in use, DataError if it cannot be written.

    more: entries of config.json besides the model: "task", "data", "seed" and "fingerprints" as in a run's, "step".
    """
    with new_folder(directory) as folder:
        save_weights(folder, state)
        write_notes(folder, config, more, CONFIG_FILE)
    return Path(directory)


def write_notes(
    folder: Path, model_config: Settings, more: Mapping[str, Any] | None = None, name: str = NOTES_FILE
) -> None:
    """Write model configuration and `more` into `folder`: config.json for our own layout, tessera.json for others."""
    tree = {"model": model_config.model_dump(mode="json"), **(more or {})}
    (folder / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_notes(directory: str | Path, model_config: Settings) -> dict[str, Any]:
    """Return the entries of tessera.json besides the model; empty if it is missing or describes another model."""
    try:
        tree = json.loads(Path(directory, NOTES_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(tree, dict):
        return {}
    try:
        model = type(model_config).model_validate(saved_model(tree.pop("model", None)))
    except pydantic.ValidationError:
        return {}
    return tree if model == model_config else {}


def save_weights(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write model.safetensors into `folder`. Raises DataError when that fails."""
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    try:
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk raises this, not OSError
        raise DataError(f"{WEIGHTS_FILE} cannot be written ({error}); free space, then export again") from None


def load_model(directory: str | Path) -> tuple[nn.Module, ModelConfig]:
    """Return the model in evaluation mode on the CPU, and its configuration.

    Raises ConfigError for a run's folder, DataError naming what does not fit.
    """
    folder = Path(directory)
    config = load_config(folder)
    if not (folder / WEIGHTS_FILE).exists() and "train" in json.loads((folder / CONFIG_FILE).read_bytes()):
        raise ConfigError(f"{folder} is a run, not an exported model; export it with `tessera checkpoint export`")
    with torch.device("meta"):
        model = MODELS[config.kind](config)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        model.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); export the model again") from None
    except RuntimeError as error:
        raise DataError(f"{folder}: the weights do not fit {CONFIG_FILE} ({error}); export the model again") from None
    return model.eval(), config


def load_config(directory: str | Path) -> ModelConfig:
    """Read the model's configuration in the folder. Raises DataError when it is missing or invalid."""
    path = Path(directory) / CONFIG_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return pydantic.TypeAdapter(ModelConfig).validate_python(saved_model(tree["model"]))
    except FileNotFoundError:
        hint = foreign_model(directory)
        raise DataError(f"{path} does not exist; use a folder that `tessera checkpoint export` wrote{hint}") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:  # pydantic's error is a ValueError
        hint = foreign_model(directory)
        raise DataError(f"{path} does not describe a model ({error}); export the model again{hint}") from None
