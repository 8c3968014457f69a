"""Which parameters of each recipe decay, held against its card: the published rule, stated over kinds of modules."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, load_settings
from pretrain.config import RunConfig
from pretrain.engine.optim import parameter_groups
from pretrain.models import MODELS
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE

NORMS = nn.LayerNorm | nn.GroupNorm
BLOCK = ("attention.qkv", "attention.out", "mlp.rise", "mlp.fall")
CLIP = {
    "vision.patch", "vision.positions", "vision.project", "text.word", "text.positions", "text.project",
    *(f"{tower}.blocks.*.{part}" for tower in ("vision", "text") for part in BLOCK),
}  # fmt: skip
TEXT = {"embeddings.word", "embeddings.position", "embeddings.segment", "mlm.transform"}
BERT = TEXT | {"pooler", "nsp"} | {f"encoder.blocks.*.{part}" for part in BLOCK}
TOWERS = ("discriminator", "generator")
ELECTRA = TEXT | {"rtd.transform", "rtd.out"} | {f"{tower}.blocks.*.{part}" for tower in TOWERS for part in BLOCK}
PARTS = ("attention.query", "attention.key", "attention.value", "attention.out", "rise", "fall")
GPT = {"head"} | {f"blocks.*.{part}" for part in PARTS}
VIT = {"patch", "head"} | {f"blocks.*.{part}" for part in BLOCK}
DECAY = {
    "clip/vit-b-32.yaml": (0.2, CLIP),
    "clip/vit-b-16.yaml": (0.2, CLIP),
    "clip/vit-b-16-sigmoid.yaml": (0.1, CLIP),
    "text/bert-base.yaml": (0.01, BERT),
    "text/electra-small.yaml": (0.01, ELECTRA | {f"{tower}.project" for tower in TOWERS}),
    "text/electra-base.yaml": (0.01, ELECTRA | {"generator.project"}),
    "text_to_image/pai-painter-base.yaml": (0.01, GPT),
    "text_to_image/pai-painter-large.yaml": (0.01, GPT),
    "text_to_image/pai-painter-base-en.yaml": (0.01, GPT),
    "text_to_image/pai-painter-large-en.yaml": (0.01, GPT),
    "vision/vit-b-16.yaml": (0.3, VIT),
    "image_tokenizer/vqgan-f16-16384.yaml": (0.0, set()),
}
"""Recipe -> its decay and every parameter that decays; a number between dots is a star."""


def objective_of(config: RunConfig) -> nn.Module:
    with torch.device("meta"):
        model = MODELS[config.model.kind](config.model)
        return TASKS[config.task.kind](model, config.task, ONE_DEVICE)


def decaying(objective: nn.Module, config: RunConfig) -> set[str]:
    """Names of the parameters whose group decays."""
    groups = parameter_groups(objective, config.optim)
    return {name for group in groups if group["weight_decay"] for name in group["names"]}


def kinds(objective: nn.Module) -> Iterator[tuple[str, str]]:
    """Every parameter's name, and what it is: norm, bias, linear or other."""
    for prefix, module in objective.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            kind = "norm" if isinstance(module, NORMS) else "bias" if name == "bias" else "other"
            yield f"{prefix}.{name}", "linear" if isinstance(module, nn.Linear) and kind == "other" else kind


def published(kind: str, objective: nn.Module) -> set[str]:
    """What decays by the family's card."""
    every = dict(kinds(objective))
    if kind == "gpt":  # weights of linear layers only
        return {name for name, what in every.items() if what == "linear"}
    if kind == "vqgan":  # nothing: Adam
        return set()
    if kind == "vit":  # kernels
        return {name for name, what in every.items() if name.endswith(".weight") and what != "norm"}
    spared = {"model.logit_scale", "model.logit_bias", "model.vision.class_token"}  # a gain; and as in open_clip
    return {name for name, what in every.items() if what in ("linear", "other") and name not in spared}


def test_every_published_recipe_is_in_the_table(repository: Path) -> None:
    folders = ("clip", "text", "text_to_image", "image_tokenizer", "vision")
    assert set(DECAY) == {
        str(p.relative_to(repository / "configs")) for f in folders for p in (repository / "configs" / f).glob("*")
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", DECAY)
def test_what_decays_is_what_its_card_says(recipe: str, repository: Path) -> None:
    config, (rate, listed) = load_settings(RunConfig, repository / "configs" / recipe), DECAY[recipe]
    objective = objective_of(config)
    found = decaying(objective, config)
    assert found == published(config.model.kind, objective)
    short = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removeprefix("model.").removesuffix(".weight") for name in found}
    assert short == listed and config.optim.weight_decay == rate


@pytest.mark.parametrize("recipe", ["demo/gpt.yaml", "small/gpt.yaml"])
def test_the_small_recipes_of_the_gpt_decay_every_matrix_and_say_so(recipe: str, repository: Path) -> None:
    path = repository / "configs" / recipe
    config = load_settings(RunConfig, path)
    objective = objective_of(config)
    assert decaying(objective, config) == published("gpt", objective) | {
        "model.embed.token.weight",
        "model.embed.position",
    }
    assert "embeddings and positions decay too" in path.read_text()


def test_a_pattern_that_is_no_regular_expression_is_refused(repository: Path) -> None:
    tree = load_settings(RunConfig, repository / "configs" / "demo" / "gpt.yaml").model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"optim.no_decay.*'\*bias' is not a regular expression"):
        check_settings(RunConfig, tree | {"optim": tree["optim"] | {"no_decay": ["*bias"]}}, "test")
