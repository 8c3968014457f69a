import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.errors import ConfigError, DataError, NodeFault
from data_pipeline.ingest import run
from data_pipeline.shards.verify import verify
from data_pipeline.stream.reader import Stream
from data_pipeline.workers import OUTER_RETRIES, run_tasks
from tests.data_pipeline.ingest.cluster import below, command_of

# ------------------------------------------------------------------------------------- what is stored


def test_webdataset_and_tarfile_read_the_samples_that_the_stream_reads(scenes, by_tarfile):
    stream = Stream(scenes, seed=0)
    plain = by_tarfile(scenes)
    urls = sorted(str(path) for path in scenes.glob("*.tar"))
    peers = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(peers) == len(plain) == stream.samples == 25
    for number, (peer, reference) in enumerate(zip(peers, plain, strict=True)):
        sample = stream.fetch(number)
        assert peer["__key__"] == reference["key"] == f"{number:09d}"
        assert sample.image == peer["png"] == reference["png"]
        assert sample.texts[0].encode() == peer["txt"] == reference["txt"]
        tree = json.loads(reference["json"])
        assert (sample.key, list(sample.texts)) == (tree.pop("key"), tree.pop("captions"))
        assert sample.meta == tree


def test_all_captions_and_attributes_of_a_row_are_kept(folder, build_here, tmp_path):
    build_here(source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out")
    sample = Stream(tmp_path / "out", seed=0).fetch(1)
    assert (sample.key, sample.texts, sample.meta) == ("a/1", ("picture 1", "图片"), {"score": 1})


# ----------------------------------------------------------------------------------------- accounting


def spoil(folder):
    """Six rows, of which three become samples."""
    (folder / "a" / "0.txt").write_text(" \n")
    (folder / "b" / "0.png").write_bytes(b"<html>")
    (folder / "b" / "1.png").write_bytes((folder / "b" / "1.png").read_bytes()[:300])
    return {"empty_caption": 1, "not_an_image": 1, "truncated": 1}


def test_what_goes_in_comes_out_or_is_counted_with_its_reason(folder, build_here, tmp_path):
    rejected = spoil(folder)
    stats = build_here(source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out", shard_size=2)
    assert (stats["in"], stats["out"], stats["rejected"]) == (6, 3, rejected)
    assert json.loads((tmp_path / "out/stats.json").read_text()) == {"in": 6, "out": 3, "rejected": rejected}
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert [(row["row"], row["key"], row["reason"]) for row in rejects] == [
        (0, "a/0", "empty_caption"),
        (2, "b/0", "not_an_image"),
        (3, "b/1", "truncated"),
    ]
    assert [row["status"] for row in pq.read_table(tmp_path / "out/00000.parquet").to_pylist()] == [
        "empty_caption",
        "ok",
    ]


def test_a_shard_whose_rows_are_all_rejected_is_empty_and_accounted(folder, build_here, tmp_path):
    spoil(folder)
    build_here(source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out", shard_size=2)
    assert [shard["n"] for shard in json.loads((tmp_path / "out/manifest.json").read_text())["shards"]] == [1, 0, 2]
    assert verify(tmp_path / "out")["samples"] == 3
    assert {sample.key for sample in Stream(tmp_path / "out", seed=0).read(0, 3)} == {"a/1", "b/2", "c"}


@pytest.mark.parametrize("shard_size", [1, 2, 100])
def test_of_rows_with_one_key_the_first_stays_in_every_sharding(make_png, build_here, tmp_path, shard_size):
    (tmp_path / "x.png").write_bytes(make_png())
    keys = ["a", "b", "a", "c", "b", "a"]
    lines = [json.dumps({"id": key, "image": "x.png", "caption": f"row {row}"}) for row, key in enumerate(keys)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    source = {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl", "key": "id"}
    stats = build_here(source=source, output=f"{tmp_path}/out", shard_size=shard_size)
    assert stats["rejected"] == {"duplicate_key": 3}
    stream = Stream(tmp_path / "out", seed=0)
    assert [stream.fetch(i).texts for i in range(3)] == [("row 0",), ("row 1",), ("row 3",)]


# ------------------------------------------------------------------------------------------ bad input


def test_a_build_that_rejects_every_row_is_refused_with_its_reasons(folder, build_here, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="all 6 rows were rejected .empty_file 6"):
        build_here(source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"shard_size": 5}, "shard_size"),
        ({"images": {"format": "jpeg"}}, "images"),
        ({"captions": {"min_chars": 3}}, "captions"),
    ],
)
def test_another_configuration_in_the_same_output_is_refused(scenes, build_here, tree_digests, change, field):
    before = tree_digests(scenes)
    tree = {"source": {"kind": "scenes", "count": 25}, "output": str(scenes), "shard_size": 10}
    with pytest.raises(ConfigError, match=f"belongs to another build(.|\n)*{field}"):
        build_here(**{**tree, **change})
    assert tree_digests(scenes) == before


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"source": {"kind": "scenes", "count": 0}, "output": "x"}, "source.count = 0:"),
        ({"source": {"kind": "sceness", "count": 1}, "output": "x"}, "scenes"),
        ({"source": {"kind": "scenes", "count": 1}, "output": "x", "shards": 3}, "shard"),
        ({"source": {"kind": "scenes", "count": 1}}, "output: missing"),
        (
            {"source": {"kind": "scenes", "count": 1}, "output": "x", "images": {"mode": "fit"}},
            "mode='fit' with size=None",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(make_config, tree, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**tree)


def test_an_output_that_cannot_be_written_is_refused(build_here, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file"):
        build_here(source={"kind": "scenes", "count": 1}, output=f"{tmp_path}/file/out")


# --------------------------------------------------------------------------------- same bytes, resuming


def test_a_build_that_was_interrupted_anywhere_is_finished_to_the_same_bytes(scenes, build_here, tree_digests):
    whole = tree_digests(scenes)
    tree = {"source": {"kind": "scenes", "count": 25}, "output": str(scenes), "shard_size": 10}
    for lost in (
        ["manifest.json"],
        ["manifest.json", "stats.json", "00001_stats.json"],
        list(set(whole) - {"build.json"}),
    ):
        for name in lost:
            (scenes / name).unlink()
        build_here(**tree)
        assert tree_digests(scenes) == whole


def test_shards_that_are_done_are_not_made_again(scenes, build_here, monkeypatch):
    for name in ("manifest.json", "00001_stats.json"):
        (scenes / name).unlink()
    made = []
    build_shard = run.build_shard
    monkeypatch.setattr(run, "build_shard", lambda plan, shard: made.append(shard) or build_shard(plan, shard))
    build_here(source={"kind": "scenes", "count": 25}, output=str(scenes), shard_size=10)
    assert made == [1]


def test_a_shard_that_is_there_with_other_bytes_is_never_overwritten(scenes, build_here):
    for name in ("manifest.json", "00001_stats.json"):
        (scenes / name).unlink()
    (scenes / "00001.tar").write_bytes(b"other")
    with pytest.raises(DataError, match="nothing was overwritten"):
        build_here(source={"kind": "scenes", "count": 25}, output=str(scenes), shard_size=10)
    assert (scenes / "00001.tar").read_bytes() == b"other"


# ----------------------------------------------------------------------------------------- with real Ray

COUNT, SHARD = 3000, 250
DRIVER = f"""
import sys
from data_pipeline.ingest.run import build
from data_pipeline.config import BuildConfig
from data_pipeline.settings import check_settings
source = dict(kind="scenes", count={COUNT})
tree = dict(source=source, output=sys.argv[1], shard_size={SHARD}, workers=int(sys.argv[2]))
build(check_settings(BuildConfig, tree, "driver"), progress=False)
"""
STOPS_ITSELF = f"""
import os, signal
from data_pipeline.ingest import run
tasks = run.run_tasks

def stop_after_three(*asked):
    for number, done in enumerate(tasks(*asked)):
        yield done
        if number == 2:
            os.kill(os.getpid(), signal.SIGSTOP)

run.run_tasks = stop_after_three
{DRIVER}"""
"""The same driver, and it stops with three shards done: it may be done before a look from outside finds it so far."""


@pytest.fixture
def undisturbed(build_here, tmp_path, tree_digests):
    build_here(source={"kind": "scenes", "count": COUNT}, output=f"{tmp_path}/undisturbed", shard_size=SHARD)
    return tree_digests(tmp_path / "undisturbed")


def start_driver(output: Path, workers: int, program: str = DRIVER) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program, str(output), str(workers)], start_new_session=True)


def wait_for(condition, seconds=250.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the build did not get there in time"
        time.sleep(0.02)


def kill_a_worker(driver: int) -> bool:
    """Kill a process of this driver that is running a task, unless there is none; both are seen in one look."""
    for pid in below(driver):
        if b"ray::build_shard" in command_of(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
    return False


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bytes(undisturbed, tmp_path, tree_digests, workers):
    assert start_driver(tmp_path / "out", workers).wait(timeout=250) == 0
    assert tree_digests(tmp_path / "out") == undisturbed


@pytest.mark.real
@pytest.mark.slow
def test_a_killed_worker_changes_no_byte(undisturbed, tmp_path, tree_digests):
    driver = start_driver(tmp_path / "out", 2)
    for _ in range(2):
        wait_for(lambda: kill_a_worker(driver.pid))
        time.sleep(0.2)
    assert driver.wait(timeout=250) == 0
    assert tree_digests(tmp_path / "out") == undisturbed


@pytest.mark.real
@pytest.mark.slow
def test_a_killed_driver_is_resumed_to_the_same_bytes(undisturbed, tmp_path, tree_digests):
    driver = start_driver(tmp_path / "out", 2, STOPS_ITSELF)
    wait_for(lambda: psutil.Process(driver.pid).status() == psutil.STATUS_STOPPED)
    assert len(list((tmp_path / "out").glob("*_stats.json"))) >= 3
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(timeout=30)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert start_driver(tmp_path / "out", 2).wait(timeout=250) == 0
    assert tree_digests(tmp_path / "out") == undisturbed


class FakeRay:
    """ray.wait and ray.get over plain values; a value that is an exception is raised."""

    def __init__(self):
        import ray

        self.exceptions = ray.exceptions

    def wait(self, references, num_returns, timeout):
        return references[:1], references[1:]

    def get(self, reference):
        if isinstance(reference[1], Exception):
            raise reference[1]
        return reference[1]


@pytest.mark.parametrize(("losses", "fails"), [(0, False), (OUTER_RETRIES, False), (OUTER_RETRIES + 1, True)])
def test_a_task_whose_worker_is_lost_is_submitted_again_a_bounded_number_of_times(monkeypatch, losses, fails):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    attempts = iter(range(100))

    def submit(item):
        attempt = next(attempts)
        return attempt, fake.exceptions.WorkerCrashedError() if attempt < losses else item

    if fails:
        with pytest.raises(NodeFault, match="worker was lost 6 times"):
            list(run_tasks(submit, ["shard"], 1))
    else:
        assert list(run_tasks(submit, ["shard"], 1)) == [("shard", "shard")]


def test_at_most_two_tasks_a_worker_are_in_flight(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    submitted = []
    for done, _ in enumerate(run_tasks(lambda item: submitted.append(item) or (item, item), list(range(20)), 2)):
        assert len(submitted) <= done + 4
    assert submitted == list(range(20))
