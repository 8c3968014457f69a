"""What a run reads, through the command line: mixtures, another batch on the way, samples that do not decode."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.commands import (
    Material,
    ask_to_stop,
    command,
    electra,
    interrupted,
    recipe,
    rows_of,
    steps_of,
    tessera,
    vqgan,
)


def mixed(material: Material, other: Path, run: Path) -> dict[str, Any]:
    """Two datasets in the ratio 2 to 1, for 30 steps of 16."""
    tree = electra(material, run, steps=30, checkpoint_every_steps=5)
    sources = [{"path": str(material.dataset), "weight": 2}, {"path": str(other), "weight": 1}]
    tree["data"] = {"datasets": sources, "text_tokenizer": str(material.vocabulary)}
    tree["task"] |= {"masking": "word", "packing": True}
    return tree


@pytest.mark.slow
@pytest.mark.real
def test_a_mixture_goes_on_with_another_batch_other_weights_and_workers(
    material: Material, build_scenes: Callable[[Path, int, int], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tree = mixed(material, build_scenes(tmp_path / "other", 60, 1), run)
    first = recipe(tree, tmp_path / "first.yaml")
    code, output = interrupted(command("train", first), run, 7, ask_to_stop)
    assert code == 75, output[-3000:]
    stopped = max(steps_of(run))
    position = 16 * stopped
    tree["data"] |= {"reweigh": [{"position": position - 1, "weights": [1, 1]}]}
    refused = tessera("train", recipe(tree, tmp_path / "past.yaml"))
    assert refused.returncode == 74 and f"weights_from: 0 saved, {position - 1} now" in refused.stdout
    tree["data"] |= {"reweigh": [{"position": position, "weights": [1, 1]}], "workers": 1}
    tree["train"] |= {"global_batch": 24, "micro_batch": 6}
    done = tessera("train", recipe(tree, tmp_path / "second.yaml"))
    assert done.returncode == 0, done.stdout[-3000:]
    found = [tuple(row["positions"]) for row in rows_of(run)]
    sizes = [16] * stopped + [24] * (30 - stopped)
    starts = [sum(sizes[:number]) for number in range(30)]
    assert found == [(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    order = tessera("data", "order", tmp_path / "second.yaml", "--start", str(position), "--count", "4", "--json")
    assert [number >= 200 for number in json.loads(order.stdout)["ids"]] == [False, True] * 2  # the second has 200 on
    evaluated = tessera("evaluate", run, "--json")
    assert evaluated.returncode == 0 and "rtd_loss" in evaluated.stdout, evaluated.stdout[-3000:]


@pytest.fixture
def spoilt(material: Material, tmp_path: Path) -> Path:
    """The dataset of scenes as a tar made elsewhere, one of whose images does not decode."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    with tarfile.open(sorted(material.dataset.glob("*.tar"))[0]) as tar, tarfile.open(folder / "0.tar", "w") as copy:
        for number, member in enumerate(tar.getmembers()):
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith("png") and number in (6, 7, 8):  # the third sample's
                data = b"\x89PNG, but no further"
            info = tarfile.TarInfo(member.name)
            info.size = len(data)
            copy.addfile(info, io.BytesIO(data))
    assert tessera("data", "index", folder / "0.tar").returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.real
def test_a_sample_that_does_not_decode_is_replaced_and_entered_in_the_ledger(
    material: Material, spoilt: Path, tmp_path: Path
) -> None:
    tree = vqgan(Material(spoilt, material.vocabulary), tmp_path / "run")
    done = tessera("train", recipe(tree, tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stdout[-3000:]
    lines = (tmp_path / "run/bad_samples/rank-00000.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 160 // 50 and len({entry["sample"] for entry in entries}) == 1
    assert all("cannot be decoded" in entry["reason"] for entry in entries)
    tree["data"]["max_bad_rate"], tree["run"] = 0.0, str(tmp_path / "strict")
    tree["train"]["steps"] = 90  # the ninth time is once too often
    strict = tessera("train", recipe(tree, tmp_path / "strict.yaml"))
    assert strict.returncode == 74 and "9 of" in strict.stdout and "max_bad_rate=0.0" in strict.stdout
