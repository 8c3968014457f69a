"""The public commands on real images and captions, start to end; each stage's test needs the ones before it.

Few steps each: that the way is sound, not that the models are good. Every small recipe is trained.
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.settings import load_settings, read_yaml
from data_pipeline.stream.reader import Stream
from pretrain.checkpoint.catalog import committed
from pretrain.config import RunConfig
from tests.families import FAMILIES, Material, data_of
from tests.pretrain.commands import finish, interrupted, kill_rank_1, rows_of, steps_of, tessera, two_ranks

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.timeout(900)]

EMOJI, PHOTOS = 2852, 39
STEPS, EVERY = 16, 4
SMALL = Path(__file__).parents[2] / "configs" / "small"
RECIPES = {path.stem: load_settings(RunConfig, path) for path in SMALL.glob("*.yaml") if "model" in read_yaml(path)}
DRAW = [name for name, recipe in RECIPES.items() if recipe.model.reads.codes]
"""The recipes that read codes: their runs are killed half way, go on, and draw."""
OTHERS = [name for name in RECIPES if name not in DRAW]
SLOW = {"vqgan": ["model.channels=8", "train.global_batch=8", f"train.sample_every_steps={STEPS // 2}"]}
SLOW["gpt"] = ["train.global_batch=16"]
"""What makes a recipe cheap whose steps take long."""


@dataclass(frozen=True)
class Place:
    """Where the files of this module are: the repository's recipes, the built emoji and what is made of them."""

    root: Path
    configs: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    def launch(self, name: str, *more: str) -> list[str]:
        """The command that trains a recipe on two processes for a few steps, on the data of this place."""
        material = Material(self.data, self.root / "vocab" / "vocab.model", self.tokenizer)
        paths = data_of(RECIPES[name].model.reads, material)
        pairs = {"run": self.root / name} | {f"data.{key}": path for key, path in paths.items() if key != "evaluation"}
        pairs |= {"train.steps": STEPS, "train.global_batch": 32, "train.checkpoint_every_steps": EVERY}
        pairs |= {"tracking.uri": "''", "optim.warmup_steps": 2}
        few = [f"{key}={value}" for key, value in pairs.items()]
        return two_ranks(SMALL / f"{name}.yaml", *few, *SLOW.get(name, []), *more)

    def trained(self, name: str) -> Path:
        """The folder of the finished run NAME, trained now unless it was."""
        if not (self.root / name / "checkpoints").is_dir():
            ended = finish(self.launch(name))
            assert ended.returncode == 0, ended.stdout[-3000:]
        return self.root / name


def succeed(*arguments: str | Path) -> str:
    """The output of a command that must leave with 0."""
    ended = tessera(*arguments)
    assert ended.returncode == 0, ended.stdout[-3000:]
    return ended.stdout


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def samples_of(shared: Path, name: str) -> Path:
    """The folder of real data NAME; skips where it is absent, but fails under CI."""
    path = shared / "data" / name
    if not path.is_dir():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{path} is absent: this test reads it")
    return path


@pytest.fixture(scope="module")
def place(shared: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The emoji built at 64 px, their vocabulary, a VQGAN and the codes by it."""
    place = Place(tmp_path_factory.mktemp("real"), repository / "configs")
    source, configs = samples_of(shared, "emoji-captions"), place.configs
    images = ("images.mode=center_crop", "images.size=64")
    succeed("data", "build", configs / "data/emoji.yaml", f"source.path={source}", f"output={place.data}", *images)
    vocabulary = (f"dataset={place.data}", f"output={place.root / 'vocab'}")
    succeed("vocab", "train", configs / "small/vocab.yaml", *vocabulary)
    succeed("checkpoint", "export", place.trained("vqgan"), place.tokenizer)
    succeed("data", "encode", place.data, "--image-tokenizer", place.tokenizer)
    return place


@pytest.fixture(scope="module", params=DRAW)
def killed(place: Place, request: pytest.FixtureRequest) -> tuple[Path, int, str]:
    """A run killed half way and finished by the same command -> folder; exit code and output of the killed one."""
    name = request.param
    code, output = interrupted(place.launch(name), place.root / name, STEPS // 2, kill_rank_1)
    ended = finish(place.launch(name))
    assert ended.returncode == 0, ended.stdout[-3000:]
    return place.root / name, code, output


# ------------------------------------------------------------------------------------------------ data


def test_every_emoji_is_accounted_for_and_verifies_with_its_codes(place: Place) -> None:
    stats = read(place.data / "stats.json")
    assert stats["in"] == EMOJI == stats["out"] + sum(stats["rejected"].values())
    assert sum(shard["n"] for shard in read(place.data / "manifest.json")["shards"]) == stats["out"]
    succeed("data", "verify", place.data)


def test_codes_of_every_emoji_can_be_read(place: Place) -> None:
    (side_car,) = place.data.glob("codes.vq-*.json")
    stream = Stream(place.data, seed=0, codes=side_car.name.split("-")[1].split(".")[0])
    codes = [stream.fetch(number).codes for number in (0, EMOJI // 2, EMOJI - 1)]
    assert all(row is not None and row.shape == (64,) and row.max() < 256 for row in codes)


def test_broken_images_and_empty_captions_are_dropped_and_counted(
    place: Place, repository: Path, tmp_path: Path
) -> None:
    for number, data in enumerate([*real_images(place.data, 4), b"\x89PNG\r\n\x1a\n of no use", b""]):
        folder_pair(tmp_path / "raw", f"{number}", data, "" if number == 3 else f"picture {number}")
    out = tmp_path / "out"
    source = (f"source.path={tmp_path / 'raw'}", f"output={out}")
    succeed("data", "build", repository / "configs/data/folder.yaml", *source)
    stats = read(out / "stats.json")
    assert (stats["in"], stats["out"], sum(stats["rejected"].values())) == (6, 3, 3)
    assert stats["rejected"].keys() == {"not_an_image", "empty_file", "empty_caption"}
    succeed("data", "verify", out)


def folder_pair(folder: Path, name: str, image: bytes, caption: str) -> None:
    """An image and its caption beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.png").write_bytes(image)
    (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def real_images(dataset: Path, count: int) -> Iterator[bytes]:
    """PNG files of the first images of a dataset."""
    stream = Stream(dataset, seed=0)
    for number in range(count):
        file = io.BytesIO()
        Image.open(io.BytesIO(stream.fetch(number).image)).save(file, "png")
        yield file.getvalue()


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_trains_over_two_processes_and_is_evaluated(place: Place, name: str) -> None:
    run = place.trained(name)
    assert_whole_run(run)
    losses = [row["loss"] for row in rows_of(run)]
    assert sum(losses[-3:]) < sum(losses[:3])
    succeed("evaluate", run)
    assert figure_of(name) in read(run / "evaluation.json")


def figure_of(name: str) -> str:
    """A metric of this recipe's evaluation."""
    pair = RECIPES[name].model.kind, RECIPES[name].task.kind
    return next(family.figure for family in FAMILIES.values() if family.pair == pair)


def assert_whole_run(run: Path) -> None:
    """The files of a finished run: its configuration, every step in order, the positions in one piece, checkpoints."""
    config = load_settings(RunConfig, run / "config.json")
    assert config.train.zero_stage == (0 if config.task.replicated else 3)
    rows, batch = steps_of(run), config.train.global_batch
    assert list(rows) == list(range(1, STEPS + 1))
    assert [rows[step]["positions"] for step in rows] == [[batch * step, batch * (step + 1)] for step in range(STEPS)]
    assert all(float.fromhex(row["loss_hex"]) == row["loss"] for row in rows.values())
    assert committed(run / "checkpoints")[-1].step == STEPS


def test_a_killed_run_goes_on_from_its_last_checkpoint(killed: tuple[Path, int, str]) -> None:
    run, code, output = killed
    assert code == 70, output[-3000:]
    assert_whole_run(run)
    first, second = (json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines())
    assert (first["from_step"], second["from_step"] % EVERY) == (0, 0)
    assert 0 < second["from_step"] <= max(row["step"] for row in rows_of(run) if row["attempt"] == 0)
    assert [row["step"] for row in rows_of(run) if row["attempt"] == 1][0] == second["from_step"] + 1
    succeed("checkpoint", "verify", run)


def test_it_is_evaluated_and_draws_pictures_of_the_tokenizers_size(
    killed: tuple[Path, int, str], tmp_path: Path
) -> None:
    run, _, _ = killed
    succeed("evaluate", run)
    assert figure_of(run.name) in read(run / "evaluation.json")
    assert_draws(run, "red apple 红苹果", tmp_path, "--guidance", "2")


def assert_draws(run: Path, prompt: str, folder: Path, *options: str) -> None:
    """`tessera generate` draws two pictures of 64 pixels."""
    succeed("generate", run, "--prompt", prompt, "-n", "2", "--out", folder, *options)
    pictures = [path for path in folder.glob("*.png") if "grid" not in path.name]
    assert [Image.open(path).size for path in pictures] == [(64, 64)] * 2


# ------------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="module")
def photos(shared: Path, place: Place) -> Place:
    """The photographs built at 64 px, with codes by the tokenizer of the emoji."""
    photos = Place(place.root / "photos", place.configs)
    images = ("images.mode=center_crop", "images.size=64")
    source = (f"source.path={samples_of(shared, 'photo-captions')}", f"output={photos.data}")
    succeed("data", "build", place.configs / "data/photos.yaml", *source, *images)
    succeed("data", "encode", photos.data, "--image-tokenizer", place.tokenizer)
    return photos


def test_photographs_with_five_captions_are_built_and_verified(photos: Place) -> None:
    stats = read(photos.data / "stats.json")
    assert (stats["in"], stats["out"]) == (PHOTOS, PHOTOS)
    assert all(len(sample.texts) == 5 for sample in Stream(photos.data, seed=0).read(0, PHOTOS))
    succeed("data", "verify", photos.data)


@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_photographs_train_pairs_of_captions_and_codes(place: Place, photos: Place, tmp_path: Path, name: str) -> None:
    run, few = photos.root / name, ("train.steps=4", "train.global_batch=8", "train.checkpoint_every_steps=2")
    ended = finish(place.launch(name, f"data.dataset={photos.data}", f"run={run}", *few))
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert list(steps_of(run)) == [1, 2, 3, 4]
    if name in DRAW:
        assert_draws(run, "a dog on a beach", tmp_path)
