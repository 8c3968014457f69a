"""Images from text: what is written, that a seed decides, and that parts which do not fit are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data_pipeline.errors import ConfigError
from pretrain import generate
from pretrain.config import GptConfig, RunConfig, VqganConfig
from pretrain.interchange.folder import export_model
from pretrain.interchange.tokenizer import VqganTokenizer
from pretrain.models.gpt import Gpt
from pretrain.models.vqgan import Vqgan

GPT = GptConfig(text_vocab=9, image_vocab=12, text_tokens=4, image_tokens=16, layers=1, width=16, heads=2)
VQGAN = VqganConfig(
    image_size=8, channels=8, multipliers=(1, 2), res_blocks=1, attention_at=(),
    latent_channels=8, codebook_size=12, code_width=4,
)  # fmt: skip


class Words:
    """A vocabulary of word lengths."""

    pad, size = 0, 9

    def __init__(self, path: str = "") -> None:
        self.path = path

    def encode(self, text: str) -> list[int]:
        return [min(4 + len(word), 8) for word in text.split()]


def parts() -> tuple[Gpt, VqganTokenizer, Any]:
    torch.manual_seed(0)
    return Gpt(GPT), VqganTokenizer(Vqgan(VQGAN)), Words()


def test_images_are_a_function_of_seed_and_index_and_not_of_the_batch(monkeypatch):
    prompts = ["a", "bb ccc", "a", "dddd", "a"]
    whole = generate.generate_images(*parts(), prompts, guidance=2.0, seed=3)
    monkeypatch.setattr(generate, "BATCH", 2)
    assert np.array_equal(generate.generate_images(*parts(), prompts, guidance=2.0, seed=3), whole)
    assert not np.array_equal(generate.generate_images(*parts(), prompts, guidance=2.0, seed=4), whole)
    assert whole.shape == (5, 8, 8, 3) and whole.dtype == np.uint8 and not np.array_equal(whole[0], whole[2])


def test_the_model_comes_back_in_the_mode_it_was_given():
    gpt, tokenizer, words = parts()
    generate.generate_images(gpt.train(), tokenizer, words, ["a"])
    assert gpt.training


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose loading is replaced by an untrained model."""
    gpt, tokenizer, _ = parts()
    export_model(tmp_path / "tokenizer", VQGAN, tokenizer.model.state_dict())
    config = RunConfig.model_validate({
        "run": str(tmp_path), "model": GPT.model_dump(), "objective": {"kind": "autoregressive"},
        "data": {"dataset": "d", "vocabulary": "v", "tokenizer": str(tmp_path / "tokenizer")},
        "train": {"steps": 1, "global_batch": 1}, "optim": {"lr": 1e-3},
    })  # fmt: skip
    monkeypatch.setattr(generate, "load_trained", lambda run: (gpt, config))
    monkeypatch.setattr(generate, "Vocabulary", Words)
    return tmp_path


def test_a_grid_and_every_image_are_written_with_their_prompt(run, capsys):
    paths = generate.main(str(run), "a big 红色 ring", 3, None)
    assert capsys.readouterr().out.split("\n")[:4] == [str(path) for path in paths]
    assert len(paths) == 4 and all(path.parent == run / "samples" for path in paths)
    assert Image.open(paths[1]).size == (8, 8) and Image.open(paths[0]).size > (300, 300)
    assert all(Image.open(path).text["prompt"] == "a big 红色 ring" for path in paths)


def test_the_asked_folder_is_used(run):
    assert all(path.parent == run / "there" for path in generate.main(str(run), "a", 1, str(run / "there")))


@pytest.mark.parametrize("wrong", [{"count": 0}, {"temperature": -1.0}, {"top_k": -1}])
def test_impossible_requests_are_refused(run, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate.main(str(run), "a", **{"count": 1, **wrong})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_tokens": 9}, "image_tokens=9, tokenizer .* has 16"),
        ({"image_vocab": 10}, "image_vocab=10, tokenizer .* has 12"),
        ({"text_vocab": 8}, "vocabulary has 9 pieces, the model text_vocab=8"),
    ],
)
def test_parts_that_were_not_made_for_each_other_are_refused(change, message):
    _, tokenizer, words = parts()
    with pytest.raises(ConfigError, match=message):
        generate.check_fit(Gpt(GPT.model_copy(update=change)), tokenizer, words)


def test_a_grid_has_room_for_every_image():
    images = np.zeros((5, 8, 8, 3), np.uint8)
    grid = np.array(generate.labelled_grid(images, ["a label"] * 5, columns=3))
    assert (grid == 0).all(-1).sum() >= 5 * 160 * 160


@pytest.mark.parametrize(
    ("label", "width", "lines"),
    [("", 160, 1), ("a ring", 160, 1), ("a small purple diamond at the top left on black", 160, 2), ("i i i", 1, 2)],
)
def test_a_label_is_broken_between_words_and_cut_after_two_lines(label, width, lines):
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    broken = generate.label_lines(draw, label, width)
    assert len(broken) == lines and label.startswith(" ".join(broken))
    assert width == 1 or all(draw.textlength(line, font=generate.FONT) <= width for line in broken)
