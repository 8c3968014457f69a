"""Which settings bind a checkpoint, what counts where it says nothing, and what may be changed with consent."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, override_settings
from pretrain.checkpoint.identity import (
    FREE_TO_CHANGE,
    check_identity,
    differences,
    identity,
    refuse_idle,
    unchecked,
)
from pretrain.config import OptimConfig, RunConfig, consented_keys
from tests.pretrain.checkpoint.simulated import config_of
from tests.pretrain.commands import Material, vqgan


def with_value(config: RunConfig, section: str, key: str, value: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})


@pytest.mark.parametrize(
    ("section", "key", "value", "differs"),
    [
        ("optim", "lr", 0.5, True),
        ("model", "layers", 3, True),
        ("train", "steps", 99, True),
        ("train", "global_batch", 99, False),
        ("train", "precision", "fp32", True),
        ("train", "zero_stage", 1, False),
        ("train", "micro_batch", 2, False),
        ("train", "checkpoints", "s3://elsewhere/x", False),
        ("train", "keep_best", "loss", False),
        ("data", "dataset", "elsewhere", False),
        ("data", "evaluation", "elsewhere", True),
        ("tracking", "uri", "elsewhere", False),
    ],
)
def test_only_settings_that_decide_what_is_computed_bind_a_checkpoint(
    section: str, key: str, value: Any, differs: bool, tmp_path: Path
) -> None:
    before = config_of(tmp_path)
    after = with_value(before, section, key, value)
    if differs:
        with pytest.raises(ConfigError, match=f"{section}.{key}: .* saved, .* now"):
            check_identity(identity(before), after, "there")
    else:
        assert check_identity(identity(before), after, "there") == {}


def test_every_setting_said_to_be_free_exists(tmp_path: Path) -> None:
    tree = config_of(tmp_path).model_dump()
    for section, keys in FREE_TO_CHANGE.items():
        assert section in tree
        assert set(keys or ()) <= set(tree[section] or ())


# ------------------------------------------------------------------------------------- schemas of other times


def leaves(tree: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found += leaves(value, (*above, key)) if isinstance(value, dict) else [(*above, key)]
    return found


def without(tree: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    first, *rest = place
    kept = {key: value for key, value in tree.items() if key != first}
    return kept | ({first: without(tree[first], tuple(rest))} if rest else {})


NOT_TRIED = ("kind", "lr", "steps", "norm_groups", "heads")


@pytest.mark.parametrize("kind", ["electra", "vqgan"])
def test_a_field_that_is_newer_than_the_checkpoint_counts_with_its_default(kind: str, tmp_path: Path) -> None:
    """Every field that has a default, taken out of the saved tree one by one, as if the schema had got it since.

    Not those without a default, `norm_groups`, which pretrain/translate.py knows, and those whose default this small
    model could not have.
    """
    trees = {"electra": config_of(tmp_path), "vqgan": None}
    config = trees[kind] or check_settings(RunConfig, vqgan(Material(Path("d"), Path("v")), tmp_path), "test")
    saved = identity(config)
    defaults = identity(
        check_settings(
            RunConfig,
            {
                "run": "r", "model": {"kind": kind}, "task": {"kind": config.task.kind},
                "data": {"dataset": "d", "text_tokenizer": "v"}, "optim": {"lr": 1.0},
                "train": {"steps": 1, "global_batch": 1, "zero_stage": 0},
            },
            "defaults",
        )
    )  # fmt: skip
    tried = 0
    for place in leaves(saved):
        if place[-1] in NOT_TRIED or place[0] == "deepspeed" or "roles" in place:
            continue
        now, default = saved, defaults
        for part in place:
            now, default = now[part], default[part]
        key, tried = ".".join(place), tried + 1
        expected = {} if now == default else {key: {"from": default, "to": now}}
        assert differences(without(saved, place), config) == expected
    assert tried > 20


def test_a_whole_section_that_is_newer_counts_with_its_defaults(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    saved = identity(config)
    assert "guards" not in saved and differences(without(saved, ("seed",)), config) == {}


def test_a_setting_that_the_schema_has_no_more_is_told(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    saved = identity(config)
    saved["model"]["rotary"] = True
    saved["sampler"] = {"kind": "old"}
    assert {key: change["to"] for key, change in differences(saved, config).items()} == {
        "model.rotary": None,
        "sampler.kind": None,
    }


def test_a_tree_that_the_schema_refuses_is_compared_as_it_stands(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    saved = identity(config)
    saved["optim"]["warmup_steps"] = 10**6
    assert differences(saved, config) == {"optim.warmup_steps": {"from": 10**6, "to": 2}}


# -------------------------------------------------------------------------------------------------- deepspeed


def with_extra(config: RunConfig, extra: dict[str, Any]) -> RunConfig:
    return with_value(config, "deepspeed", "extra", extra)


@pytest.mark.parametrize(
    ("extra", "differs"),
    [
        ({"gradient_clipping": 0.1}, ["deepspeed.extra.gradient_clipping"]),
        ({"torch_autocast": {"enabled": True}}, ["deepspeed.extra.torch_autocast.enabled"]),
        ({"prescale_gradients": True}, ["deepspeed.extra.prescale_gradients"]),
        ({"no_such_key": 1}, ["deepspeed.extra.no_such_key"]),
        (
            {"zero_optimization": {"zero_quantized_gradients": True, "stage3_prefetch_bucket_size": 9}},
            ["deepspeed.extra.zero_optimization.zero_quantized_gradients"],
        ),
        ({"zero_optimization": {"reduce_bucket_size": 9, "overlap_comm": False, "stage": 2}}, []),
        ({"wall_clock_breakdown": True, "steps_per_print": 3, "comms_logger": {"enabled": True}}, []),
    ],
)
def test_deepspeed_s_settings_bind_unless_they_only_log_or_split(
    extra: dict[str, Any], differs: list[str], tmp_path: Path
) -> None:
    plain, changed = config_of(tmp_path), with_extra(config_of(tmp_path), extra)
    assert list(differences(identity(plain), changed)) == list(differences(identity(changed), plain)) == differs
    assert differences(identity(changed), changed) == {}


def test_a_checkpoint_that_says_nothing_of_deepspeed_is_taken_and_that_is_told(tmp_path: Path) -> None:
    now = with_extra(config_of(tmp_path), {"gradient_clipping": 0.1})
    old = without(identity(now), ("deepspeed",))
    assert differences(old, now) == {}
    assert unchecked(old, now) == ["deepspeed.extra.gradient_clipping"] and unchecked(identity(now), now) == []
    assert unchecked(old, config_of(tmp_path)) == []


# ---------------------------------------------------------------------------------------------------- consent


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", 48),
        ("optim", "lr", 3e-4),
        ("optim", "schedule", "constant"),
        ("optim", "warmup_steps", 5),
        ("optim", "final_lr_fraction", 0.1),
        ("optim", "power", 2.0),
        ("optim", "decay_steps", 0.25),
        ("optim", "decay_shape", "linear"),
        ("optim", "cycles", 3),
        ("optim", "cycle_growth", 2),
        ("optim", "timescale_steps", 4),
        ("optim", "eps", 1e-6),
        ("optim", "weight_decay", 0.5),
        ("data", "evaluation", "heldout"),
    ],
)
def test_length_rate_schedule_optimizer_and_evaluation_change_with_consent_and_the_refusal_names_the_way(
    section: str, key: str, value: Any, tmp_path: Path
) -> None:
    before = config_of(tmp_path)
    after, name = with_value(before, section, key, value), f"{section}.{key}"
    with pytest.raises(ConfigError, match=f"to resume with the new value add --change {name}={value}"):
        check_identity(identity(before), after, "there")
    agreed = check_identity(identity(before), after, "there", consented_keys([f"{name}={value}"]))
    assert agreed == {name: {"from": getattr(getattr(before, section), key), "to": value}}


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("betas", (0.8, 0.99), "'optim.betas=[0.8, 0.99]'"),
        ("no_decay", (r"^task\.head", "b"), r"""'optim.no_decay=["^task\\.head", "b"]'"""),
        ("pieces", ((3, 0.5), (9, 0.1)), "'optim.pieces=[[3, 0.5], [9, 0.1]]'"),
    ],
)
def test_the_refusal_gives_lists_as_an_override_reads_them(key: str, value: Any, word: str, tmp_path: Path) -> None:
    before = config_of(tmp_path)
    after = with_value(before, "optim", key, value)
    with pytest.raises(ConfigError) as refusal:
        check_identity(identity(before), after, "there")
    assert f"add --change {word}\n" in str(refusal.value)
    [told] = shlex.split(word)
    assert getattr(override_settings(OptimConfig, {}, ["lr=1", told.removeprefix("optim.")], "test"), key) == value
    assert list(check_identity(identity(before), after, "there", consented_keys([told]))) == [f"optim.{key}"]


def test_consent_to_one_setting_is_none_to_another(tmp_path: Path) -> None:
    before = config_of(tmp_path)
    after = with_value(with_value(before, "optim", "lr", 0.5), "train", "steps", 48)
    with pytest.raises(ConfigError, match="train.steps: 24 saved, 48 now") as refusal:
        check_identity(identity(before), after, "there", frozenset({"optim.lr"}))
    assert "optim.lr:" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        "model.layers=3", "seed=1", "train.stepz=3", "optim.roles.lr=1", "train.precision=fp32", "data.dataset=d",
        "data.evaluations=d", "optim=1", "optim.roles={}", "task.kind=mlm", "",
    ],
)  # fmt: skip
def test_what_cannot_be_changed_is_refused_with_what_can(change: str) -> None:
    with pytest.raises(ConfigError, match=r"a run may change train.steps, optim.lr"):
        consented_keys([change])


def test_consent_to_evaluation_data_covers_those_of_every_name(tmp_path: Path) -> None:
    assert consented_keys(["data.evaluation.a=x", "optim.roles.judge.betas=[0,0]"]) == {
        "data.evaluation",
        "optim.roles.judge.betas",
    }
    before, after = config_of(tmp_path), with_value(config_of(tmp_path), "data", "evaluation", "heldout")
    old = without(identity(before), ("data", "evaluation"))
    assert differences(old, after) == {}, "an older checkpoint does not say"
    named = identity(before)
    named["data"]["evaluation"] = {"a": "x", "b": "y"}
    assert set(differences(named, after)) >= {"data.evaluation"}
    assert not any(key.startswith("data.evaluation.") for key in differences(named, after))


def idle(asked: str, now: RunConfig, *made: dict[str, Any], before: RunConfig) -> None:
    keys = consented_keys([asked])
    state = {"identity": identity(before), "changes": [{"step": 1, "settings": settings} for settings in made]}
    refuse_idle(keys, check_identity(state["identity"], now, "there", keys), state, now, "there")


def test_consent_to_a_change_that_is_none_is_refused_unless_a_restart_repeats_it(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for asked in ("optim.lr=0.001", "train.steps=24", "data.evaluation=", "optim.betas=[0.9, 0.95]"):
        with pytest.raises(ConfigError, match=f"--change {re.escape(asked)} changes nothing: there was made with this"):
            idle(asked, config, before=config)
    there, back = {"optim.lr": {"from": 0.5, "to": 1e-3}}, {"optim.lr": {"from": 1e-3, "to": 0.5}}
    idle("optim.lr=1e-3", config, there, before=config)
    idle("optim.lr=1e-3", config, back, there, before=config)
    with pytest.raises(ConfigError, match="changes nothing"):
        idle("optim.lr=1e-3", config, there, back, before=config)
    idle("optim.lr=0.5", with_value(config, "optim", "lr", 0.5), before=config)


def test_a_role_that_follows_the_main_optimizer_follows_its_change_too(tmp_path: Path) -> None:
    def config(rate: float, **role: Any) -> RunConfig:
        tree = vqgan(Material(Path("d"), Path("v")), tmp_path)
        return check_settings(RunConfig, tree | {"optim": {"lr": rate, "roles": {"discriminator": role}}}, "test")

    saved, consent = identity(config(1e-3, eps=1e-6)), frozenset({"optim.lr"})
    assert list(check_identity(saved, config(5e-4, eps=1e-6), "there", consent)) == [
        "optim.lr",
        "optim.roles.discriminator.lr",
    ]
    with pytest.raises(ConfigError, match=r"roles.discriminator.lr: 0.001 saved, 0.0007 now"):
        check_identity(saved, config(5e-4, eps=1e-6, lr=7e-4), "there", consent)
    own = frozenset({"optim.roles.discriminator.lr"})
    assert list(check_identity(saved, config(1e-3, eps=1e-6, lr=7e-4), "there", own)) == sorted(own)


def test_a_role_that_is_spelt_out_as_it_was_anyway_is_no_difference(tmp_path: Path) -> None:
    tree = vqgan(Material(Path("d"), Path("v")), tmp_path)
    plain = check_settings(RunConfig, tree | {"optim": {"lr": 1e-3}}, "test")
    spelt = check_settings(RunConfig, tree | {"optim": {"lr": 1e-3, "roles": {"discriminator": {"lr": 1e-3}}}}, "test")
    assert differences(identity(plain), spelt) == differences(identity(spelt), plain) == {}
