"""The table of model families for the tests: one row is a tiny run of one model and one task.

The tests of parity, sharding, recompute, accumulation, packing, plan, resume, export and of whole commands loop over
FAMILIES or, where settings of the task do not matter, over PAIRS. A new family adds a row. What a run reads, and the
samples of its batches, follow from the model's `reads`; the batches are made by the inputs of the task.
"""

import copy
import dataclasses
import functools
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from data_pipeline.schema import Sample
from data_pipeline.settings import check_settings
from data_pipeline.shards.verify import index
from pretrain.config import RunConfig
from pretrain.schema.common import Reads

if TYPE_CHECKING:
    from pretrain.tasks.task import Batch, Task

Tree = dict[str, Any]
TEXT: Tree = {"vocab_size": 200, "context": 16, "width": 32, "layers": 1, "heads": 2}
ENCODER: Tree = {"vocab_size": 200, "context": 24, "layers": 2, "width": 32, "heads": 2, "embedding_width": 32}


@dataclasses.dataclass(frozen=True)
class Material:
    """What runs read: a dataset of scenes, a vocabulary of their captions, and an image tokenizer."""

    dataset: Path
    vocabulary: Path
    images: Path = Path("unused")

    def labelled(self, classes: int) -> Path:
        """The dataset with a label at every sample, as tars made elsewhere; written at the first use."""
        folder = self.dataset.with_name(f"{self.dataset.name}-{classes}-classes")
        if not folder.exists():
            label(self.dataset, folder, classes)
        return folder


@dataclasses.dataclass(frozen=True)
class Family:
    """A tiny run of a model and a task: sections of its configuration, each with what differs from the defaults below.

    figure: a metric of its evaluation. recipe: one of published size. public: changes of the model for layouts of other
    programs, which do not hold every tiny model.
    """

    model: Tree
    task: Tree
    figure: str
    recipe: str
    train: Tree = dataclasses.field(default_factory=dict)
    optim: Tree = dataclasses.field(default_factory=lambda: {"lr": 1e-3, "warmup_steps": 2})
    public: Tree = dataclasses.field(default_factory=dict)

    @property
    def pair(self) -> tuple[str, str]:
        """The kinds of its model and its task."""
        return self.model["kind"], self.task["kind"]

    @functools.cached_property
    def reads(self) -> Reads:
        """What its model reads."""
        return self.config().model.reads

    def run(self, material: Material, run: Path, **train: Any) -> Tree:
        """The configuration of a run on this material, written to the folder `run`. train: changes of that section."""
        lengths = {"steps": 12, "global_batch": 12, "checkpoint_every_steps": 4, "log_every_steps": 50}
        return {
            "run": str(run),
            "model": copy.deepcopy(self.model),
            "task": copy.deepcopy(self.task),
            "data": data_of(self.reads, material),
            "train": lengths | self.train | train,
            "optim": copy.deepcopy(self.optim),
            "tracking": {"uri": ""},
        }

    def config(
        self, model: Mapping[str, Any] | None = None, task: Mapping[str, Any] | None = None, **train: Any
    ) -> RunConfig:
        """The checked configuration of a run whose paths nobody reads, with changes of three of its sections."""
        tree = {
            "run": "unused",
            "model": self.model | dict(model or {}),
            "task": self.task | dict(task or {}),
            "data": {"dataset": "unused", "text_tokenizer": "unused", "image_tokenizer": "unused"},
            "train": {"steps": 12, "global_batch": 12} | self.train | train,
            "optim": self.optim,
        }
        return check_settings(RunConfig, tree, "tests/families.py")

    def dropping(self, rate: float) -> Tree:
        """The change of the model to this rate of dropout and of drop path, over two blocks; none where it has none."""
        fields = type(self.config().model).model_fields
        return ({"dropout": rate} if "dropout" in fields else {}) | _dropping_paths(self.model, rate)


def _dropping_paths(model: Tree, rate: float) -> Tree:
    """The change of each stack of blocks, the model's own or those of its towers."""
    if "layers" in model:
        return {"layers": 2, "drop_path": rate}
    return {part: tower | _dropping_paths(tower, rate) for part, tower in model.items() if isinstance(tower, dict)}


FAMILIES: dict[str, Family] = {
    "clip": Family(
        model={
            "kind": "clip", "embed_dim": 16, "text": TEXT,
            "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
        },
        task={"kind": "contrastive"},
        figure="retrieval_r1",
        recipe="configs/clip/vit-b-32.yaml",
    ),
    "clip with the sigmoid loss": Family(
        model={
            "kind": "clip", "embed_dim": 16, "text": TEXT,
            "vision": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
        },
        task={"kind": "sigmoid"},
        figure="retrieval_r1",
        recipe="configs/clip/vit-b-16-sigmoid.yaml",
    ),
    "bert": Family(
        model={"kind": "bert"} | ENCODER,
        task={"kind": "mlm"},
        figure="mlm_accuracy",
        recipe="configs/text/bert-base.yaml",
    ),
    "bert, packed": Family(
        model={"kind": "bert"} | ENCODER,
        task={"kind": "mlm", "nsp": False, "packing": True},
        figure="mlm_accuracy",
        recipe="configs/text/bert-base.yaml",
    ),
    "electra": Family(
        model={"kind": "electra", "generator_fraction": 0.5} | ENCODER,
        task={"kind": "rtd"},
        figure="rtd_accuracy",
        recipe="configs/text/electra-small.yaml",
        train={"steps": 24, "global_batch": 16},
    ),
    "electra, packed": Family(
        model={"kind": "electra", "generator_fraction": 0.5} | ENCODER,
        task={"kind": "rtd", "packing": True},
        figure="rtd_accuracy",
        recipe="configs/text/electra-small.yaml",
    ),
    "gpt": Family(
        model={
            "kind": "gpt", "text_vocab": 200, "image_vocab": 32, "text_tokens": 8, "image_tokens": 64, "layers": 1,
            "width": 32, "heads": 2,
        },
        task={"kind": "autoregressive"},
        figure="prompts",
        recipe="configs/text_to_image/pai-painter-base.yaml",
    ),
    # Unused codes are revived every few steps; the discriminator has a rate of its own.
    "vqgan": Family(
        model={
            "kind": "vqgan", "image_size": 32, "channels": 8, "multipliers": [1, 2, 2], "res_blocks": 1,
            "attention_at": [], "latent_channels": 8, "codebook_size": 32, "code_width": 4,
            "discriminator_channels": 8, "discriminator_layers": 1,
        },
        task={"kind": "reconstruction", "discriminator_start_step": 6, "revive_after_steps": 3},
        figure="reconstruction_psnr",
        recipe="configs/image_tokenizer/vqgan-f16-16384.yaml",
        train={"steps": 20, "global_batch": 8, "zero_stage": 0},
        optim={"lr": 1e-3, "roles": {"discriminator": {"lr": 3e-4, "betas": [0.5, 0.9], "schedule": "constant"}}},
        public={"channels": 32, "norm_groups": 32, "attention_at": ["middle"]},
    ),
    "vit": Family(
        model={
            "kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "classes": 7,
            "dropout": 0.1,
        },
        task={"kind": "classify", "label_smoothing": 0.1},
        figure="top_5",
        recipe="configs/vision/vit-b-16.yaml",
    ),
}  # fmt: skip
_FIRSTS = {family.pair: name for name, family in reversed(FAMILIES.items())}
PAIRS = {name: family for name, family in FAMILIES.items() if _FIRSTS[family.pair] == name}
"""The first row of each model and task."""


def data_of(reads: Reads, material: Material) -> Tree:
    """The section `data` of a run whose model reads this."""
    data = {"dataset": str(material.labelled(reads.classes) if reads.classes else material.dataset)}
    if reads.text:
        data["text_tokenizer"] = str(material.vocabulary)
    if reads.codes:
        data |= {"image_tokenizer": str(material.images), "evaluation": str(material.dataset)}
    return data


def label(dataset: Path, folder: Path, classes: int) -> None:
    """Copy the tars with a .cls member after the first file of every sample: its number modulo `classes`."""
    folder.mkdir()
    numbers: dict[str, int] = {}
    for path in sorted(dataset.glob("*.tar")):
        with tarfile.open(path) as tar, tarfile.open(folder / path.name, "w") as copied:
            for member in tar:
                key = member.name.partition(".")[0]
                if key not in numbers:
                    numbers[key] = len(numbers)
                    text = str(numbers[key] % classes).encode()
                    info = tarfile.TarInfo(f"{key}.cls")
                    info.size = len(text)
                    copied.addfile(info, io.BytesIO(text))
                copied.addfile(member, tar.extractfile(member))
    index([str(folder)], 1)


# ------------------------------------------------------------------------------------------------ batches


class Letters:
    """A text tokenizer whose pieces are letters, every letter a word; its special ids are the last ones."""

    fingerprint = "letters"

    def __init__(self, size: int) -> None:
        self.size = size
        self.pad, self.unk, self.cls, self.sep, self.mask = range(size - 5, size)
        self.specials = frozenset(range(size - 5, size))
        self.ordinary = np.arange(size - 5)

    def encode(self, text: str) -> list[int]:
        """The id of every letter."""
        return [ord(letter) % len(self.ordinary) for letter in text]

    def decode(self, ids: list[int]) -> str:
        """The first letter of every id."""
        return "".join(map(chr, ids))

    def piece(self, number: int) -> str:
        """The first letter of the id."""
        return chr(number)

    def starts_word(self, number: int) -> bool:
        """Every piece does."""
        return True


class Samples:
    """A dataset of samples with all that the model reads.

    full: texts fill their rows, the images the model's side; else texts are of many lengths.
    """

    samples = 64

    def __init__(self, reads: Reads, full: bool) -> None:
        self.reads, self.full = reads, full

    def fetch(self, number: int) -> Sample:
        """The sample of that number."""
        draw, reads = np.random.default_rng(number), self.reads
        codes = draw.integers(reads.codes.codebook, size=reads.codes.count).astype(np.uint16) if reads.codes else None
        image, texts = self._image(draw), self._texts(draw, number)
        label = number % reads.classes if reads.classes else None
        return Sample(number, 0, number, f"k{number}", image=image, texts=texts, label=label, codes=codes)

    def _image(self, draw: np.random.Generator) -> bytes:
        side = self.reads.pixels.side if self.reads.pixels else 1
        done, file = cv2.imencode(".png", draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        assert done
        return file.tobytes()

    def _texts(self, draw: np.random.Generator, number: int) -> tuple[str, ...]:
        room = self.reads.text.context if self.reads.text else 1
        lengths = (room, room) if self.full else (1 + 7 * number % room, 1 + 5 * number % room)
        return tuple("".join(map(chr, draw.integers(0x4E00, 0x9000, length))) for length in lengths)


def batch_of(config: RunConfig, rows: int, first: int = 0, full: bool = False) -> "Batch":
    """The batch that the run's inputs make of so many samples from number `first` on, in the first turn of step 0."""
    import torch

    from pretrain.tasks import TASKS

    reads = config.model.reads
    stream: Any = Samples(reads, full)
    tokenizer = Letters(reads.text.vocab_size) if reads.text else None
    inputs = TASKS[config.task.kind].inputs(config, stream, tokenizer)
    batch: Batch = inputs([stream.fetch(number) for number in range(first, first + rows)])
    return batch | {"step": torch.tensor(0), "turn": torch.tensor(0)}


def task_of(config: RunConfig, collectives: Any = None) -> "Task":
    """The task around its model with initial weights of seed 0, in training, with recompute if the run has it."""
    import torch

    from pretrain.models import MODELS
    from pretrain.models.layers import recompute
    from pretrain.models.noise import name_noise
    from pretrain.tasks import TASKS
    from pretrain.tasks.collectives import ONE_DEVICE

    torch.manual_seed(0)
    model = MODELS[config.model.kind](config.model)
    name_noise(model)
    if config.train.recompute:
        recompute(model)
    return TASKS[config.task.kind](model, config.task, collectives or ONE_DEVICE).train()
