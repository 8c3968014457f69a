"""Folders of transformers are imported as what they compute, or refused by the entry that our model cannot have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.foreign import LAYOUT_KINDS
from pretrain.checkpoint.verbs import import_
from pretrain.interchange.folder import load_model
from pretrain.interchange.foreign import GENERATION, NO_EFFECT, importable, read_layout
from pretrain.interchange.layouts import LAYOUTS
from tests.pretrain.interchange.test_parity import CASES, Case, assert_close, both, name_of, our_logits


def saved(case: Case, folder: Path) -> nn.Module:
    """The reference of the case, saved by transformers itself."""
    theirs, _, _ = both(case)
    parts = {"": theirs} if case.layout != "transformers-electra" else dict(theirs.named_children())
    for part, model in parts.items():
        model.save_pretrained(folder / part)
    return theirs.eval()


def edited(folder: Path, **entries: Any) -> None:
    """Change entries of config.json; a dot leads into a section, ... takes the entry away."""
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    for key, value in entries.items():
        section, _, name = key.rpartition("/")
        place = tree[section] if section else tree
        place.pop(name, None) if value is ... else place.update({name: value})
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_an_imported_folder_computes_what_transformers_computes(case: Case, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path / "theirs")
    model, config = load_model(import_(tmp_path / "theirs", tmp_path / "ours", case.layout))
    assert config.model_dump() == case.config.model_dump()
    logits, _ = case.logits(theirs, case.batch)
    with torch.no_grad():
        for mine, other in zip(our_logits(model, case.batch), logits, strict=True):
            assert_close(mine, other)


CLIP, BERT, ELECTRA, VIT = CASES[:4]


@pytest.mark.parametrize(
    ("case", "part", "entries"),
    [
        (BERT, "", {"hidden_act": "silu"}),
        (BERT, "", {"hidden_act": 7}),
        (BERT, "", {"intermediate_size": 48}),
        (BERT, "", {"position_embedding_type": "relative_key"}),
        (BERT, "", {"is_decoder": True}),
        (BERT, "", {"add_cross_attention": True}),
        (BERT, "", {"attention_probs_dropout_prob": 0.3}),
        (BERT, "", {"tie_word_embeddings": False}),
        (BERT, "", {"model_type": "roberta"}),
        (BERT, "", {"pruned_heads": {"0": [1]}}),
        (BERT, "", {"rope_theta": 10000.0}),
        (BERT, "", {"layer_norm_eps": -1.0}),
        (BERT, "", {"vocab_size": "50"}),
        (ELECTRA, "generator", {"hidden_act": "relu"}),
        (ELECTRA, "generator", {"num_attention_heads": 2}),
        (ELECTRA, "generator", {"layer_norm_eps": 1e-5}),
        (ELECTRA, "discriminator", {"position_embedding_type": "relative_key_query"}),
        (CLIP, "", {"vision_config/hidden_act": "gelu"}),
        (CLIP, "", {"text_config/hidden_act": "gelu_new"}),
        (CLIP, "", {"text_config/layer_norm_eps": 1e-3}),
        (CLIP, "", {"vision_config/num_channels": 1}),
        (CLIP, "", {"text_config/attention_dropout": 0.1}),
        (CLIP, "", {"vision_config/intermediate_size": 32}),
        (VIT, "", {"qkv_bias": False}),
        (VIT, "", {"attention_probs_dropout_prob": 0.1}),
        (VIT, "", {"image_size": [8, 8]}),
        (VIT, "", {"num_channels": 1}),
        (VIT, "", {"layer_norm_type": "rms"}),
        (CLIP, "", {"text_config_dict": {"num_attention_heads": 1, "hidden_act": "gelu"}}),
    ],
)
def test_what_our_model_cannot_have_is_refused_by_name(
    case: Case, part: str, entries: dict[str, Any], tmp_path: Path
) -> None:
    saved(case, tmp_path / "theirs")
    edited(tmp_path / "theirs" / part, **entries)
    name = next(iter(entries)).rpartition("/")[2]
    with pytest.raises(DataError, match="hidden_act=" if name == "text_config_dict" else f"{name}.*="):
        import_(tmp_path / "theirs", tmp_path / "ours", case.layout)
    assert not (tmp_path / "ours").exists()


def test_what_has_no_effect_or_is_transformers_own_default_is_taken(tmp_path: Path) -> None:
    saved(BERT, tmp_path)
    edited(tmp_path, num_beams=4, id2label={"0": "x"}, torch_dtype="float16", position_embedding_type="absolute")
    edited(tmp_path, pruned_heads={}, hidden_act=..., layer_norm_eps=..., type_vocab_size=..., model_type=...)
    assert read_layout(tmp_path, "transformers-bert")[0] == BERT.config


@pytest.mark.parametrize("case", [BERT, ELECTRA, CLIP, VIT], ids=name_of)
def test_the_defaults_are_those_of_transformers(case: Case) -> None:
    names = {"transformers-clip": "CLIP", "transformers-vit": "ViT"}
    kind = names.get(case.layout, case.config.kind.capitalize())
    theirs = getattr(transformers, f"{kind}Config")().to_dict()
    hub = LAYOUTS[case.layout].hub
    assert hub and case.layout in importable()
    for name, value in hub.defaults.items():
        own = value.items() if isinstance(value, dict) else [(None, value)]
        assert all((theirs[name][key] if key else theirs[name]) == default for key, default in own), name
    assert not NO_EFFECT & GENERATION and not NO_EFFECT & set(hub.fields.values())


def test_weights_that_are_not_of_their_configuration_are_refused(tmp_path: Path) -> None:
    saved(BERT, tmp_path)
    edited(tmp_path, vocab_size=60)
    with pytest.raises(DataError, match=r"embeddings.word.weight has shape \[50, 16\], \[60, 16\] by its config.json"):
        read_layout(tmp_path, "transformers-bert")
    edited(tmp_path, vocab_size=50)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "pooler" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(DataError, match="2 missing: bert.pooler.dense"):
        read_layout(tmp_path, "transformers-bert")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"hidden_size": [1]}', '{"num_hidden_layers": 1e400}', "[" * 9000]
)
def test_a_broken_configuration_is_told_in_a_line(text: str, tmp_path: Path) -> None:
    saved(BERT, tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match="config.json"):
        read_layout(tmp_path, "transformers-bert")


def test_a_layout_without_a_configuration_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transformers-gpt2 cannot be imported; use transformers-bert"):
        read_layout(tmp_path, "transformers-gpt2")
    with pytest.raises(DataError, match="No such file"):
        read_layout(tmp_path, "transformers-clip")


def test_a_hint_to_import_names_the_kinds_that_can_be() -> None:
    assert {LAYOUTS[layout].kind for layout in importable()} == set(LAYOUT_KINDS)
