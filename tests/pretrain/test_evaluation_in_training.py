"""Evaluation in training, of every family: exact, the same at every world size, and without a trace in the training.

The ranks train all runs of a test in one process each.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.shards import codes
from launchers.chaos.laws import tensor_digests
from launchers.watch import run_status
from pretrain import evaluate
from pretrain.checkpoint.verbs import list_
from pretrain.evaluations import evaluated, prompts, retrieval
from pretrain.inputs.image_tokenizer import load_tokenizer
from pretrain.interchange.folder import export_model
from pretrain.models import MODELS
from pretrain.runtime.goodput import goodput
from tests.families import FAMILIES, Material
from tests.pretrain import evaluation_worker
from tests.pretrain.commands import recipe, rows_of
from tests.pretrain.processes import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]
WORKER = Path(evaluation_worker.__file__)
WORLDS = (1, 2, 3)
STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def encoded(
    material: Material, build_scenes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Material:
    """The material with image codes, and an image tokenizer."""
    folder = tmp_path_factory.mktemp("encoded")
    torch.manual_seed(0)
    config = FAMILIES["vqgan"].config().model
    export_model(folder / "tokenizer", config, MODELS["vqgan"](config).state_dict())
    made = Material(folder / "scenes", material.vocabulary, folder / "tokenizer")
    shutil.copytree(material.dataset, made.dataset)
    encode(made.dataset, made.images)
    return made


def encode(dataset: Path, tokenizer: Path) -> None:
    """Add image codes to a dataset in this process, without Ray's seconds."""

    def all_shards(job: Any, manifest: Any, *_: Any) -> None:
        made = load_tokenizer(tokenizer)
        for shard in range(len(manifest.shards)):
            codes.encode_shard(job.dataset, shard, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "_encode_shards", all_shards)
        codes.encode_dataset(dataset, load_tokenizer, tokenizer, progress=False)


@pytest.fixture(scope="module")
def held_out(
    encoded: Material, build_scenes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Two held-out datasets, of 21 and 3 samples."""
    folder = tmp_path_factory.mktemp("held-out")
    made = {"val": build_scenes(folder / "val", 21, 5), "few.3": build_scenes(folder / "few", 3, 6)}
    for path in made.values():
        encode(path, encoded.images)
    return {name: str(path) for name, path in made.items()}


def entry(tree: dict[str, Any], strike: str = "") -> dict[str, Any]:
    """What the worker is told of a run."""
    return {"config": str(recipe(tree, Path(tree["run"]).with_suffix(".json"))), "strike": strike}


def train_all(entries: list[dict[str, Any]], world: int, folder: Path) -> list[str]:
    """Train the runs on so many ranks -> how each one ended."""
    path = folder / f"runs-{world}.json"
    path.write_text(json.dumps(entries))
    [ends, *others] = [told["ends"] for told in run_ranks(WORKER, [str(path)], world)]
    assert all(other == ends for other in others)
    return [str(end) for end in ends]


DISTURBED = ("clip", "vqgan")
"""Families whose evaluation is killed and stopped."""
STRIKES = {"killed": "Killed", "stopped": "Requeue"}


@pytest.fixture(scope="module")
def unfit(
    material: Material, encoded: Material, build_scenes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Datasets on which a gpt cannot be evaluated by two ranks."""
    folder = tmp_path_factory.mktemp("unfit")
    one = build_scenes(folder / "one", 1, 7)
    encode(one, encoded.images)
    empty = folder / "empty"
    shutil.copytree(encoded.dataset, empty)
    tree = json.loads((empty / "manifest.json").read_text())
    (empty / "manifest.json").write_text(json.dumps(tree | {"shards": [], "samples": 0}))
    return {"absent": folder / "absent", "without codes": material.dataset, "too small": one, "empty": empty}


@pytest.fixture(scope="module")
def trained(
    encoded: Material, held_out: dict[str, str], unfit: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """FAMILY/plain, without evaluation, FAMILY/evaluated, and of some FAMILY/{killed,stopped}; two ranks, in fp32.

    Also runs that are refused or end by patience; ends.json tells how the latter and these ended.
    """
    folder, entries, expected = tmp_path_factory.mktemp("trained"), [], []

    def add(name: str, kind: str, *strikes: str) -> None:
        tree = run_of(name, encoded, held_out, folder / name / kind, 0 if kind == "plain" else EVERY)
        entries.extend(entry(tree, strike) for strike in strikes)
        expected.extend(STRIKES.get(strike, "done") for strike in strikes)

    for name in FAMILIES:
        add(name, "plain", "")
        add(name, "evaluated", "")
    for name in DISTURBED:
        add(name, "killed", "killed", "")
        add(name, "stopped", "stopped", "")
    for case, data in unfit.items():
        tree = run_of("gpt", encoded, {"val": str(data)}, folder / "unfit" / case, EVERY)
        entries.append(entry(tree))
    impatient = run_of("electra", encoded, held_out, folder / "impatient", EVERY)
    impatient["train"] |= {"steps": 12, "patience": 2, "keep_best": "max:eval/val/loss", "keep_checkpoints": 1}
    entries += [entry(impatient), entry(impatient)]
    ends = train_all(entries, 2, folder)
    (folder / "ends.json").write_text(json.dumps(ends[len(expected) :]))
    assert ends[: len(expected)] == expected
    return folder


def run_of(name: str, material: Material, held_out: dict[str, str], run: Path, every: int) -> dict[str, Any]:
    """A run of a few steps that is evaluated `every` steps and saved in every second."""
    train = {
        "steps": STEPS,
        "checkpoint_every_steps": 2,
        "keep_checkpoints": 9,
        "precision": "fp32",
        "global_batch": 12,
    }
    tree = FAMILIES[name].run(material, run, **train, evaluate_every_steps=every)
    if classes := FAMILIES[name].reads.classes:
        held_out = {key: str(Material(Path(path), Path()).labelled(classes)) for key, path in held_out.items()}
    tree["data"] |= {"evaluation": held_out}
    if "discriminator_start_step" in tree["task"]:
        tree["task"] |= {"discriminator_start_step": 2}
    return tree


def evaluations(run: Path) -> dict[int, dict[str, str]]:
    """The figures of each evaluated step as hexadecimal numbers; every step of metrics.jsonl is evaluated once."""
    rows = [row for row in rows_of(run) if "evaluate_s" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: figures_of(row) for row in rows}


def figures_of(row: dict[str, Any]) -> dict[str, str]:
    return {name: float(value).hex() for name, value in row.items() if name.startswith("eval/")}


def losses(run: Path) -> dict[int, str]:
    return {row["step"]: row["loss_hex"] for row in rows_of(run) if "loss_hex" in row}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups as small in this process as in the ranks."""
    for module in (evaluated, retrieval, prompts):
        for name, size in evaluation_worker.SIZES.items():
            monkeypatch.setattr(module, name, size, raising=False)


# --------------------------------------------------------------------------------------------- every family


@pytest.mark.parametrize("name", FAMILIES)
def test_an_evaluation_leaves_no_trace_in_the_training(name: str, trained: Path) -> None:
    plain, evaluated_ = trained / name / "plain", trained / name / "evaluated"
    assert len(losses(plain)) == STEPS and losses(evaluated_) == losses(plain)
    assert tensor_digests(evaluated_) == tensor_digests(plain)


@pytest.mark.parametrize("name", DISTURBED)
@pytest.mark.parametrize("kind", STRIKES)
def test_an_evaluation_that_was_killed_or_stopped_is_made_again(kind: str, name: str, trained: Path) -> None:
    disturbed, undisturbed = trained / name / kind, trained / name / "evaluated"
    assert losses(disturbed) == losses(undisturbed)
    assert tensor_digests(disturbed) == tensor_digests(undisturbed)
    assert evaluations(disturbed) == evaluations(undisturbed)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_figures_are_those_of_tessera_evaluate(name: str, trained: Path) -> None:
    """Two ranks, sharded where the task can be, beside one process: bit for bit, for every checkpoint."""
    run = trained / name / "evaluated"
    figure = FAMILIES[name].figure
    evaluate.main(run, every=True)
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    in_training = evaluations(run)
    assert {line["step"]: figures_of(line) for line in lines} == in_training
    assert sorted(in_training) == [2, 4, 6]
    assert {"eval/val/loss", "eval/few.3/loss", f"eval/val/{figure}", f"eval/few.3/{figure}"} <= in_training[2].keys()


def test_the_figures_are_the_same_on_three_ranks(
    trained: Path, encoded: Material, held_out: dict[str, str], tmp_path: Path
) -> None:
    """The last checkpoint of each run without evaluation is evaluated when it is resumed on three ranks."""
    entries = []
    for name in FAMILIES:
        run = tmp_path / name
        shutil.copytree(trained / name / "plain", run)
        entries.append(entry(run_of(name, encoded, held_out, run, STEPS)))
    assert train_all(entries, 3, tmp_path) == ["done"] * len(FAMILIES)
    for name in FAMILIES:
        assert evaluations(tmp_path / name) == {6: evaluations(trained / name / "evaluated")[6]}, name


# -------------------------------------------------------------------------------- what cannot be evaluated, patience

REFUSED = {
    "absent": "refused with 74: data.evaluation.val=.*absent",
    "without codes": "refused with 74: data.evaluation.val=.*no codes of tokenizer",
    "too small": "refused with 64: data.evaluation.val=.*1 samples are fewer than 2 ranks",
    "empty": "refused with 74: data.evaluation.val=.*0 samples",
}


def test_data_that_cannot_be_evaluated_are_refused_before_the_first_step(trained: Path) -> None:
    ends = json.loads((trained / "ends.json").read_text())
    for end, (case, expected) in zip(ends, REFUSED.items(), strict=False):
        assert re.match(expected, end), end
        assert not (trained / "unfit" / case / "metrics.jsonl").exists()


def test_a_run_ends_when_evaluations_improve_no_more_and_keeps_the_best(trained: Path) -> None:
    """The loss falls, and the run wants it to rise: the evaluation of step 2 stays the best."""
    run = trained / "impatient"
    assert json.loads((trained / "ends.json").read_text())[len(REFUSED) :] == ["done", "done"]
    assert sorted(evaluations(run)) == [2, 4, 6] and max(losses(run)) == 6
    assert len((run / "attempts.jsonl").read_text().splitlines()) == 2
    best = evaluations(run)[2]["eval/val/loss"]
    reasons = {row["step"]: row["kept"] for row in list_(run)}
    assert reasons == {2: f"best eval/val/loss={float.fromhex(best):.6g}", 6: "last"}


def test_the_time_of_evaluations_is_a_share_of_its_own(trained: Path) -> None:
    run = trained / "clip" / "evaluated"
    [attempt] = goodput(run)["attempts"]
    spent = sum(row["evaluate_s"] for row in rows_of(run) if "evaluate_s" in row)
    assert attempt["evaluated_s"] == pytest.approx(spent, abs=0.1) and attempt["to_step"] == STEPS
    assert run_status(run)["step"] == STEPS and run_status(run)["loss"] > 0
    assert "evaluated_s" not in goodput(trained / "clip" / "plain")["attempts"][0]


def test_the_pictures_of_an_evaluation_have_its_name_and_step(trained: Path) -> None:
    assert (trained / "vqgan" / "evaluated" / "samples" / "evaluation-val-reconstructions-step-00000002.png").is_file()
    assert (trained / "gpt" / "evaluated" / "samples" / "evaluation-few.3-prompts-step-00000006.png").is_file()


def test_every_checkpoint_is_evaluated_or_the_named_one(trained: Path) -> None:
    run = trained / "clip" / "plain"
    told: list[dict[str, Any]] = []
    evaluate.main(run, step=4)
    evaluate.main(run, say=told.append, every=True)
    assert [row["step"] for row in told] == [2, 4, 6]
    assert [json.loads(line)["step"] for line in (run / "evaluation.jsonl").read_text().splitlines()] == [2, 4, 6]
    assert json.loads((run / "evaluation.json").read_text()) == told[-1]
    with pytest.raises(ConfigError, match="leave --step and --name out"):
        evaluate.main(run, step=4, every=True)
