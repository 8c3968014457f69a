"""INPUTS: kind of the objective -> Inputs(config, stream, vocabulary), which turns a list of samples into tensors."""

from typing import Any

from pretrain.inputs.codes import AutoregressiveInputs
from pretrain.inputs.pixels import ReconstructionInputs
from pretrain.inputs.text import ContrastiveInputs, MlmInputs, RtdInputs

INPUTS: dict[str, type[Any]] = {
    "contrastive": ContrastiveInputs,
    "mlm": MlmInputs,
    "rtd": RtdInputs,
    "autoregressive": AutoregressiveInputs,
    "reconstruction": ReconstructionInputs,
}
