"""Configurations that no machine can run are refused by the schema, in one line, with 64, by every command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, load_settings
from data_pipeline.text.config import VocabConfig
from launchers import cli
from launchers.pipeline import check_paths, plan_steps
from launchers.spec import SlurmCluster
from pretrain.config import RunConfig
from pretrain.schema.clip import ClipConfig, TextTower, VisionTower
from pretrain.schema.encoders import BertConfig, ElectraConfig
from pretrain.schema.gpt import GptConfig
from pretrain.schema.tasks import ReconstructionConfig
from pretrain.schema.vqgan import VqganConfig
from tests.families import PAIRS

RECIPES = {name: family.recipe for name, family in PAIRS.items()}
IMPOSSIBLE = [
    ("clip", ["model.vision.patch_size=0"], "model.vision.patch_size = 0:"),  # the key that a user writes
    ("clip", ["model.vision.heads=5"], "model.vision: width=768"),
    ("clip", ["model.text.heads=7"], "width=512 is not divisible by heads=7; use 8 heads"),
    ("clip", ["model.vision.heads=7"], "width=768 is not divisible by heads=7"),
    ("clip", ["model.vision.image_size=225"], "image_size=225 is not divisible by patch_size=32; use 224"),
    ("clip", ["model.vision.patch_size=500"], "image_size=224 is not divisible by patch_size=500; use 500"),
    ("clip", ["model.text.context=1"], "model.text.context=1 has no room for [CLS] a [SEP]; use 3 or more"),
    ("clip", ["model.text.context=2"], "model.text.context=2 has no room"),
    ("clip", ["model.text.vocab_size=2"], "vocab_size=2 has no ids beyond the special ones of 'contrastive' (cls,"),
    ("clip", ["train.global_batch=1", "train.micro_batch=1"], "a contrastive loss needs at least 2"),
    ("clip", ["data.crop_scale=[0.9,0.5]"], "the lower bound comes first; use [0.5, 0.9]"),
    ("clip", ["data.crop_ratio=[2,0.5]"], "the lower bound comes first"),
    ("bert", ["model.heads=7"], "width=768 is not divisible by heads=7"),
    ("bert", ["model.context=1", "task.nsp=false"], "model.context=1 has no room for [CLS] a [SEP]"),
    ("bert", ["model.context=4"], "model.context=4 has no room for [CLS] a [SEP] b [SEP]; use 5 or more"),
    ("bert", ["model.vocab_size=2"], "model.vocab_size=2 has no ids beyond"),
    ("bert", ["model.vocab_size=4"], "model.vocab_size=4 has no ids beyond"),
    ("bert", ["model.type_vocab=1"], "has no second segment"),
    ("electra", ["model.heads=7"], "width=256 is not divisible by heads=7"),
    ("electra", ["model.context=1"], "model.context=1 has no room"),
    ("electra", ["model.vocab_size=2"], "model.vocab_size=2 has no ids beyond"),
    ("electra", ["model.generator_fraction=0.001"], "leaves the generator no width"),
    ("electra", ["model.generator_fraction=0.77"], "gives the generator 197 in 3 heads, which does not divide"),
    ("gpt", ["model.heads=7"], "width=768 is not divisible by heads=7"),
    ("gpt", ["model.text_vocab=1"], "model.text_vocab=1 has no ids beyond"),
    ("gpt", ["model.image_vocab=1"], "leaves nothing to predict"),
    ("gpt", ["model.image_tokens=0"], "greater than or equal to 1|greater than 0"),
    ("vqgan", ["model.image_size=250"], "image_size=250 is not divisible by 16"),
    ("vqgan", ["model.image_size=8"], "image_size=8 is not divisible by 16"),
    ("vqgan", ["model.channels=30"], "norm_groups"),
    ("vqgan", ["model.norm_groups=7"], "not divisible by 7 groups"),
    ("vqgan", ["model.codebook_size=1"], "greater than or equal to 2"),
    ("vqgan", ["model.codebook_size=70000"], "less than or equal to 65536"),
    ("vqgan", ["model.multipliers=[]"], "at least 1 item"),
    ("vqgan", ["model.discriminator_channels=1"], "2 channels are not divisible by 0 groups"),
    ("vqgan", ["model.discriminator_channels=17"], "34 channels are not divisible by 8 groups"),
    ("vqgan", ["model.discriminator_layers=7"], "are too many for 256 pixels"),
    ("vqgan", ["model.image_size=4", "model.multipliers=[1]", "task.discriminator_weight=0"], "too small"),
    ("vqgan", ["model.attention_at=[17]"], "model.attention_at=[17]: no level has side 17; use 256, 128,"),
    ("vqgan", ["model.attention_at=[16,512]"], "no level has side 512"),
    ("vqgan", ["model.attention_at=[8]"], "no level has side 8; use 256, 128, 64, 32, 16, and middle"),
    ("vqgan", ["model.attention_at=[middel]"], "valid integer"),
    ("bert", ["train.steps=100", "optim.warmup_steps=100"], "optim.warmup_steps=100 must be below train.steps=100"),
    ("bert", ["optim.betas=[0.9,1.0]"], "less than 1"),
    ("bert", ["optim.lr=inf"], "finite number"),
    ("bert", ["seed=18446744073709551616"], "less than or equal to 18446744073709551615"),
    ("bert", ["seed=-1"], "greater than or equal to 0"),
    ("bert", ["train.collective_timeout_s=99999999999"], "less than or equal to 604800"),
    ("bert", ["data.dataset=", "data.datasets=[{path: a, weight: -1}]"], "each must be 0 or more"),
    ("bert", ["data.dataset=", "data.datasets=[{path: a, weight: 1/0}]"], "write numbers, or fractions such as 1/3"),
    ("bert", ["data.dataset=", "data.datasets=[{path: a, weight: much}]"], "write numbers, or fractions such as 1/3"),
    ("bert", ["data.dataset=", f"data.datasets=[{','.join(['{path: a}'] * 17)}]"], "one per dataset, 1 to 16"),
    ("bert", ["data.dataset=", "data.datasets=[{path: a}]", "data.reweigh=[{position: 5, weights: [1, 2]}]"], "2 weig"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.mark.parametrize(("family", "overrides", "said"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_an_impossible_run_is_refused_by_the_schema(family: str, overrides: list[str], said: str) -> None:
    load_settings(RunConfig, RECIPES[family])
    with pytest.raises(ConfigError) as refused:
        load_settings(RunConfig, RECIPES[family], overrides)
    assert any(part in str(refused.value) for part in said.split("|")), refused.value


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"captions": {"min_chars": 9, "max_chars": 3}}, "min_chars=9 is above max_chars=3"),
        ({"source": {"kind": "csv", "path": "a", "columns": ["a", "b"]}}, "'image' is not in columns"),
        ({"images": {"mode": "fit"}}, "every mode except 'none' needs a size"),
    ],
)
def test_an_impossible_build_is_refused_by_the_schema(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_settings(BuildConfig, {"source": {"kind": "folder", "path": "a"}, "output": "b"} | tree, "build")


def test_a_vocabulary_has_more_than_its_special_pieces() -> None:
    with pytest.raises(ConfigError, match="greater than 5"):
        check_settings(VocabConfig, {"dataset": "a", "output": "b", "size": 5}, "vocab")


# -------------------------------------------------------------------------------- what is taken can be built


small = st.integers(1, 9)
KINDS: dict[type[Any], dict[str, st.SearchStrategy[Any]]] = {
    VisionTower: {"image_size": small, "patch_size": small, "width": small, "heads": small},
    TextTower: {"vocab_size": small, "context": small, "width": small, "heads": small},
    BertConfig: {"vocab_size": small, "context": small, "width": small, "heads": small, "embedding_width": small},
    ElectraConfig: {
        "vocab_size": small, "width": st.integers(1, 200), "heads": small, "embedding_width": small,
        "generator_fraction": st.floats(0.01, 1),
    },
    GptConfig: {"width": small, "heads": small, "image_tokens": small, "text_tokens": small, "image_vocab": small},
    VqganConfig: {
        "image_size": st.integers(1, 16), "channels": st.sampled_from([1, 3, 4, 8, 20]),
        "norm_groups": st.sampled_from([1, 2, 32]),
        "multipliers": st.lists(st.integers(1, 2), min_size=1, max_size=3), "latent_channels": small,
        "code_width": small, "codebook_size": st.integers(2, 9), "res_blocks": st.just(1),
    },
}  # fmt: skip


TINY = {"vision": {"width": 8, "heads": 1, "layers": 1}, "text": {"width": 8, "heads": 1, "layers": 1, "vocab_size": 9}}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_whatever_the_schema_takes_can_be_built_and_run(kind: type[Any], data: st.DataObject) -> None:
    import torch

    from pretrain.models import MODELS

    tree = {"layers": 1} if "layers" in kind.model_fields else {}
    tree |= {name: data.draw(values) for name, values in KINDS[kind].items()}
    try:
        part = check_settings(kind, tree, "model")
    except ConfigError:
        return
    parts = {VisionTower: "vision", TextTower: "text"}
    model = part if kind not in parts else ClipConfig.model_validate(TINY | {parts[kind]: part})
    with torch.no_grad(), torch.device("cpu" if isinstance(part, VqganConfig) else "meta"):
        built = MODELS[model.kind](model)
        if isinstance(part, VqganConfig):
            drawn, quantised = built(torch.zeros(1, 3, part.image_size, part.image_size))
            assert drawn.shape[-1] == part.image_size and quantised.codes.shape == (1, part.grid**2)
        if isinstance(part, GptConfig):
            text, codes = (torch.zeros(1, n, dtype=torch.int64) for n in (part.text_tokens, part.image_tokens))
            assert built(text, codes).shape == (1, part.image_tokens, part.image_vocab)
        if isinstance(part, VisionTower):
            assert built.vision(torch.zeros(1, 3, part.image_size, part.image_size)).shape == (1, 512)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(side=st.integers(8, 80), channels=st.integers(1, 40), layers=st.integers(1, 5))
def test_a_discriminator_that_is_taken_can_judge(side: int, channels: int, layers: int) -> None:
    import torch

    from pretrain.models.discriminator import PatchDiscriminator

    tree = json.loads(load_settings(RunConfig, RECIPES["vqgan"]).model_dump_json())
    tree["model"] |= {"image_size": side, "multipliers": [1], "attention_at": []}
    tree["model"] |= {"discriminator_channels": channels, "discriminator_layers": layers}
    assert ReconstructionConfig().discriminator_weight
    try:
        check_settings(RunConfig, tree, "run")
    except ConfigError:
        with torch.device("meta"), pytest.raises(Exception):  # noqa: B017
            PatchDiscriminator(channels, layers)(torch.zeros(1, 3, side, side))
        return
    with torch.device("meta"):
        assert PatchDiscriminator(channels, layers)(torch.zeros(1, 3, side, side)).numel()


# ------------------------------------------------------------------------------------------- every command


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line in this process -> its exit code."""
    monkeypatch.delenv("RANK", raising=False)  # with it preflight would be one of its own ranks, and leave
    monkeypatch.setattr(sys, "argv", ["tessera", *words])
    return cli.run()


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "plan": (["plan"], []),
    "preflight": (["preflight"], []),
    "train": (["train"], []),
    "local": (["launch", "local"], ["--procs-per-node", "1"]),
    "local --dry-run": (["launch", "local"], ["--procs-per-node", "1", "--dry-run"]),
    "slurm": (["launch", "slurm"], []),
    "slurm --dry-run": (["launch", "slurm"], ["--dry-run"]),
    "kubernetes": (["launch", "kubernetes"], []),
    "kubernetes --dry-run": (["launch", "kubernetes"], ["--dry-run"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("family", "override"),
    [("clip", "model.vision.image_size=225"), ("bert", "model.context=1"), ("electra", "model.heads=7")],
)
def test_every_command_refuses_it_in_one_line_with_64(
    command: str, family: str, override: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, options = COMMANDS[command]
    assert call(monkeypatch, *words, RECIPES[family], override, *options) == 64
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and len(said.strip().splitlines()) == 1 and override.rpartition(".")[2] in said


# ------------------------------------------------------------------------------------- paths that must be there


@pytest.mark.parametrize("command", ["preflight", "train", "local", "slurm"])
def test_initial_weights_that_are_not_there_are_refused_with_64(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words, options = COMMANDS[command]
    told = [f"run={tmp_path}/run", f"initial={tmp_path}/nowhere", "train.global_batch=256"]
    assert call(monkeypatch, *words, RECIPES["bert"], *told, *options) == 64
    assert f"{tmp_path}/nowhere" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["local --dry-run", "slurm --dry-run", "kubernetes --dry-run"])
def test_whether_paths_are_there_is_not_asked_by_a_dry_run(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, options = COMMANDS[command]
    assert call(monkeypatch, *words, RECIPES["bert"], "initial=data/nowhere", *options) == 0


def pipeline(folder: Path, *steps: dict[str, Any]) -> list[Any]:
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps({"steps": list(steps)}))
    return plan_steps(SlurmCluster, str(path))


def build_step(folder: Path, output: str) -> dict[str, Any]:
    return {"target": "configs/data/folder.yaml", "arguments": [f"source.path={folder}/raw", f"output={output}"]}


def train_step(folder: Path, **changes: str) -> dict[str, Any]:
    told = {"run": f"{folder}/bert", "data.dataset": f"{folder}/made", "data.text_tokenizer": f"{folder}/v/vocab.model"}
    return {"target": RECIPES["bert"], "arguments": [f"{key}={value}" for key, value in (told | changes).items()]}


def vocab_step(folder: Path) -> dict[str, Any]:
    return {
        "target": "configs/demo/vocab.yaml",
        "arguments": [f"dataset={folder}/made@0123456789ab", f"output={folder}/v"],
    }


def test_what_a_step_above_writes_counts_as_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").mkdir()
    build, vocab, train = build_step(tmp_path, f"{tmp_path}/made"), vocab_step(tmp_path), train_step(tmp_path)
    export = {"target": f"{tmp_path}/bert", "task": "export", "arguments": [f"{tmp_path}/out"]}
    again = train_step(tmp_path, run=f"{tmp_path}/again", initial=f"{tmp_path}/out")
    steps = [build, vocab, train, export, again]
    check_paths(pipeline(tmp_path, *steps))
    for missing in (build, vocab, train, export):
        with pytest.raises(ConfigError, match=r"reads .* which does not exist and no earlier step writes"):
            check_paths(pipeline(tmp_path, *[step for step in steps if step is not missing]))
    with pytest.raises(ConfigError, match="no earlier step writes"):
        check_paths(pipeline(tmp_path, vocab, build, train))
    relative = pipeline(tmp_path, build_step(tmp_path, "made"), vocab, train)
    monkeypatch.chdir(tmp_path)
    check_paths(relative)


def test_addresses_and_patterns_are_left_to_their_step(tmp_path: Path) -> None:
    told = {"data.dataset": "s3://bucket/data", "data.text_tokenizer": f"{tmp_path}/v"}
    (tmp_path / "v").write_text("")
    check_paths(pipeline(tmp_path, train_step(tmp_path, **told)))
    check_paths(pipeline(tmp_path, {"target": "configs/data/folder.yaml", "arguments": ["source.path=a::b{0..3}"]}))


def test_a_run_that_has_begun_needs_its_initial_weights_no_more(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/metrics.jsonl").write_text('{"step": 1, "attempt": 0}\n')
    (tmp_path / "made").mkdir()
    told = {"initial": f"{tmp_path}/gone", "data.text_tokenizer": f"{tmp_path}/made"}
    check_paths(pipeline(tmp_path, train_step(tmp_path, **told)))
