"""The demo's whole way with a few steps a stage, in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.pretrain.commands import held

TIMEOUT_S = 800
FIGURES = {
    "minutes", "images_in", "shards", "clip_retrieval_r1", "rtd_accuracy", "mlm_accuracy", "reconstruction_psnr",
    "codes_used", "prompt_accuracy", "shape_accuracy", "colour_accuracy", "resumed",
}  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.real
def test_quick_demo_goes_the_whole_way(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(repository / "configs")
    half_way = held(tmp_path / "runs/demo/gpt", 3, tmp_path / "go-on")
    ended = subprocess.run(
        [sys.executable, "-m", "launchers.demo", "--quick"],
        cwd=tmp_path, env=os.environ | half_way, text=True, timeout=TIMEOUT_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-5000:]
    demo = tmp_path / "runs/demo"
    summary = json.loads((demo / "summary.json").read_text())
    assert summary.keys() >= FIGURES
    assert summary["images_in"] == 400 and summary["shards"] == 2
    resumed = summary["resumed"]
    assert 0 < resumed["from_step"] <= resumed["killed_at_step"] < resumed["to_step"]
    for picture in ("gpt/samples/evaluation-prompts.png", "vqgan/samples/evaluation-reconstructions.png"):
        assert Image.open(demo / picture).width > 0
