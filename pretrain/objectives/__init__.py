"""OBJECTIVES: kind of the configuration -> Objective(model, config, collectives).

forward(batch) returns named scalars; the mean over ranks of "loss" is the loss of the global batch, the others are
detached metrics.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

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


@runtime_checkable
class FollowsSteps(Protocol):
    """An objective that does something after every update, on every rank alike."""

    def after_step(self, step: int) -> None: ...


@runtime_checkable
class CachesGradients(Protocol):
    """An objective whose gradient of a part of the batch depends on the whole batch.

    `forward` of a micro-batch with the key "embed" returns what the others must know of it (embeddings, for example);
    `slopes` takes that of all micro-batches of this rank and returns what to add to each of them.
    """

    def slopes(self, rows: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]: ...


@runtime_checkable
class Previews(Protocol):
    """An objective whose outputs are pictures to look at."""

    def preview(self, batch: dict[str, Tensor]) -> Tensor: ...
