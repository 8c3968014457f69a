"""MODELS: `model.kind` -> model class, built from its configuration. Each is written for one device."""

from torch import nn

from pretrain.models.bert import Bert
from pretrain.models.clip import Clip
from pretrain.models.electra import Electra
from pretrain.models.gpt import Gpt
from pretrain.models.vit import Vit
from pretrain.models.vqgan import Vqgan

MODELS: dict[str, type[nn.Module]] = {
    "clip": Clip,
    "bert": Bert,
    "electra": Electra,
    "gpt": Gpt,
    "vqgan": Vqgan,
    "vit": Vit,
}
