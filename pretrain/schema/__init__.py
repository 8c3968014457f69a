"""The sections `model` and `task` of a run, one file per model family; imports no torch.

ModelConfig and TaskConfig are the unions that list all kinds.
"""

from typing import Annotated

from pydantic import Field

from pretrain.schema.clip import ClipConfig
from pretrain.schema.common import ModelSettings
from pretrain.schema.encoders import BertConfig, ElectraConfig
from pretrain.schema.gpt import GptConfig
from pretrain.schema.tasks import (
    TASK_SETTINGS,
    AutoregressiveConfig,
    ClassifyConfig,
    ContrastiveConfig,
    MlmNspConfig,
    ReconstructionConfig,
    RtdConfig,
    SigmoidConfig,
)
from pretrain.schema.vit import VitConfig
from pretrain.schema.vqgan import VqganConfig

_Tasks = (
    ContrastiveConfig
    | SigmoidConfig
    | MlmNspConfig
    | RtdConfig
    | AutoregressiveConfig
    | ReconstructionConfig
    | ClassifyConfig
)
_Models = ClipConfig | BertConfig | ElectraConfig | GptConfig | VqganConfig | VitConfig

ModelConfig = Annotated[_Models, Field(discriminator="kind")]
TaskConfig = Annotated[_Tasks, Field(discriminator="kind")]


def task_for(model: ModelSettings) -> str:
    """Return the kind of the first task that can train this very model; the default of its kind if none can."""
    kinds = tasks_of(model.kind)
    for kind in kinds:
        try:
            TASK_SETTINGS[kind](kind=kind).check(model, global_batch=2)
        except ValueError:
            continue
        return kind
    return kinds[0]


def tasks_of(model: str) -> list[str]:
    """Return the task kinds that train a model of kind `model`; the first is the default."""
    return [
        name
        for name, settings in TASK_SETTINGS.items()
        if any(trained.model_fields["kind"].default == model for trained in settings.trains)
    ]
