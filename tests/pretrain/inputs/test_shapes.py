"""The shapes computed without data are those of the batch that the inputs make."""

from typing import Any

import pytest

from pretrain.inputs.lethal import DecodesImages
from pretrain.inputs.shapes import batch_shapes
from pretrain.tasks import TASKS
from tests.families import FAMILIES, Letters, Samples, batch_of


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_batch_has_the_computed_shapes_and_dtypes(name: str, rate: float) -> None:
    """rate: of dropout and drop path, whose noise is a part of the batch."""
    config = FAMILIES[name].config(FAMILIES[name].dropping(rate), global_batch=4)
    made = batch_of(config, 4, full=True)
    task = TASKS[config.task.kind]
    shapes = batch_shapes(config, task.keys, 4, task.shapes)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in made.items()}
    del found["step"], found["turn"]  # added by the loop
    assert shapes == found


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.reads.pixels])
def test_inputs_that_decode_images_say_their_side(name: str) -> None:
    """The search for lethal images decodes as they do; without a side it would pass them over."""
    config = FAMILIES[name].config()
    stream: Any = Samples(config.model.reads, full=True)
    tokenizer = Letters(200) if config.model.reads.text else None
    inputs = TASKS[config.task.kind].inputs(config, stream, tokenizer)
    assert isinstance(inputs, DecodesImages) and config.model.reads.pixels
    assert inputs.image_size == config.model.reads.pixels.side
