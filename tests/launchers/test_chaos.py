"""The kill campaign: its plan, a small one by the public command, and that the laws see what is tampered with."""

import dataclasses
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.settings import load_settings
from launchers.chaos import WHOM, Campaign, Event, Strike, _empty, plan
from launchers.laws import LAWS, broken_laws
from pretrain.config import RunConfig
from tests.pretrain.commands import Material, command, electra, environment, recipe
from tests.pretrain.processes import ROOT

STEPS, KILLS, SEED = 20, 3, 649
TIMEOUT_S = 880  # two runs and three restarts: under a minute on two quiet cores


# ---------------------------------------------------------------------------------------------- the plan


def test_the_plan_is_a_function_of_its_seed() -> None:
    assert plan(5, 50, 200, 4) == plan(5, 50, 200, 4) != plan(6, 50, 200, 4)


def test_a_long_plan_strikes_everyone_everywhere_in_rising_steps() -> None:
    strikes = plan(0, 2000, 500, 4)
    assert [strike.step for strike in strikes] == sorted(strike.step for strike in strikes)
    assert {strike.step for strike in strikes} <= set(range(1, 499))
    assert {strike.rank for strike in strikes} == {0, 1, 2, 3}
    seen = Counter((strike.whom, strike.when) for strike in strikes)
    assert set(seen) == {(whom, when) for whom in WHOM for when in ("step", "save", "start")} - {
        ("freeze", "save"), ("freeze", "start"),
    }  # fmt: skip
    assert {strike.damage for strike in strikes} == {"", "cut", "flip"}


def test_a_folder_that_is_no_campaign_s_is_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "run-chaos-0"
    _empty(home)
    (home / "struck").mkdir()
    _empty(home)
    assert [path.name for path in home.iterdir()] == ["chaos.json"]
    (home / "chaos.json").rename(home / "thesis.txt")
    with pytest.raises(ConfigError, match="no campaign's folder"):
        _empty(home)
    assert (home / "thesis.txt").exists()


# ---------------------------------------------------------------------------------------- a small campaign


@pytest.fixture(scope="module")
def campaign(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """A few strikes against ELECTRA on two ranks, by the public command."""
    folder = tmp_path_factory.mktemp("chaos")
    tree = electra(material, folder / "run", steps=STEPS, checkpoint_every_steps=3)
    config = recipe(tree, folder / "run.yaml")
    argv = command("chaos", config, "--kills", str(KILLS), "--seed", str(SEED))
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
    assert done.stdout.splitlines()[-1].split(maxsplit=1) == ["verdict", "every law held"]
    home = folder / f"run-chaos-{SEED}"
    assert not (folder / "run").exists()
    events = [
        Event(**event | {"strike": Strike(**event["strike"]), "orphans": tuple(event["orphans"])})
        for event in json.loads((home / "chaos.json").read_text())["events"]
    ]
    return Campaign(load_settings(RunConfig, config), home / "reference", home / "struck", 3, events, 0)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
def test_every_law_holds_after_a_campaign_and_its_cost_is_told(campaign: Campaign) -> None:
    assert broken_laws(campaign) == {law: [] for law in LAWS}
    told = json.loads((campaign.struck.parent / "chaos.json").read_text())
    assert [Strike(**event["strike"]) for event in told["events"]] == plan(SEED, KILLS, STEPS, 2)[: len(told["events"])]
    assert len(told["events"]) == KILLS
    assert 0 < told["kill_to_next_step_median_s"] <= told["kill_to_next_step_longest_s"]
    assert told["start_to_first_step_median_s"] > 0
    assert 0 < told["goodput"] < told["goodput_undisturbed"] < 1


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


def an_orphan(run: Path) -> None:
    (run / "checkpoints" / "step-00000005.attempt-0").mkdir()


def a_long_way_back(run: Path) -> None:
    with (run / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"attempt": 99, "from_step": 2}) + "\n")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("tamper", "law"),
    [
        (another_loss, "same training: losses"),
        (a_step_missing, "same training: losses"),
        (a_step_missing, "same batches"),
        (a_batch_twice, "same batches"),
        (another_tensor, "same training: tensors"),
        (a_damaged_shard, "nothing is left over"),
        (an_orphan, "nothing is left over"),
        (a_long_way_back, "little is lost"),
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
    wrong = dataclasses.replace(campaign.events[0], code=1)
    left = dataclasses.replace(campaign.events[0], orphans=(4711,))
    assert broken_laws(dataclasses.replace(campaign, events=[wrong]))["always resumable"] != []
    assert broken_laws(dataclasses.replace(campaign, last_code=74))["always resumable"] != []
    assert broken_laws(dataclasses.replace(campaign, events=[left]))["nothing is left over"] != []
