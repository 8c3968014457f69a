"""What earlier versions saved is read as what it was: a vqgan of before `norm_groups` keeps its groups and codes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, load_settings
from pretrain.checkpoint.identity import check_identity, identity
from pretrain.checkpoint.trained import run_config
from pretrain.config import RunConfig, load_run
from pretrain.inputs.image_tokenizer import tokenizer_id
from pretrain.interchange.folder import export_model, load_model
from pretrain.models.vqgan import Vqgan
from pretrain.schema.saved import saved_fingerprints, saved_model, saved_run
from pretrain.schema.vqgan import VqganConfig

SIZES: dict[str, Any] = {
    "kind": "vqgan", "image_size": 16, "multipliers": (1, 2), "res_blocks": 1, "attention_at": (),
    "latent_channels": 8, "codebook_size": 20, "code_width": 4, "discriminator_layers": 1,
}  # fmt: skip


def run_tree(channels: int, **model: Any) -> dict[str, Any]:
    return {
        "run": "unused", "model": SIZES | {"channels": channels} | model,
        "task": {"kind": "reconstruction", "discriminator_weight": 0},
        "data": {"dataset": "unused"}, "train": {"steps": 2, "global_batch": 2, "zero_stage": 0}, "optim": {"lr": 1.0},
    }  # fmt: skip


def run_of(channels: int, **model: Any) -> RunConfig:
    return check_settings(RunConfig, run_tree(channels, **model), "test")


def of_before(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree as it was saved when there was no such field."""
    return tree | {"model": {key: value for key, value in tree["model"].items() if key != "norm_groups"}}


@pytest.mark.parametrize(("channels", "groups"), [(16, "width/4"), (64, "width/4"), (96, "width/4"), (128, 32)])
def test_a_saved_vqgan_has_the_groups_that_it_was_trained_with(channels: int, groups: Any, tmp_path: Path) -> None:
    config = run_of(channels, norm_groups=groups)
    (tmp_path / "config.json").write_text(json.dumps(of_before(config.model_dump(mode="json"))))
    assert run_config(tmp_path).model == config.model
    folder = export_model(tmp_path / "exported", config.model, Vqgan(config.model).state_dict())
    (folder / "config.json").write_text(json.dumps(of_before({"model": config.model.model_dump(mode="json")})))
    model, read = load_model(folder)
    assert read == config.model
    counts = {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert counts and all(count == min(32, width // 4) for width, count in counts.items())


def test_a_checkpoint_of_before_goes_on_under_its_groups_and_no_others() -> None:
    saved = of_before(identity(run_of(64, norm_groups="width/4")))
    check_identity(saved, run_of(64, norm_groups="width/4"), "there")
    with pytest.raises(ConfigError, match="model.norm_groups: 'width/4' saved, 32 now"):
        check_identity(saved, run_of(64), "there")
    for channels in (16, 128):  # the same YAML as before
        check_identity(of_before(identity(run_of(channels))), run_of(channels), "there")


def id_of_before(model: Vqgan) -> str:
    """The digest of configuration and weights that named codes before the field."""
    tree = of_before({"model": model.config.model_dump(mode="json")})["model"]
    digest = hashlib.sha256(f"{json.dumps(tree, sort_keys=True, ensure_ascii=False)} rgb/127.5-1 fp32".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


@pytest.mark.parametrize(("channels", "groups"), [(16, "width/4"), (64, "width/4"), (64, 32), (128, 32), (128, 16)])
def test_codes_keep_their_id_where_the_groups_are_those_of_before(channels: int, groups: Any) -> None:
    model = Vqgan(VqganConfig(**SIZES, channels=channels, norm_groups=groups))
    as_before = groups == "width/4" or (channels, groups) == (128, 32)
    assert (tokenizer_id(model, "fp32") == id_of_before(model)) == as_before


ATTENTION: list[tuple[list[Any], list[Any]]] = [
    ([], []), ([16], [16]), ([8, 16], [8, 16]), ([99, 8], [8]), ([99], ["middle"]), ([7, 0], ["middle"]),
    (["middle"], ["middle"]), ([8, "middle"], [8, "middle"]),
]  # fmt: skip


@pytest.mark.parametrize(("saved", "now"), ATTENTION)
def test_a_run_of_before_keeps_the_attention_that_it_has(saved: list[Any], now: list[Any], tmp_path: Path) -> None:
    """Sides that no level has were taken; alone they gave the middle blocks attention."""
    tree = run_tree(16, attention_at=saved)
    wanted = run_of(16, attention_at=now)
    (tmp_path / "config.json").write_text(json.dumps(wanted.model_dump(mode="json") | {"model": tree["model"]}))
    assert run_config(tmp_path).model == wanted.model
    check_identity(
        identity(wanted) | {"model": wanted.model.model_dump(mode="json") | {"attention_at": saved}}, wanted, ""
    )
    before = VqganConfig(**SIZES | {"channels": 16, "attention_at": saved})
    assert list(Vqgan(before).state_dict()) == list(Vqgan(wanted.model).state_dict())


def test_a_side_that_is_left_out_is_that_of_before(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "attention_at"} | {"channels": 16, "image_size": 8}
    now = VqganConfig(**sizes)
    assert now.attention_at == ("middle",)
    model = Vqgan(now)
    before = Vqgan(VqganConfig(**sizes, attention_at=(16,)))
    before.load_state_dict(model.state_dict())
    assert tokenizer_id(model, "fp32") == tokenizer_id(before, "fp32")
    assert VqganConfig(**sizes | {"image_size": 32}).attention_at == (16,)


def test_an_export_of_before_keeps_its_id(tmp_path: Path) -> None:
    config = VqganConfig(**SIZES | {"channels": 16, "attention_at": (99,)})
    model = Vqgan(config)
    read, _ = load_model(export_model(tmp_path / "exported", config, model.state_dict()))
    assert tokenizer_id(read, "fp32") == tokenizer_id(model, "fp32")


@pytest.mark.parametrize("recipe", ["demo/vqgan.yaml", "small/vqgan.yaml"])
def test_the_narrow_recipes_say_their_groups(recipe: str, repository: Path) -> None:
    assert load_settings(RunConfig, repository / "configs" / recipe).model.norm_groups == "width/4"
    assert "norm_groups" in (repository / "configs" / recipe).read_text()


@pytest.mark.parametrize("tree", [None, [], "vqgan", {}, {"kind": "other"}, {"kind": ["vqgan"]}, {"kind": 3}])
def test_what_is_no_saved_model_is_left_to_the_schema(tree: Any) -> None:
    assert saved_model(tree) == tree
    assert saved_model({"kind": "vqgan", "channels": "many"})["channels"] == "many"


@pytest.mark.parametrize("recipe", ["demo/clip.yaml", "small/bert.yaml", "demo/electra.yaml", "demo/gpt.yaml"])
def test_a_checkpoint_of_before_activations_and_epsilons_goes_on(recipe: str, repository: Path) -> None:
    config = load_settings(RunConfig, repository / "configs" / recipe)
    saved = identity(config)
    new = {"norm_eps"} if config.model.kind == "clip" else {"activation", "norm_eps"}
    before = saved | {"model": {key: value for key, value in saved["model"].items() if key not in new}}
    assert new < saved["model"].keys()
    check_identity(before, config, "there")
    other = config.model_copy(update={"model": config.model.model_copy(update={"norm_eps": 0.1})})
    with pytest.raises(ConfigError, match=r"model\.norm_eps: 1e-\d+ saved, 0\.1 now"):
        check_identity(before, other, "there")


def test_the_names_of_before_are_translated_in_sections_fields_and_fingerprints() -> None:
    before = {
        "objective": {"kind": "mlm", "nsp": True}, "data": {"vocabulary": "v", "tokenizer": "t", "dataset": "d"},
        "fingerprints": {"data.vocabulary": "a", "data.tokenizer": "b", "data.dataset": "c"},
    }  # fmt: skip
    now = {
        "task": {"kind": "mlm", "nsp": True}, "data": {"text_tokenizer": "v", "image_tokenizer": "t", "dataset": "d"},
        "fingerprints": {"data.vocabulary": "a", "data.tokenizer": "b", "data.dataset": "c"},
    }  # fmt: skip
    assert saved_run(before) == now and saved_run(now) == now
    known = {"data.text_tokenizer": "a", "data.image_tokenizer": "b", "data.dataset": "c"}
    assert saved_fingerprints(before["fingerprints"]) == known == saved_fingerprints(known)


@pytest.mark.parametrize("nonsense", [None, 3, [], {"data": 3}, {"data": None}, {"objective": []}, {3: 4}])
def test_what_is_no_configuration_is_left_for_the_schema_to_refuse(nonsense: Any) -> None:
    if isinstance(nonsense, dict):
        assert list(saved_run(nonsense).values()) == list(nonsense.values())


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("objective.nsp=false", "task"),
        ("data.vocabulary=v", "data.text_tokenizer"),
        ("data.tokenizer=t", "data.image_tokenizer"),
    ],
)
def test_a_name_of_before_is_refused_with_the_present_one(override: str, now: str) -> None:
    with pytest.raises(ConfigError, match=f"renamed to {now}"):
        load_settings(RunConfig, "configs/small/bert.yaml", [override])


def test_the_configuration_that_an_earlier_version_saved_is_read_wherever_a_configuration_is_named(
    tmp_path: Path,
) -> None:
    """As a run's config.json it is translated; the same text in a file of the user's own is refused."""
    tree = load_settings(RunConfig, "configs/small/electra.yaml").model_dump(mode="json")
    now = check_settings(RunConfig, tree, "test")
    tree["objective"] = tree.pop("task")
    tree["data"]["vocabulary"] = tree["data"].pop("text_tokenizer")
    tree["data"]["tokenizer"] = tree["data"].pop("image_tokenizer")
    for name in ("config.json", "mine.json"):
        (tmp_path / name).write_text(json.dumps(tree | {"fingerprints": {"data.vocabulary": "a" * 64}}))
    assert load_run(tmp_path / "config.json", []) == now
    assert load_run(tmp_path / "config.json", ["data.text_tokenizer=v"]).data.text_tokenizer == "v"
    with pytest.raises(ConfigError, match="objective: renamed to task"):
        load_run(tmp_path / "mine.json", [])
