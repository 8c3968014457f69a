"""The shapes that are foretold of a batch are those of the batch that the inputs make."""

from typing import Any

import cv2
import numpy as np
import pytest

from data_pipeline.schema import Sample
from pretrain.config import RunConfig
from pretrain.inputs.shapes import batch_shapes
from pretrain.tasks import TASKS

CONTEXT = 16
TEXT = {"vocab_size": 60, "context": CONTEXT, "layers": 1, "width": 8, "heads": 1}
ENCODER = TEXT | {"embedding_width": 8}
FAMILIES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "clip", "text": TEXT, "vision": {"image_size": 16, "patch_size": 8}}, {"kind": "contrastive"}),
    ({"kind": "bert", **ENCODER}, {"kind": "mlm"}),
    ({"kind": "bert", **ENCODER}, {"kind": "mlm", "nsp": False, "packing": True}),
    ({"kind": "electra", **ENCODER}, {"kind": "rtd"}),
    ({"kind": "electra", **ENCODER}, {"kind": "rtd", "packing": True}),
    ({"kind": "gpt", "text_vocab": 60, "image_vocab": 8, "text_tokens": 3, "image_tokens": 4},
     {"kind": "autoregressive"}),
    ({"kind": "vqgan", "image_size": 32}, {"kind": "reconstruction"}),
]  # fmt: skip


class Letters:
    """A vocabulary whose pieces are letters."""

    size, pad, unk, cls, sep, mask = 60, 0, 1, 2, 3, 4
    specials, ordinary = frozenset(range(5)), np.arange(5, 60)

    def encode(self, text: str) -> list[int]:
        return [5 + ord(letter) % 50 for letter in text]


class Samples:
    """A stream of a few samples that fill a row each."""

    samples = 10

    def fetch(self, sample_id: int) -> Sample:
        ok, image = cv2.imencode(".png", np.zeros((20, 20, 3), np.uint8))
        assert ok
        captions = ("a" * CONTEXT, "b" * CONTEXT)
        codes = np.arange(4, dtype=np.uint16)
        return Sample(sample_id, 0, -1, f"k{sample_id}", image=image.tobytes(), texts=captions, codes=codes)


@pytest.mark.parametrize(("model", "task"), FAMILIES, ids=lambda tree: " ".join(map(str, tree.values()))[:24])
def test_a_full_batch_has_the_shapes_and_dtypes_that_are_foretold(model: Any, task: Any) -> None:
    tree = {
        "run": "r",
        "model": model,
        "task": task,
        "data": {"dataset": "d", "text_tokenizer": "v", "image_tokenizer": "t"},
        "train": {"steps": 10, "global_batch": 4, "zero_stage": 0},
        "optim": {"lr": 1e-3},
    }
    config, stream = RunConfig.model_validate(tree), Samples()
    made = TASKS[config.task.kind].inputs(config, stream, Letters())([stream.fetch(number) for number in range(4)])
    told = batch_shapes(config, TASKS[config.task.kind].keys, 4)
    assert told == {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in made.items()}
