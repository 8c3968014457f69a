"""The shapes computed without data are those of the batch that the inputs make."""

import pytest

from pretrain.inputs.shapes import batch_shapes
from pretrain.tasks import TASKS
from tests.families import FAMILIES, batch_of


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_batch_has_the_computed_shapes_and_dtypes(name: str) -> None:
    config = FAMILIES[name].config(global_batch=4)
    made = batch_of(config, 4, full=True)
    task = TASKS[config.task.kind]
    shapes = batch_shapes(config, task.keys, 4, task.shapes)
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in made.items()}
    del found["step"], found["turn"]  # added by the loop
    assert shapes == found
