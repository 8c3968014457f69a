"""An exported model: a folder with config.json and model.safetensors. Nothing in it executes.

config.json holds "model", and of the run that it comes from "task", "data", "seed", "step"
and "fingerprints".
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
    """Write a new folder -> its path. Raises ConfigError for a used one, DataError where it cannot be written.

    more: what config.json says beside the model: "task", "data", "seed" and "fingerprints" as a run's does,
    and the "step".
    """
    with new_folder(directory) as folder:
        save_weights(folder, state)
        write_notes(folder, config, more, CONFIG_FILE)
    return Path(directory)


def write_notes(
    folder: Path, model_config: Settings, more: Mapping[str, Any] | None = None, name: str = NOTES_FILE
) -> None:
    """Write what is known of a model into `folder`: the config.json of an export of ours, tessera.json of any other."""
    tree = {"model": model_config.model_dump(mode="json"), **(more or {})}
    (folder / name).write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_notes(directory: str | Path, model_config: Settings) -> dict[str, Any]:
    """What tessera.json in the folder of another layout says beside the model; nothing where that is another one."""
    try:
        tree = json.loads(Path(directory, NOTES_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(tree, dict) or tree.pop("model", None) != model_config.model_dump(mode="json"):
        return {}
    return tree


def save_weights(folder: Path, state_dict: Mapping[str, Tensor]) -> None:
    """Write model.safetensors into `folder`; raises DataError where that fails."""
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()}
    try:
        save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    except SafetensorError as error:  # what it says of a full disk is no OSError
        raise DataError(f"{WEIGHTS_FILE} cannot be written ({error}); make room, then export again") from None


def load_model(directory: str | Path) -> tuple[nn.Module, ModelConfig]:
    """-> the model in evaluation mode on the CPU, and its configuration.

    Raises ConfigError for the folder of a run, DataError naming what does not fit.
    """
    folder = Path(directory)
    config = load_config(folder)
    if not (folder / WEIGHTS_FILE).exists() and "train" in json.loads((folder / CONFIG_FILE).read_bytes()):
        raise ConfigError(
            f"{folder} is a run, not an exported model; give what `tessera checkpoint export` makes of it"
        )
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
    """The model's configuration in the folder; raises DataError when there is none or it is not one."""
    path = Path(directory) / CONFIG_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return pydantic.TypeAdapter(ModelConfig).validate_python(saved_model(tree["model"]))
    except FileNotFoundError:
        hint = foreign_model(directory)
        raise DataError(f"{path} does not exist; give a folder that `tessera checkpoint export` wrote{hint}") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:  # pydantic's is a ValueError
        hint = foreign_model(directory)
        raise DataError(f"{path} does not describe a model ({error}); export the model again{hint}") from None
