"""OBJECTIVES: kind of the configuration -> Objective(model, config, collectives).

forward(batch) returns named scalars; the mean over ranks of "loss" is the loss of the global batch, the others are
detached metrics.
"""

from torch import nn

from pretrain.objectives.autoregressive import Autoregressive
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.mlm import Mlm
from pretrain.objectives.reconstruction import Reconstruction
from pretrain.objectives.rtd import Rtd

OBJECTIVES: dict[str, type[nn.Module]] = {
    "contrastive": Contrastive,
    "mlm": Mlm,
    "rtd": Rtd,
    "autoregressive": Autoregressive,
    "reconstruction": Reconstruction,
}
