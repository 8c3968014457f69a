"""Every task reads text by what its tokenizer says: the ids may be any, and other ids give the same loss."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import check_settings
from data_pipeline.text import kinds
from data_pipeline.text.kinds import open_tokenizer
from data_pipeline.text.tokenizer import ABSENT, TextTokenizer
from pretrain import evaluate
from pretrain.checkpoint import verbs
from pretrain.checkpoint.fingerprints import of_datasets, of_files
from pretrain.config import FINGERPRINTS, RunConfig
from pretrain.generate import generate_images
from pretrain.inputs.source import open_data
from pretrain.interchange.folder import export_model
from pretrain.models import MODELS, electra
from pretrain.models.gpt import Gpt
from pretrain.tasks import TASKS
from pretrain.tasks.task import Task
from tests.families import FAMILIES, Family, Material, Samples, task_of
from tests.pretrain.words import FILE, PLACES, WordPieces, pieces_of

BASE = WordPieces(pieces_of(PLACES["ours"]))
OTHERS = [name for name in PLACES if name != "ours"]
TEXTS = (
    ("a small reddish circle on white. at the left.", "big blue squares, on a red square"),
    ("红色圆形北京大学 red circle", "左上角红色圆形"),
    ("a circle, 鰲 or 7 of them", "the blue zebra"),
    ("x",),
    ("一二三",),  # nothing but [UNK]
    ("a red circle at the left on white at the left on white at the left on white at the left",),
)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "masking": [{"masking": masking, "mask_rate": 0.4} for masking in ("piece", "word", "ngram")],
    "caption_drop": [{"caption_drop": 0.4}],
}
"""Changes of a task that has the field."""


def variants_of(family: Family) -> list[dict[str, Any]]:
    fields = type(family.config().task).model_fields
    return next((changes for field, changes in VARIANTS.items() if field in fields), [{}])


READERS = [
    pytest.param(family.config(task=task), id="-".join([name, *map(str, task.values())]))
    for name, family in FAMILIES.items()
    if family.reads.text
    for task in variants_of(family)
]


class Captioned(Samples):
    """Samples with the texts of this file."""

    def _texts(self, draw: np.random.Generator, number: int) -> tuple[str, ...]:
        return TEXTS[number % len(TEXTS)]


def batch_of(config: RunConfig, tokenizer: TextTokenizer) -> dict[str, Tensor]:
    stream: Any = Captioned(config.model.reads, full=False)
    made: dict[str, Tensor] = TASKS[config.task.kind].inputs(config, stream, tokenizer)(
        [stream.fetch(number) for number in range(18)]
    )
    return made


def order_of(other: WordPieces) -> Tensor:
    """Id of BASE -> id of `other`, int64 [V]."""
    return torch.tensor([other.ids[piece] for piece in BASE.pieces])


def permuted(model: torch.nn.Module, order: Tensor, codes: int) -> dict[str, Tensor]:
    """The weights with every row of a text id moved to its new place; a GPT's follow its `codes` image ids."""
    state = {}
    for name, tensor in model.state_dict().items():
        for dim, size in enumerate(tensor.shape):
            if size in (BASE.size, BASE.size + codes):
                kept = torch.arange(size - BASE.size)
                tensor = tensor.index_select(dim, torch.cat([kept, order.argsort() + len(kept)]))
        state[name] = tensor
    return state


def both_tasks(config: RunConfig, order: Tensor) -> list[Task]:
    """The task with weights that tell ids apart, and with these permuted."""
    tasks = [task_of(config).eval() for _ in range(2)]
    for parameter in tasks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    codes = config.model.reads.codes.codebook if config.model.reads.codes else 0
    tasks[1].model.load_state_dict(permuted(tasks[0].model, order, codes))
    return tasks


@pytest.mark.slow
@pytest.mark.parametrize("places", OTHERS)
@pytest.mark.parametrize("config", READERS)
def test_other_ids_give_the_same_batch_and_the_same_loss(
    config: RunConfig, places: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of the embeddings go along with the ids; everything else of the batch stays the same."""
    other = WordPieces(pieces_of(PLACES[places]))
    order = order_of(other)
    batch, moved = batch_of(config, BASE), batch_of(config, other)
    assert batch.keys() == moved.keys()
    for key, tensor in batch.items():
        assert torch.equal(moved[key], order[tensor] if key in ("tokens", "labels", "text") else tensor), key
    plain, relabelled = both_tasks(config, order)
    results = [plain(batch)]
    sample_words = electra.sample_words  # draws by the order of ids: here by that of BASE
    monkeypatch.setattr(electra, "sample_words", lambda logits, at: order[sample_words(logits[..., order], at)])
    results.append(relabelled(moved))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("config", READERS)
def test_padding_is_the_tokenizers_and_no_special_token_is_masked_or_drawn(config: RunConfig, places: str) -> None:
    tokenizer = WordPieces(pieces_of(PLACES[places], unused=3))
    batch = batch_of(config, tokenizer)
    if "text" in batch:
        text = batch["text"]
        dropped = (text == tokenizer.pad).all(1)
        assert 0 < dropped.sum() < len(text)
        assert not any(set(row) & (tokenizer.specials - {tokenizer.pad, tokenizer.unk}) for row in text.tolist())
        return
    tokens = batch["tokens"]
    if "eot" in batch:
        ends = torch.arange(tokens.shape[1])[None] - batch["eot"][:, None]
        assert (tokens[ends > 0] == tokenizer.pad).all() and (tokens[ends == 0] == tokenizer.sep).all()
        assert (tokens[:, 0] == tokenizer.cls).all() and (ends > 0).any()
        return
    assert (tokens[~batch["attention"]] == tokenizer.pad).all() and not batch["attention"].all()
    filled = batch["label_weights"] > 0
    assert (batch["labels"][~filled] == tokenizer.pad).all()
    labels, put = batch["labels"][filled], tokens.gather(1, batch["positions"])[filled]
    assert set(labels.tolist()) & tokenizer.specials == {tokenizer.unk}  # which stands for a word
    replaced = put[(put != tokenizer.mask) & (put != labels)]
    assert not set(replaced.tolist()) & tokenizer.specials and (len(replaced) > 0) == ("uniforms" not in batch)


class Codes:
    """An image tokenizer whose images are their codes."""

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return codes


@pytest.mark.parametrize("places", OTHERS)
def test_guided_generation_compares_with_the_empty_caption_of_training(places: str) -> None:
    other = WordPieces(pieces_of(PLACES[places]))
    plain, relabelled = both_tasks(FAMILIES["gpt"].config(), order_of(other))
    images: Any = Codes()
    prompts = ["a red circle", "", "红色"] * 9
    drawn = [
        generate_images(cast(Gpt, task.model), images, tokenizer, prompts, guidance=3.0, seed=2)
        for task, tokenizer in ((plain, BASE), (relabelled, other))
    ]
    assert np.array_equal(*drawn)
    unguided = generate_images(cast(Gpt, plain.model), images, BASE, prompts, seed=2)
    assert not np.array_equal(drawn[0], unguided) and np.array_equal(drawn[0][1::3], unguided[1::3])


# ------------------------------------------------------------------------------ a kind of tokenizer and its commands


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer file of a kind that joined by a row of KINDS."""
    monkeypatch.setitem(kinds.KINDS, FILE, WordPieces.read)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / FILE).write_text(json.dumps(pieces_of(PLACES["last"])), encoding="utf-8")
    return folder / FILE


def exported(tree: dict[str, Any], folder: Path) -> Path:
    """An untrained model, as `checkpoint export` leaves it."""
    config = check_settings(RunConfig, tree, "test")
    torch.manual_seed(0)
    noted = config.model_dump(mode="json", include={"task", "data", "seed"})
    noted |= {FINGERPRINTS: of_files(config.data) | of_datasets(config.data, open_data(config)[0])}
    return export_model(folder, config.model, MODELS[config.model.kind](config.model).state_dict(), noted)


def wide_clip(material: Material, run: Path) -> dict[str, Any]:
    """A CLIP with heads as OpenAI's have them."""
    tree = FAMILIES["clip"].run(material, run)
    wider = {tower: tree["model"][tower] | {"width": 64, "heads": 1} for tower in ("vision", "text")}
    return tree | {"model": tree["model"] | wider}


def test_a_kind_joins_by_a_row_of_its_table(pieces: Path, material: Material, tmp_path: Path) -> None:
    """Named by its file or its folder, it is evaluated with, exported with, and refused once it changed."""
    assert isinstance(open_tokenizer(pieces.parent), WordPieces) and isinstance(open_tokenizer(pieces), WordPieces)
    assert open_tokenizer(material.vocabulary).fingerprint == open_tokenizer(material.vocabulary.parent).fingerprint
    theirs = Material(material.dataset, pieces.parent)
    model = exported(wide_clip(theirs, tmp_path / "run"), tmp_path / "clip")
    assert evaluate.main(model)["retrieval_r1"] >= 0
    told = verbs.export(model, tmp_path / "openai", form="openai-clip") / "token_ids.json"
    sep = open_tokenizer(pieces).sep
    assert json.loads(told.read_text()) == {"end_of_text": 199, "exchanged_ids": [sep, 199]}
    named = json.loads((verbs.export(model, tmp_path / "hub", form="transformers-clip") / "config.json").read_text())
    assert named["text_config"]["eos_token_id"] == sep
    pieces.write_text(json.dumps(pieces_of(PLACES["bert"])), encoding="utf-8")
    with pytest.raises(ConfigError, match="was trained with another data.text_tokenizer"):
        evaluate.main(model)


@pytest.mark.parametrize("form", ["openai-clip", "transformers-clip"])
def test_a_clip_is_not_exported_without_the_tokenizer_that_says_where_texts_end(
    form: str, pieces: Path, material: Material, tmp_path: Path
) -> None:
    model = exported(wide_clip(Material(material.dataset, pieces), tmp_path / "run"), tmp_path / "clip")
    moved = pieces.rename(tmp_path / FILE)
    with pytest.raises(DataError, match=f"{pieces}: no (.*), or set data.text_tokenizer: {form} records"):
        verbs.export(model, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()
    assert verbs.export(model, tmp_path / "out", form=form, overrides=[f"data.text_tokenizer={moved}"]).is_dir()


def test_an_encoder_is_exported_without_its_tokenizer_and_names_no_token_ids(
    pieces: Path, material: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = exported(
        FAMILIES["electra"].run(Material(material.dataset, pieces), tmp_path / "run"), tmp_path / "electra"
    )
    with_ids = verbs.export(model, tmp_path / "a", form="transformers-electra")
    assert json.loads((with_ids / "generator/config.json").read_text())["pad_token_id"] == open_tokenizer(pieces).pad
    pieces.unlink()
    without = verbs.export(model, tmp_path / "b", form="transformers-electra")
    assert "pad_token_id" not in json.loads((without / "generator/config.json").read_text())
    assert f"note: config.json will have no token ids ({pieces}: no " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "absent", "said"),
    [
        ("electra", ["mask"], "has no mask token, which 'rtd' needs"),
        ("electra", ["mask", "pad"], "has no pad and no mask token, which 'rtd' needs"),
        ("clip", ["mask", "unk"], ""),
    ],
)
def test_a_tokenizer_without_a_token_that_the_task_needs_is_refused(
    family: str, absent: list[str], said: str, pieces: Path, material: Material,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def read(file: Path) -> WordPieces:
        tokenizer = WordPieces.read(file)
        for name in absent:
            setattr(tokenizer, name, ABSENT)
        return tokenizer

    monkeypatch.setitem(kinds.KINDS, FILE, read)
    config = check_settings(
        RunConfig, FAMILIES[family].run(Material(material.dataset, pieces), tmp_path / "run"), "test"
    )
    if not said:
        assert open_data(config)[1] is not None
        return
    with pytest.raises(ConfigError, match=f"{pieces} {said}; use another data.text_tokenizer"):
        open_data(config)
