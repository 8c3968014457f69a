"""Every dial is listed, every recipe validates and says what it is."""

import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import BuildConfig
from data_pipeline.settings import Settings, load_settings
from data_pipeline.text.config import VocabConfig
from launchers.pipeline import PipelineConfig
from launchers.spec import KubernetesCluster, LocalCluster, SlurmCluster
from pretrain.config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]
FIELDS = REPOSITORY / "tests/architecture/config_fields.txt"
WRITE = "TESSERA_WRITE_FIELDS=1 .venv/bin/python -m pytest tests/architecture/test_configuration.py"
ROOTS: dict[str, type[Settings]] = {
    "build": BuildConfig,
    "vocab": VocabConfig,
    "run": RunConfig,
    "local": LocalCluster,
    "slurm": SlurmCluster,
    "kubernetes": KubernetesCluster,
    "pipeline": PipelineConfig,
}
CLUSTERS = {"local": LocalCluster, "slurm": SlurmCluster, "kubernetes": KubernetesCluster}
PUBLISHED = ("text_to_image", "clip", "text", "image_tokenizer")


def sections(annotation: Any) -> Iterator[type[Settings]]:
    """The Settings classes named anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for part in typing.get_args(annotation):
        yield from sections(part)


def fields(schema: type[Settings], path: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        below = list(sections(field.annotation))
        for section in below:
            kind = section.model_fields.get("kind")
            variant = f"[{'|'.join(typing.get_args(kind.annotation))}]" if kind is not None else ""
            yield from fields(section, f"{path}.{name}{variant}")
        if not below:
            yield f"{path}.{name}"


def test_every_field_of_the_configuration_is_listed() -> None:
    text = "".join(f"{line}\n" for root, schema in ROOTS.items() for line in sorted(set(fields(schema, root))))
    if os.environ.get("TESSERA_WRITE_FIELDS") == "1":
        FIELDS.write_text(text, encoding="utf-8")
    assert text == FIELDS.read_text(encoding="utf-8"), f"a dial came or went; if that is meant: {WRITE}"


def schema_of(path: Path) -> type[Settings]:
    """Which schema a file in configs/ is read with: by its folder, and for vocabularies by its name."""
    if path.parent.name == "cluster":
        return CLUSTERS[path.stem]
    if path.stem.startswith("vocab"):
        return VocabConfig
    text = path.read_text(encoding="utf-8")
    if "\nsteps:" in text:
        return PipelineConfig
    return BuildConfig if "\nsource:" in f"\n{text}" or path.parent.name == "data" else RunConfig


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_configuration_file_validates(path: Path) -> None:
    load_settings(schema_of(path), path)


@pytest.mark.parametrize(
    "path",
    [path for folder in PUBLISHED for path in sorted((REPOSITORY / "configs" / folder).glob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_published_recipe_says_what_it_is(path: Path) -> None:
    header = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert "# Paper:" in header or "# Source:" in header
    for entry in ("# Size:", "# Cost:", "# Result:", "# Run:"):
        assert entry in header
    assert str(path.relative_to(REPOSITORY)) in header


def test_published_recipes_state_their_number_of_parameters() -> None:
    import torch

    from pretrain.models import MODELS

    for folder in PUBLISHED:
        for path in (REPOSITORY / "configs" / folder).glob("*.yaml"):
            config = load_settings(RunConfig, path).model
            with torch.device("meta"):
                model = MODELS[config.kind](config)
            count = sum(parameter.numel() for parameter in model.parameters())
            assert f"{count:,} parameters" in path.read_text(encoding="utf-8"), f"{path.name}: {count:,}"


@pytest.mark.parametrize("nodes", [1, 2])
def test_published_recipes_fit_their_commands(nodes: int) -> None:
    for folder in PUBLISHED:
        for path in (REPOSITORY / "configs" / folder).glob("*.yaml"):
            assert load_settings(RunConfig, path).train.global_batch % (8 * nodes) == 0
