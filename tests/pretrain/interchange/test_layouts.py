"""Every layout there and back, OpenAI's against its published names, refusals, and the exported folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from pretrain import config as C
from pretrain.interchange.folder import export_model, load_model
from pretrain.interchange.layouts import LAYOUTS, export_state, import_state
from pretrain.models import MODELS

TOWER: dict[str, Any] = {"vocab_size": 50, "context": 8, "layers": 2, "width": 16, "heads": 2}
CONFIGS = {
    "clip": C.ClipConfig(
        vision=C.VisionTower(image_size=8, patch_size=4, width=16, layers=2, heads=2),
        text=C.TextTower(**TOWER),
        embed_dim=8,
    ),
    "bert": C.BertConfig(**TOWER, embedding_width=16),
    "electra": C.ElectraConfig(**TOWER, embedding_width=12, generator_fraction=0.5),
}
CASES = [(name, CONFIGS[layout.kind]) for name, layout in LAYOUTS.items() if layout.kind in CONFIGS]


def weights(config: Any) -> dict[str, Tensor]:
    return MODELS[config.kind](config).state_dict()


@pytest.mark.parametrize(("layout", "config"), CASES)
def test_export_then_import_gives_the_same_tensors(layout: str, config: Any) -> None:
    ours = weights(config)
    back = import_state(layout, config, export_state(layout, config, ours))
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.mark.parametrize(("layout", "config"), CASES)
@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_key_too_few_or_too_many_is_named(layout: str, config: Any, change: str) -> None:
    theirs = export_state(layout, config, weights(config))
    name = next(iter(theirs)) if change == "missing" else "surprise.weight"
    theirs.pop(name) if change == "missing" else theirs.update({name: torch.zeros(1)})
    with pytest.raises(DataError, match=f"1 {change}: {name}"):
        import_state(layout, config, theirs)


def test_openai_names_and_orientation() -> None:
    ours = weights(CONFIGS["clip"])
    theirs = export_state("openai-clip", CONFIGS["clip"], ours)
    assert theirs["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    assert torch.equal(theirs["text_projection"], ours["text.project.weight"].T)
    assert theirs["visual.proj"].shape == (16, 8) and theirs["logit_scale"].shape == ()


def test_tied_weights_that_differ_are_refused_and_left_out_ones_are_not() -> None:
    theirs = export_state("transformers-bert", CONFIGS["bert"], weights(CONFIGS["bert"]))
    name = "cls.predictions.decoder.weight"
    with pytest.raises(DataError, match=f"{name} differs"):
        import_state("transformers-bert", CONFIGS["bert"], {**theirs, name: theirs[name] + 1})
    theirs.pop(name)
    assert import_state("transformers-bert", CONFIGS["bert"], theirs).keys() == weights(CONFIGS["bert"]).keys()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_an_exported_folder_loads_as_the_same_model(config: Any, tmp_path: Path) -> None:
    ours = weights(config)
    model, read = load_model(export_model(tmp_path / "out", config, ours))
    assert read == config and not model.training
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{}", "does not describe a model"),
        ("config.json", '{"model": {"kind": "bert"}}', "do not fit"),
        ("model.safetensors", "broken", "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(file: str, content: str, message: str, tmp_path: Path) -> None:
    folder = export_model(tmp_path, CONFIGS["bert"], weights(CONFIGS["bert"]))
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_model(folder)


def test_a_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_model(tmp_path)
