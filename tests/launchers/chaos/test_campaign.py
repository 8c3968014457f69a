"""Small campaigns by the public command, local and on S3, and that the laws see what is tampered with."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.settings import load_settings
from launchers.chaos import campaign as campaigns
from launchers.chaos.campaign import Campaign, Event, clear
from launchers.chaos.laws import LAWS, broken_laws
from launchers.chaos.plan import FAULTS_OF_DISK, FAULTS_OF_S3, Strike, plan
from pretrain.config import RunConfig
from tests.pretrain.commands import Material, command, electra, environment, recipe
from tests.pretrain.processes import ROOT

STEPS, KILLS, SEED = 100, 4, 1011
"""As root: a full disk, SIGTERM within a shard and then a flipped bit, SIGKILL before a manifest and within a shard.

What is struck are moments, and one that is missed comes again with the next save: after the last strike's step half of
the run is left, of which a busy machine may give some seconds away.
"""
KILLS_ON_S3, SEED_ON_S3 = 3, 368747
"""Torn uploads, SIGKILL before a manifest and then a flipped bit, SIGTERM while a checkpoint is read and then a shard
cut short.
"""
TIMEOUT_S = 880  # two runs and some restarts: under a minute on two quiet cores
VERDICT = ["verdict", "every law held"]


def test_a_folder_that_is_no_campaign_s_is_left_alone(material: Material, tmp_path: Path) -> None:
    config = load_settings(RunConfig, recipe(electra(material, tmp_path / "run"), tmp_path / "run.yaml"))
    home = tmp_path / "run-chaos-0"
    campaign = Campaign(config, home / "reference", home / "struck", "", [], 0)
    clear(campaign)
    (home / "struck").mkdir()
    clear(campaign)
    assert [path.name for path in home.iterdir()] == ["chaos.json"]
    (home / "chaos.json").rename(home / "thesis.txt")
    with pytest.raises(ConfigError, match="not a campaign's folder"):
        clear(campaign)
    assert (home / "thesis.txt").exists()


# -------------------------------------------------------------------------------------------- small campaigns


def said(config: Path, kills: int, seed: int, *overrides: str) -> str:
    """What `tessera chaos` prints; it must leave with 0."""
    argv = command("chaos", config, *overrides, "--kills", str(kills), "--seed", str(seed))
    done = subprocess.run(
        argv,
        env=environment(),
        cwd=ROOT,
        text=True,
        timeout=TIMEOUT_S,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def campaign(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A few strikes against ELECTRA on two ranks, by the public command."""
    folder = tmp_path_factory.mktemp("chaos")
    tree = electra(material, folder / "run", steps=STEPS, checkpoint_every_steps=3)
    config = recipe(tree, folder / "run.yaml")
    assert said(config, KILLS, SEED).splitlines()[-1].split(maxsplit=1) == VERDICT
    home = folder / f"run-chaos-{SEED}"
    assert not (folder / "run").exists()
    events = [
        Event(**event | {"strike": Strike(**event["strike"])})
        for event in json.loads((home / "chaos.json").read_text())["events"]
    ]
    return Campaign(load_settings(RunConfig, config), home / "reference", home / "struck", "", events, 0)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
def test_every_law_holds_after_a_campaign_and_its_cost_is_told(campaign: Campaign) -> None:
    assert broken_laws(campaign) == {law: [] for law in LAWS}
    told = json.loads((campaign.struck.parent / "chaos.json").read_text())
    dealt = [Strike(**event["strike"]) for event in told["events"]]
    assert dealt in [plan(SEED, KILLS, STEPS, 2, faults) for faults in ((), FAULTS_OF_DISK)]
    assert 0 < told["kill_to_next_step_median_s"] <= told["kill_to_next_step_longest_s"]
    assert told["start_to_first_step_median_s"] > 0
    assert 0 < told["goodput"] < told["goodput_undisturbed"] < 1


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
def test_every_law_holds_with_checkpoints_on_s3_and_faults_in_between(
    material: Material, tmp_path: Path, bucket: str
) -> None:
    tree = electra(material, tmp_path / "run", steps=STEPS, checkpoint_every_steps=3)
    config = recipe(tree, tmp_path / "run.yaml")
    told = said(config, KILLS_ON_S3, SEED_ON_S3, f"train.checkpoints={bucket}/run")
    assert told.splitlines()[-1].split(maxsplit=1) == VERDICT
    report = json.loads((tmp_path / f"run-chaos-{SEED_ON_S3}" / "chaos.json").read_text())
    dealt = [Strike(**event["strike"]) for event in report["events"]]
    assert dealt == plan(SEED_ON_S3, KILLS_ON_S3, STEPS, 2, FAULTS_OF_S3)


# ------------------------------------------------------------------------------------- laws that are broken


def edit_rows(run: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    edit(rows)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def another_loss(run: Path) -> None:
    edit_rows(run, lambda rows: rows[4].update(loss_hex="0x1.0p+0"))


def a_step_missing(run: Path) -> None:
    edit_rows(run, lambda rows: [rows.remove(row) for row in list(rows) if row["step"] == 7])


def a_batch_twice(run: Path) -> None:
    edit_rows(run, lambda rows: [row.update(positions=[96, 112]) for row in rows if row["step"] == 8])


def another_tensor(run: Path) -> None:
    """A bit of the last checkpoint, with the manifest made to agree."""
    import hashlib

    folder = sorted(run.glob("checkpoints/step-*"))[-1]
    shard, manifest = folder / "r00000.safetensors", json.loads((folder / "MANIFEST.json").read_text())
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    for entry in manifest["files"]:
        if entry["name"] == shard.name:
            entry["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def a_damaged_shard(run: Path) -> None:
    shard = sorted(run.glob("checkpoints/step-*/r00001.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])


def the_same_sample_twice(run: Path) -> None:
    """The second step consumes what the first one did."""
    edit_rows(run, lambda rows: [row.update(positions=[0, 16]) for row in rows if row["step"] == 2])


def a_commit_of_the_overtaken(run: Path) -> None:
    newest = sorted(run.glob("checkpoints/step-*"))[-1]
    shutil.copytree(newest, newest.with_name("step-00000099.attempt-0"))


def an_attempt_that_claimed_nothing(run: Path) -> None:
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": 99, "from_step": 20, "time": 0}) + "\n")


def an_orphan(run: Path) -> None:
    (run / "checkpoints" / "step-00000005.attempt-0").mkdir()


def a_long_way_back(run: Path) -> None:
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": 99, "from_step": 2, "time": 1e12}) + "\n")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("tamper", "law"),
    [
        (another_loss, "same training: losses"),
        (a_step_missing, "same training: losses"),
        (a_step_missing, "same batches: positions"),
        (a_batch_twice, "same batches: positions"),
        (the_same_sample_twice, "same batches: samples"),
        (another_tensor, "same training: tensors"),
        (a_damaged_shard, "nothing is left over"),
        (an_orphan, "nothing is left over"),
        (a_long_way_back, "little is lost"),
        (a_long_way_back, "the newest is taken"),
        (a_commit_of_the_overtaken, "attempts are fenced"),
        (an_attempt_that_claimed_nothing, "attempts are fenced"),
    ],
)
def test_a_law_that_is_broken_is_named(
    tamper: Callable[[Path], None], law: str, campaign: Campaign, tmp_path: Path
) -> None:
    shutil.copytree(campaign.struck, tmp_path / "struck")
    tampered = dataclasses.replace(campaign, struck=tmp_path / "struck")
    tamper(tampered.struck)
    assert broken_laws(tampered)[law] != []


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
def test_ends_that_no_strike_explains_break_a_law(campaign: Campaign) -> None:
    last = campaign.events[-1]
    wrong = dataclasses.replace(last, code=1)
    left = dataclasses.replace(last, orphans=(4711,))
    assert broken_laws(dataclasses.replace(campaign, events=[wrong]))["always resumable"] != []
    assert broken_laws(dataclasses.replace(campaign, last_code=74))["always resumable"] != []
    assert broken_laws(dataclasses.replace(campaign, events=[left]))["nothing is left over"] != []


@pytest.mark.parametrize(("whom", "fault", "code"), [("storage", "full", 0), ("rank", "", 74)])
def test_a_run_whose_last_save_the_storage_refused_is_started_once_more(whom, fault, code, monkeypatch):
    """As its user would; no other end of the last attempt is made good."""
    ends = iter([74, 0])
    started = SimpleNamespace(done=False, wait=lambda: next(ends))
    struck = [Strike(whom, 0, 1, "step", 0.0, fault=fault)]
    monkeypatch.setattr(campaigns, "_strike", lambda _, strike, *__: Event(strike, None, 0, 0.0, 0.0))
    told = Campaign(None, Path(), Path(), "", [], 0)
    assert campaigns._strike_all(told, struck, lambda: started, None, lambda _: None) == code
