"""Images from text: what is written, that a seed decides, and that parts which do not fit are named."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data_pipeline.errors import ConfigError
from data_pipeline.text.kinds import open_tokenizer
from pretrain import generate
from pretrain.checkpoint.trained import Trained
from pretrain.config import RunConfig
from pretrain.inputs.image_tokenizer import VqganTokenizer
from pretrain.interchange.folder import export_model
from pretrain.models.gpt import Gpt
from pretrain.models.vqgan import Vqgan
from pretrain.schema.gpt import GptConfig
from pretrain.schema.vqgan import VqganConfig

GPT = GptConfig(text_vocab=9, image_vocab=12, text_tokens=4, image_tokens=16, layers=1, width=16, heads=2)
VQGAN = VqganConfig(
    image_size=8, channels=8, multipliers=(1, 2), res_blocks=1, attention_at=(),
    latent_channels=8, codebook_size=12, code_width=4,
)  # fmt: skip


class Words:
    """A vocabulary of word lengths."""

    pad, unk, size, fingerprint = 0, 1, 9, "words"

    def __init__(self, path: str = "") -> None:
        self.path = path

    def decode(self, ids: list[int]) -> str:
        return " ".join("x" * (number - 4) for number in ids if number > 4)

    def encode(self, text: str) -> list[int]:
        return [self.unk if word == "?" else min(4 + len(word), 8) for word in text.split()]


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
        "run": str(tmp_path), "model": GPT.model_dump(), "task": {"kind": "autoregressive"},
        "data": {"dataset": "d", "text_tokenizer": "v", "image_tokenizer": str(tmp_path / "tokenizer")},
        "train": {"steps": 1, "global_batch": 1}, "optim": {"lr": 1e-3},
    })  # fmt: skip
    monkeypatch.setattr(generate, "load_trained", lambda *_: Trained(gpt, config, 3))
    monkeypatch.setattr(generate, "check_files", lambda *_: None)
    monkeypatch.setattr(generate, "open_tokenizer", Words)
    return tmp_path


def test_a_grid_and_every_image_are_written_with_their_prompt(run, capsys):
    paths = generate.main(str(run), "a big 红色 ring", 3, None)
    assert capsys.readouterr().out.split("\n")[:4] == [str(path) for path in paths]
    assert len(paths) == 4 and all(path.parent == run / "samples" for path in paths)
    assert Image.open(paths[1]).size == (8, 8) and Image.open(paths[0]).size > (300, 300)
    assert all(Image.open(path).text["prompt"] == "a big 红色 ring" for path in paths)


def test_the_asked_folder_is_used(run):
    assert all(path.parent == run / "there" for path in generate.main(str(run), "a", 1, str(run / "there")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"guidance": math.nan},
        {"guidance": -math.inf},
        {"seed": -1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(run, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        generate.main(str(run), "a", **{"count": 1, **wrong})


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_draws(run, seed):
    assert len(generate.main(str(run), "a", 1, seed=seed)) == 2


def test_large_seeds_are_seeds_of_their_own():
    drawn = {generate.generate_images(*parts(), ["a"], seed=seed).tobytes() for seed in (2**63, 2**63 + 1, 2**64 - 1)}
    assert len(drawn) == 3


@pytest.mark.parametrize("prompt", ["𠀀𪜀", "𠀀" * 200, "🎈" * 300, "a/b/../c", "...", "\x00\n\t", "-", " ", ""])
def test_any_prompt_is_a_file_name(run, prompt):
    paths = generate.main(str(run), prompt, 1)
    assert all(path.parent == run / "samples" and path.is_file() for path in paths)
    assert Image.open(paths[1]).text["prompt"] == prompt


@pytest.mark.parametrize("broken", ["\udcff", "red \ud800 circle", os.fsdecode(b"caf\xe9")])
def test_a_prompt_that_is_no_utf_8_is_refused(run, broken):
    with pytest.raises(ConfigError, match="is not UTF-8"):
        generate.main(str(run), broken, 1)


# ------------------------------------------------------------------------------------------------- file names

PROMPTS = ["red circle?", "red, circle", "red circle", "red circle ", "Red circle", "🎈", "🎉", "é", "e\u0301"]
REQUESTS = [(prompt, generate.Sampling()) for prompt in PROMPTS] + [
    ("red circle", dataclasses.replace(generate.Sampling(), **{name: value}))
    for name, value in [("temperature", 0.5), ("top_k", 3), ("guidance", 2.0), ("guidance", 0.0), ("seed", 1)]
]


def test_another_prompt_or_setting_is_another_file():
    named = [generate.file_names(*request, ["model"], 2) for request in REQUESTS]
    named += [generate.file_names("red circle", generate.Sampling(), ["other model"], 2)]
    assert len({name.lower() for names in named for name in names}) == 3 * len(named)


def test_grids_of_other_counts_are_other_files_and_images_are_not():
    few, many = (generate.file_names("a", generate.Sampling(), [], count) for count in (2, 3))
    assert few[0] != many[0] and few[1:] == many[1:3]


@given(st.text(max_size=300), st.integers(0, 2**64 - 1), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_every_name_is_one_that_a_file_system_takes(prompt, seed, count):
    for name in generate.file_names(prompt, generate.Sampling(seed=seed), ["model"], count):
        assert len(name.encode()) <= 255 and "/" not in name and "\0" not in name and not name.startswith(".")


def test_nothing_is_overwritten_by_another_request(run):
    for prompt, sampling in REQUESTS:
        generate.main(str(run), prompt, 1, **dataclasses.asdict(sampling))
    assert len(list((run / "samples").iterdir())) == 2 * len(REQUESTS)
    generate.main(str(run), *REQUESTS[0][:1], 1)
    assert len(list((run / "samples").iterdir())) == 2 * len(REQUESTS)


# ------------------------------------------------------------------------------- what a request cannot do


@pytest.mark.parametrize(
    ("prompt", "guidance", "caption_drop", "said"),
    [
        ("xx yyy", 1.0, 0.0, []),
        ("xx yyy", 3.0, 0.1, []),
        ("xx yyy", 3.0, 0.0, ["guidance=3 needs a model trained with task.caption_drop"]),
        ("xx yyy", 0.0, 0.0, ["guidance=0 needs a model trained with task.caption_drop"]),
        ("xx yy x xx xxx", 1.0, 0.0, ["has 5 tokens, above the model's 4: it is truncated to"]),
        ("", 1.0, 0.0, ["the prompt is empty"]),
        ("? ?", 1.0, 0.0, ["all of it is [UNK]"]),
        ("xx ? yy", 1.0, 0.0, ["1 pieces of the prompt are [UNK]; the model reads 'xx xx'"]),
        ("? " * 9, 2.0, 0.0, ["all of it is [UNK]", "has 9 tokens, above the model's 4", "guidance=2 needs"]),
    ],
)
def test_what_a_request_cannot_do_is_said(prompt, guidance, caption_drop, said):
    found = generate.notes(prompt, Words(), 4, guidance, caption_drop)
    assert len(found) == len(said) and all(words in note for words, note in zip(said, found, strict=True))


def test_of_a_real_vocabulary_signs_that_it_lacks_are_told_from_words(material):
    vocabulary = open_tokenizer(material.vocabulary)
    assert generate.notes("a red circle", vocabulary, 64, 1.0, 0.0) == []
    for unknown in ("𠀀", "𠀀 𪜀", "🎈🎈"):
        (note,) = generate.notes(unknown, vocabulary, 64, 1.0, 0.0)
        assert "all of it is [UNK]" in note
    (note,) = generate.notes("a red 鰲 circle", vocabulary, 64, 1.0, 0.0)
    assert "1 pieces of the prompt are [UNK]" in note and "'a red" in note


def test_it_is_said_on_stderr_and_stdout_has_paths_alone(run, capsys):
    paths = generate.main(str(run), "?", 1, guidance=2.0)
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(path) for path in paths]
    assert [line[:5] for line in err.splitlines()] == ["note:", "note:"]


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
