"""Codes from the command line: built, encoded and verified with an exported VQGAN, on a real Ray."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launchers import cli
from pretrain.config import RunConfig
from pretrain.inputs.image_tokenizer import load_tokenizer
from pretrain.inputs.source import codes_id
from pretrain.interchange.folder import export_model
from pretrain.models.vqgan import Vqgan
from pretrain.schema.vqgan import VqganConfig

pytestmark = [pytest.mark.real, pytest.mark.slow]

SMALL = VqganConfig(
    image_size=32, channels=16, multipliers=(1, 2, 2), res_blocks=1, attention_at=(),
    latent_channels=8, codebook_size=20, code_width=4,
)  # fmt: skip


def export(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = Vqgan(SMALL)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    export_model(folder, SMALL, model.state_dict())
    return folder


@pytest.fixture
def tessera(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """tessera(words) -> (exit code, the JSON it printed or what it said of an error)."""

    def call(*words: Any) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["tessera", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        said = capsys.readouterr()
        code = int(leaving.value.code or 0)
        return code, said.err if code else json.loads(said.out.splitlines()[-1])

    return call


def run_of(dataset: Path, tokenizer: Path) -> RunConfig:
    model = {"kind": "gpt", "text_vocab": 20, "image_vocab": 20, "text_tokens": 4, "image_tokens": 64}
    return RunConfig.model_validate(
        {
            "run": "r", "model": model, "task": {"kind": "autoregressive"},
            "data": {"dataset": str(dataset), "text_tokenizer": "v", "image_tokenizer": str(tokenizer)},
            "train": {"steps": 2, "global_batch": 2}, "optim": {"lr": 1e-3},
        }
    )  # fmt: skip


def test_a_build_that_names_a_tokenizer_has_codes_and_verify_tells_how_many_agree(tessera: Any, tmp_path: Path) -> None:
    tokenizer, other = export(tmp_path / "tokenizer", 0), export(tmp_path / "other", 1)
    tree = {"source": {"kind": "scenes", "count": 25}, "shard_size": 10, "output": str(tmp_path / "data")}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(tree))
    code, built = tessera("data", "build", tmp_path / "build.yaml", f"image_tokenizer={tokenizer}", "--json")
    assert (code, built["out"]) == (0, 25)
    code, report = tessera("data", "verify", tmp_path / "data", "--image-tokenizer", tokenizer, "--sample", 3, "--json")
    assert code == 0 and report["codes"] == [built["codes"]]
    assert report["agreement"]["samples"] == 9 and report["agreement"]["lowest"] == 1.0
    code, said = tessera("data", "verify", tmp_path / "data", "--image-tokenizer", other, "--json")
    assert code == 74 and "no codes of tokenizer" in said and built["codes"] in said


def test_codes_in_bf16_and_ten_crops_are_found_by_verify_and_by_a_run(tessera: Any, tmp_path: Path) -> None:
    tokenizer, data = export(tmp_path / "tokenizer", 0), tmp_path / "data"
    tree = {"source": {"kind": "scenes", "count": 12}, "shard_size": 10, "output": str(data)}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(tree))
    assert tessera("data", "build", tmp_path / "build.yaml", "--json")[0] == 0
    options = ["--image-tokenizer", tokenizer, "--precision", "bf16", "--crops", 10, "--json"]
    code, meta = tessera("data", "encode", data, *options)
    assert (code, meta["crops"], meta["shards"][0]["bytes"]) == (0, 10, 10 * 10 * 64 * 2)
    assert meta["tokenizer"] == load_tokenizer(tokenizer, "bf16").id != load_tokenizer(tokenizer, "fp32").id
    run = run_of(data, tokenizer)
    assert run.model.reads.codes and codes_id(run, run.model.reads.codes) == meta["tokenizer"]
    code, report = tessera("data", "verify", data, "--image-tokenizer", tokenizer, "--json")
    assert code == 0 and report["agreement"]["lowest"] > 0.99
    code, said = tessera("data", "encode", data, "--image-tokenizer", tokenizer, "--crops", 3)
    assert code == 64 and "crops=3" in said
