"""TASKS: `task.kind` -> Task(model, config, collectives). Each file holds the inputs and the loss of one task."""

from pretrain.tasks.autoregressive import Autoregressive
from pretrain.tasks.classify import Classify
from pretrain.tasks.contrastive import Contrastive
from pretrain.tasks.mlm import Mlm
from pretrain.tasks.reconstruction import Reconstruction
from pretrain.tasks.rtd import Rtd
from pretrain.tasks.sigmoid import Sigmoid
from pretrain.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "contrastive": Contrastive,
    "sigmoid": Sigmoid,
    "mlm": Mlm,
    "rtd": Rtd,
    "autoregressive": Autoregressive,
    "reconstruction": Reconstruction,
    "classify": Classify,
}
