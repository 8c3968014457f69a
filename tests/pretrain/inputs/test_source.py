"""What a run opens: its tokenizers fit its model, whatever the family."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from pretrain.config import RunConfig
from pretrain.inputs.source import open_data
from tests.pretrain.commands import Material, clip, electra


@pytest.mark.parametrize(
    ("family", "field"), [(electra, "model.vocab_size"), (clip, "model.text.vocab_size")], ids=["encoder", "tower"]
)
def test_a_text_tokenizer_beyond_the_model_is_refused_with_the_field_to_raise(
    family: Any, field: str, material: Material, tmp_path: Path
) -> None:
    tree = family(material, tmp_path / "run")
    section = tree["model"]["text"] if family is clip else tree["model"]
    stream, tokenizer = open_data(check_settings(RunConfig, tree, "test"))
    assert tokenizer is not None and (stream.samples, tokenizer.size) == (200, 200)
    section["vocab_size"] = 199
    with pytest.raises(ConfigError, match=f"has 200 pieces, the model has 199; raise {field} or train a smaller"):
        open_data(check_settings(RunConfig, tree, "test"))
