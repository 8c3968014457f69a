"""Which settings bind a checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from pretrain.checkpoint.identity import FREE_TO_CHANGE, check_identity, identity
from tests.pretrain.checkpoint.simulated import config_of


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
        ("tracking", "uri", "elsewhere", False),
    ],
)
def test_only_settings_that_decide_what_is_computed_bind_a_checkpoint(
    section: str, key: str, value: Any, differs: bool, tmp_path: Path
) -> None:
    before = config_of(tmp_path)
    after = before.model_copy(update={section: getattr(before, section).model_copy(update={key: value})})
    if differs:
        with pytest.raises(ConfigError, match=f"{section}.{key}: .* saved, .* now"):
            check_identity(identity(before), identity(after), "there")
    else:
        check_identity(identity(before), identity(after), "there")


def test_every_setting_said_to_be_free_exists(tmp_path: Path) -> None:
    tree = config_of(tmp_path).model_dump()
    for section, keys in FREE_TO_CHANGE.items():
        assert section in tree
        assert set(keys or ()) <= set(tree[section] or ())
