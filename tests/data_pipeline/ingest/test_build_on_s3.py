"""Builds onto the real S3 gateway: byte for byte the local build, finished where it stopped, refused where not ours."""

import hashlib
import io
import json

import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest import run, shard
from data_pipeline.ingest.run import retry
from data_pipeline.shards.verify import verify
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream
from tests.data_pipeline.web import Web

pytestmark = [pytest.mark.real, pytest.mark.slow]

PATHS = [f"/file/{name}" for name in ("0.png", "gone", "1.png", "2.png", "0.png", "page.html", "empty", "3.png")]


@pytest.fixture
def web(tmp_path, make_png):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(make_png(number))
    (folder / "page.html").write_bytes(b"<html>not found</html>")
    (folder / "empty").touch()
    with Web(folder) as server:
        yield server


def add_rows(path, web, paths):
    """Rows k0, k1 ... with these addresses, after those that are there."""
    begin = len(path.read_text().splitlines()) if path.exists() else 0
    with path.open("a") as file:
        for number, one in enumerate(paths, begin):
            file.write(json.dumps({"id": f"k{number}", "image": web.address + one, "caption": f"图 {number}"}) + "\n")


@pytest.fixture
def tree(tmp_path, web):
    """Eight rows to fetch, of which four stay: two are no images, one is missing, one is there twice."""
    add_rows(tmp_path / "rows.jsonl", web, PATHS)
    return {
        "source": {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl", "key": "id"},
        "shard_size": 3,
        "fetch": {"allow_networks": ["127.0.0.0/8"], "attempts": 2, "cache": f"{tmp_path}/cache"},
        "dedup": {"exact": True},
    }


def digests(output):
    storage = open_storage(output)
    return {name: hashlib.sha256(storage.get(name)).hexdigest() for name in storage.list()}


def written(output):
    """When each object was written, and its tag."""
    storage = open_storage(output)
    pages = storage.client.list_objects_v2(Bucket=storage._bucket, Prefix=storage._prefix)
    return {entry["Key"].rpartition("/")[2]: (entry["LastModified"], entry["ETag"]) for entry in pages["Contents"]}


def everything(bucket):
    """Keys of all objects of the bucket."""
    storage = open_storage(bucket)
    return [entry["Key"] for entry in storage.client.list_objects_v2(Bucket=storage._bucket).get("Contents", ())]


@pytest.fixture
def built(tree, bucket, build_here):
    """A finished build in the bucket -> its address."""
    build_here(**tree, output=f"{bucket}/set")
    return f"{bucket}/set"


# ----------------------------------------------------------------------------------- same bytes, resuming


def test_the_bytes_are_those_of_the_local_build_and_nothing_else_is_left(tree, built, bucket, build_here, tmp_path):
    stats = build_here(**tree, output=f"{tmp_path}/local")
    assert stats["rejected"] == {"http_404": 1, "not_an_image": 1, "empty_file": 1, "duplicate_image": 1}
    assert digests(built) == digests(tmp_path / "local")
    assert sorted(everything(bucket)) == [f"set/{name}" for name in sorted(digests(tmp_path / "local"))]
    report, local = verify(built), verify(tmp_path / "local")
    assert {**report, "dataset": ""} == {**local, "dataset": ""} and report["samples"] == 4
    assert [sample.key for sample in Stream(built, seed=0).read(0, 4)] == [
        sample.key for sample in Stream(tmp_path / "local", seed=0).read(0, 4)
    ]
    rejects = pq.read_table(io.BytesIO(open_storage(built).get("rejects.parquet"))).to_pylist()
    assert [row["key"] for row in rejects] == ["k1", "k4", "k5", "k6"]


LOST = [
    ["manifest.json"],
    ["manifest.json", "stats.json", "rejects.parquet"],
    ["manifest.json", "00001_stats.json"],
    ["manifest.json", "00001_stats.json", "00001.parquet", "00001.tar.idx", "00001.tar"],
    ["manifest.json", *(f"0000{number}_stats.json" for number in range(3)), "00002.tar"],
]


def test_a_re_run_makes_what_is_missing_and_touches_nothing_else(built, tree, build_here):
    whole = digests(built)
    for lost in LOST:
        before = written(built)
        for name in lost:
            open_storage(built).remove(name)
        build_here(**tree, output=built)
        assert digests(built) == whole
        after = written(built)
        assert {name for name in whole if after[name] != before[name]} == set(lost)


def test_what_was_fetched_before_the_driver_was_lost_stays_in_the_bucket_until_the_end(
    tree, bucket, build_here, web, make_png
):
    output = f"{bucket}/set"
    del tree["fetch"]["cache"]

    def interrupted(plan, number, after=None):
        shard.fetch_shard(plan, number)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "survey_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_here(**tree, output=output)
    digest = hashlib.sha256(make_png(0)).hexdigest()
    assert {"set/build.json", "set/00000_fetch.parquet", f"set/.raw/{digest}"} <= set(everything(bucket))
    (web.folder / "0.png").write_bytes(make_png(99))  # the web has changed meanwhile
    build_here(**tree, output=output)
    assert Stream(output, seed=0).fetch(0).image == make_png(0)
    assert not [name for name in everything(bucket) if "/.raw/" in name]


def test_a_shared_cache_in_a_bucket_is_kept(tree, bucket, build_here, web, make_png):
    tree["fetch"]["cache"] = f"{bucket}/cache"
    build_here(**tree, output=f"{bucket}/set")
    wanted = {hashlib.sha256(data).hexdigest() for data in (b"", b"<html>not found</html>", *map(make_png, range(4)))}
    assert {name.removeprefix("cache/") for name in everything(bucket) if name.startswith("cache/")} == wanted


# ------------------------------------------------------------------------------------- a second writer


def test_a_second_writer_of_other_bytes_is_refused_and_overwrites_nothing(built, tree, build_here):
    storage = open_storage(built)
    for name in ("manifest.json", "00001_stats.json"):
        storage.remove(name)
    storage.replace("00001.tar", b"other")
    with pytest.raises(DataError, match="00001.tar: exists with sha256 .* nothing was overwritten"):
        build_here(**tree, output=built)
    assert storage.get("00001.tar") == b"other" and not storage.exists("manifest.json")


def test_another_configuration_in_the_same_prefix_is_refused(built, tree, build_here):
    before = written(built)
    with pytest.raises(ConfigError, match="belongs to another build(.|\n)*shard_size"):
        build_here(**{**tree, "shard_size": 4}, output=built)
    assert written(built) == before


# ---------------------------------------------------------------------------------- retry and growth


def test_retry_and_growth_add_shards_and_change_none(built, tree, build_here, make_config, web, make_png, tmp_path):
    first, config = digests(built), {**tree, "output": built}
    (web.folder / "gone").write_bytes(make_png(20))
    again = retry(make_config(**config), progress=False)
    assert (again["in"], again["out"]) == (8, 5)
    add_rows(tmp_path / "rows.jsonl", web, ["/file/3.png", "/file/4.png", "/file/5.png"])
    (web.folder / "5.png").write_bytes(make_png(5))
    with pytest.raises(ConfigError, match="grow=true"):
        build_here(**config)
    grown = build_here(**config, grow=True)
    assert (grown["in"], grown["out"], grown["rejected"]) == (
        11,
        6,
        {"http_404": 1, "not_an_image": 1, "empty_file": 1, "duplicate_image": 2},
    )
    assert verify(built)["samples"] == 6
    now = digests(built)
    changed = {name for name in first if now[name] != first[name]}
    assert changed == {"manifest.json", "stats.json", "rejects.parquet"}
    kept = [name for name in now if name.startswith("manifest-")]
    assert {now[name][:12] for name in kept} == {name[9:21] for name in kept} and len(kept) == 2
    assert now[f"manifest-{first['manifest.json'][:12]}.json"] == first["manifest.json"]
    assert build_here(**config, grow=True)["fingerprint"] == grown["fingerprint"] and digests(built) == now
