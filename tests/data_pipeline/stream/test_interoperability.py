"""Our shards in other people's loaders, other people's tars in ours, and the stream inside DataLoader and Ray."""

import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from data_pipeline.shards.verify import index, verify
from data_pipeline.stream.reader import Stream

slow = pytest.mark.slow
README = Path(__file__).resolve().parents[3] / "README.md"


def ours(dataset):
    """key, image, first caption of each sample, in the order of the tars."""
    stream = Stream(dataset, seed=0)
    samples = [stream.fetch(number) for number in range(stream.samples)]
    return [(sample.image, sample.texts[0]) for sample in samples]


@pytest.fixture
def tars(scenes):
    return sorted(str(path) for path in scenes.glob("*.tar"))


# ------------------------------------------------------------------------------------ our shards, their loaders


def test_webdataset_reads_our_shards(scenes, tars):
    found = [(sample["png"], sample["txt"].decode()) for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    assert found == ours(scenes)


@slow
def test_datasets_reads_our_shards(scenes, tars, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets

    table = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    rows = list(table.cast_column("png", datasets.Image(decode=False)))
    assert [(row["png"]["bytes"], row["txt"]) for row in rows] == ours(scenes)
    assert all(row["json"]["captions"][0] == row["txt"] for row in rows)


ENERGON = """
import json, sys
from megatron.energon import WorkerConfig, get_loader, get_val_dataset
worker = WorkerConfig(rank=0, world_size=1, num_workers=0)
dataset = get_val_dataset(sys.argv[1], split_part="train", worker_config=worker, batch_size=None)
rows = [(sample.__key__, list(sample.image.shape), sample.caption) for sample in get_loader(dataset)]
print("ROWS" + json.dumps(rows))
"""


@slow
def test_energon_prepares_and_reads_our_shards_and_we_read_them_after(scenes, tars):
    before, fingerprint = ours(scenes), verify(scenes)["fingerprint"]
    prepare = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(scenes), "--non-interactive",
               "--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--num-workers", "1", "--no-progress",
               "--field-map", json.dumps({"image": "png", "caption": "txt"})]  # fmt: skip
    subprocess.run(prepare, check=True, timeout=200, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", ENERGON, str(scenes)], check=True, timeout=200, capture_output=True, text=True
    )
    rows = json.loads(done.stdout.partition("ROWS")[2].splitlines()[0])
    assert sorted(caption for _, _, caption in rows) == sorted(caption for _, caption in before)
    assert all(shape[0] == 3 for _, shape, _ in rows)
    assert index(tars, workers=1)["fingerprint"] == fingerprint, "Energon wrote its own NAME.tar.idx over ours"
    assert (scenes / "00000.tar.tessera.idx").exists()
    assert ours(scenes) == before and verify(scenes)["samples"] == 25


# --------------------------------------------------------------------------------------------- their tars


def by_webdataset(folder, make_png):
    """Tars as webdataset's and img2dataset's writers leave them: PAX headers with fractional times, .json beside."""
    for number in range(3):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for row in range(4):
                key = f"{number:05d}{row:04d}"
                tree = {"caption": f"caption {key}", "url": "http://x/y", "width": 16, "status": "success", "key": key}
                writer.write({"__key__": key, "png": make_png(row), "txt": f"caption {key}", "json": tree})


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=slow)])
def test_tars_of_webdataset_and_img2dataset_are_indexed_and_read(tmp_path, make_png, workers):
    by_webdataset(tmp_path, make_png)
    (tmp_path / "00000.parquet").write_bytes(b"what img2dataset leaves beside")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert index([f"{tmp_path}/{{00000..00002}}.tar"], workers=workers)["samples"] == 12
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == before
    peer = webdataset.WebDataset(sorted(str(path) for path in tmp_path.glob("*.tar")), shardshuffle=False)
    expected = [(sample["png"], sample["txt"].decode()) for sample in peer]
    assert ours(tmp_path) == expected
    meta = Stream(tmp_path, seed=0).fetch(5).meta
    assert (meta["url"], meta["status"]) == ("http://x/y", "success")


def test_where_energon_left_its_own_index_ours_stands_beside_it(tmp_path, make_png):
    by_webdataset(tmp_path, make_png)
    fingerprint = index([str(tmp_path)], workers=1)["fingerprint"]
    before = ours(tmp_path)
    foreign = struct.pack("<5Q", 0, 2048, 4096, 6144, 8192)
    for path in tmp_path.glob("*.tar.idx"):  # what `energon prepare` writes under this name: uint64 byte offsets
        path.write_bytes(foreign)
    assert index([str(tmp_path)], workers=1)["fingerprint"] == fingerprint
    assert all(path.read_bytes() == foreign for path in tmp_path.glob("*[0-9].tar.idx"))
    assert ours(tmp_path) == before and verify(tmp_path)["samples"] == 12


def test_indexing_again_after_one_more_tar_needs_a_new_manifest_and_says_so(tmp_path, make_png):
    by_webdataset(tmp_path, make_png)
    index([str(tmp_path)], workers=1)
    index([str(tmp_path)], workers=1)
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00003.tar")
    with pytest.raises(Exception, match=r"manifest\.json: exists with other contents"):
        index([str(tmp_path)], workers=1)


@pytest.mark.real
@slow
def test_tars_in_a_bucket_are_indexed_there(tmp_path, make_png, bucket, monkeypatch):
    from data_pipeline.storage import open_storage

    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    by_webdataset(tmp_path, make_png)
    storage = open_storage(f"{bucket}/set")
    for path in sorted(tmp_path.glob("*.tar")):
        storage.put_file_if_absent(path.name, path)
    report = index([storage.root], workers=1)
    assert report == {**index([str(tmp_path)], workers=1), "dataset": storage.root}
    assert ours(storage.root) == ours(tmp_path)


# ------------------------------------------------------------------------------------- in DataLoader and in Ray


def example():
    """The code of the README's example."""
    return re.search(r"<!-- stream -->\n+```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S).group(1)


@slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_readmes_example_gives_the_same_batches_for_any_number_of_workers(scenes, tmp_path, workers):
    body = example()
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 15
    program = tmp_path / "example.py"
    program.write_text(body.replace("data/mine", str(scenes)).replace("num_workers=2", f"num_workers={workers}"))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=250,
        env={**os.environ, "PYTHONPATH": str(README.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stream = Stream(scenes, seed=0)
    expected = [[sample.id for sample in stream.read(step * 256, (step + 1) * 256)] for step in range(1000, 1004)]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


@slow
@pytest.mark.real
def test_ranks_in_ray_actors_read_their_shares_of_the_same_batches(scenes):
    import ray

    from data_pipeline.workers import ray_session

    class Rank:
        def __init__(self, dataset, shard):
            self.batches = Stream(dataset, seed=3).batches(start=40, size=24, shard=shard)

        def step(self):
            return [sample.id for sample in next(self.batches)]

    alone = Stream(scenes, seed=3).batches(start=40, size=24)
    with ray_session(2):
        actors = [ray.remote(Rank).options(num_cpus=0.5).remote(str(scenes), (rank, 3)) for rank in range(3)]
        for _ in range(4):
            parts = ray.get([actor.step.remote() for actor in actors], timeout=250)
            assert sum(parts, []) == [sample.id for sample in next(alone)]


def test_a_stream_travels_to_spawned_workers_of_any_pool(scenes):
    stream = Stream(scenes, seed=3)
    stream.read(0, 5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(stream.read, (0, 30)) == stream.read(0, 30)
