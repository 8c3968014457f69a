"""Every layout there and back, OpenAI's against its published names, refusals, and the exported folder."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import DataError
from pretrain import schema as C
from pretrain.interchange.folder import export_model, load_model
from pretrain.interchange.hub import export_layout
from pretrain.interchange.layouts import LAYOUTS, export_state, import_state
from pretrain.models import MODELS
from pretrain.schema.clip import TextTower, VisionTower
from tests.families import PAIRS

CASES = [
    (name, config)
    for name, layout in LAYOUTS.items()
    for config in (family.config(family.public).model for family in PAIRS.values())
    if layout.kind == config.kind and all(getattr(config, field) == value for field, value in layout.fixed.items())
]
TINY = {name: family.config().model for name, family in PAIRS.items()}
TOWER: dict[str, Any] = {"vocab_size": 50, "context": 8, "layers": 2, "width": 16, "heads": 2}
CLIP = C.ClipConfig(
    vision=VisionTower(image_size=8, patch_size=4, width=16, layers=2, heads=2), text=TextTower(**TOWER), embed_dim=8
)
BERT = C.BertConfig(**TOWER, embedding_width=16)


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
    ours = weights(CLIP)
    theirs = export_state("openai-clip", CLIP, ours)
    assert theirs["visual.transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    assert torch.equal(theirs["text_projection"], ours["text.project.weight"].T)
    assert theirs["visual.proj"].shape == (16, 8) and theirs["logit_scale"].shape == ()


WIDE = CLIP.model_copy(
    update={"vision": VisionTower(image_size=8, patch_size=4, width=128, layers=2, heads=2),
            "text": TextTower(**TOWER | {"width": 128})}
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "config", "said"),
    [
        ("openai-clip", CLIP, "have vision.heads=0.25, the configuration has vision.heads=2"),
        ("openai-clip", WIDE.model_copy(update={"vision": WIDE.vision.model_copy(update={"heads": 4})}),
         "have vision.heads=2, the configuration has vision.heads=4"),
        ("openai-clip", WIDE.model_copy(update={"text": WIDE.text.model_copy(update={"heads": 1})}),
         "have text.heads=2, the configuration has text.heads=1"),
        ("openai-clip", WIDE.model_copy(update={"norm_eps": 1e-3}), "have norm_eps=1e-05, .*norm_eps=0.001"),
        ("transformers-bert", BERT.model_copy(update={"embedding_width": 12}),
         "have embedding_width=16, the configuration has embedding_width=12"),
    ],
)  # fmt: skip
def test_an_export_that_its_layout_cannot_express_is_refused_by_name(
    layout: str, config: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"programs of layout '{layout}' {said}"):
        export_layout(tmp_path / "out", layout, config, weights(config))
    assert not (tmp_path / "out").exists()


def test_a_vqgan_without_attention_in_the_middle_is_none_of_taming(tmp_path: Path) -> None:
    config = C.VqganConfig(image_size=8, channels=32, multipliers=(1, 2), res_blocks=1, attention_at=(), norm_groups=32)
    with pytest.raises(DataError, match="attention_at"):
        export_layout(tmp_path / "out", "taming-vqgan", config, weights(config))
    config = config.model_copy(update={"attention_at": ("middle",)})
    assert (export_layout(tmp_path / "out", "taming-vqgan", config, weights(config)) / "model.safetensors").is_file()


def pooled_by_argmax(weights: dict[str, Tensor], tokens: Tensor, heads: int) -> Tensor:
    """OpenAI's `encode_text` over weights of its layout, pooled at the largest id: int64 [B, S] -> [B, E], length 1."""
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: tokens.shape[1]]
    hidden = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    for number in range(sum(name.startswith("transformer.") and name.endswith("ln_1.bias") for name in weights)):
        own = {
            k.split(f"resblocks.{number}.")[1]: v
            for k, v in weights.items()
            if k.startswith(f"transformer.resblocks.{number}.")
        }
        normed = layer_norm(x, own, "ln_1")
        q, k, v = (normed @ own["attn.in_proj_weight"].T + own["attn.in_proj_bias"]).chunk(3, -1)
        mixed = []
        for a, b, c in zip(*(part.chunk(heads, -1) for part in (q, k, v)), strict=True):
            mixed.append((a @ b.transpose(1, 2) / a.shape[-1] ** 0.5 + hidden).softmax(-1) @ c)
        x = x + torch.cat(mixed, -1) @ own["attn.out_proj.weight"].T + own["attn.out_proj.bias"]
        inner = layer_norm(x, own, "ln_2") @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"]
        x = x + (inner * torch.sigmoid(1.702 * inner)) @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
    pooled = layer_norm(x, weights, "ln_final")[torch.arange(len(x)), tokens.argmax(-1)] @ weights["text_projection"]
    return pooled / pooled.norm(dim=-1, keepdim=True)


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


@pytest.mark.parametrize("end", [3, 45])
def test_an_exported_openai_clip_pools_at_our_end_of_text(
    end: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Among them a text with every id, one that is cut at the context, and an empty one."""
    config, model = WIDE, MODELS["clip"](WIDE).eval()
    torch.nn.init.normal_(model.text.word.weight), torch.nn.init.normal_(model.text.positions)
    folder = export_layout(
        tmp_path / "out", "openai-clip", config, model.state_dict(), tokenizer=cast(Any, SimpleNamespace(sep=end))
    )
    theirs, told = load_file(folder / "model.safetensors"), json.loads((folder / "token_ids.json").read_text())
    pieces = [[49, 4, 48], [7], [], [5, 6, 7, 8, 9, 10], [49, 49]]
    rows = [[2, *row, end] + [0] * (6 - len(row)) for row in pieces]
    tokens, eot = torch.tensor(rows), torch.tensor([len(row) + 1 for row in pieces])
    a, b = told["exchanged_ids"]
    mapped = tokens.where(tokens != a, -1).where(tokens != b, a).where(tokens != a, b)
    assert (a, b, told["end_of_text"]) == (end, 49, 49)
    assert f"the end of text is 49 there, not {end}" in capsys.readouterr().err
    with torch.no_grad():
        ours = model.text(tokens, eot)
        torch.testing.assert_close(pooled_by_argmax(theirs, mapped, config.text.heads), ours, rtol=1e-5, atol=1e-5)
        plain = pooled_by_argmax(export_state("openai-clip", config, model.state_dict()), tokens, config.text.heads)
    assert float((plain * ours).sum(-1).min()) < 0.9  # rows in our order are pooled at another place


def test_without_a_tokenizer_an_export_keeps_the_rows_and_names_no_token_ids(tmp_path: Path) -> None:
    """Weights that were imported, OpenAI's for example, come back as they were."""
    config, state = WIDE, weights(WIDE)
    folder = export_layout(tmp_path / "a", "openai-clip", config, state)
    theirs = load_file(folder / "model.safetensors")
    assert torch.equal(theirs["token_embedding.weight"], state["text.word.weight"])
    assert not (folder / "token_ids.json").exists()
    for layout, config in (("transformers-clip", WIDE), ("transformers-bert", BERT)):
        folder = export_layout(tmp_path / layout, layout, config, weights(config))
        assert "token_id" not in (folder / "config.json").read_text()


def test_an_end_of_text_that_transformers_takes_for_the_largest_id_is_refused(tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(pad=1, cls=0, sep=2)
    with pytest.raises(DataError, match="ends a text with id 2; .*use --format openai-clip"):
        export_layout(tmp_path / "out", "transformers-clip", WIDE, weights(WIDE), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    assert export_layout(tmp_path / "out", "openai-clip", WIDE, weights(WIDE), tokenizer=tokenizer).is_dir()


def test_tied_weights_that_differ_are_refused_and_left_out_ones_are_not() -> None:
    theirs = export_state("transformers-bert", BERT, weights(BERT))
    name = "cls.predictions.decoder.weight"
    with pytest.raises(DataError, match=f"{name} differs"):
        import_state("transformers-bert", BERT, {**theirs, name: theirs[name] + 1})
    theirs.pop(name)
    assert import_state("transformers-bert", BERT, theirs).keys() == weights(BERT).keys()


@pytest.mark.parametrize("config", TINY.values(), ids=list(TINY))
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
    folder = export_model(tmp_path, BERT, weights(BERT))
    (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        load_model(folder)


def test_a_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_model(tmp_path)
