"""Disks that are full and buckets that are closed, for real: a clear error, and the same command finishes it later."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.storage import open_storage
from tests.data_pipeline.web import Web
from tests.gateway import OTHER, Gateway

SCENES = {"source": {"kind": "scenes", "count": 60}, "shard_size": 20}


def on_s3(test):
    return pytest.mark.real(pytest.mark.slow(test))


# ------------------------------------------------------------------------------------------------- no room


class Disk:
    """A file system of a few blocks in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.folder)], check=True, timeout=10)


@pytest.fixture
def disk(tmp_path):
    """60 KB, and what fills a disk: the operating system's own ENOSPC."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", folder], capture_output=True, timeout=10)
    if made.returncode:
        message = f"mounting a tmpfs needs root ({made.stderr.decode().strip()}): run the tests as root"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    yield Disk(folder)
    subprocess.run(["umount", "-l", folder], check=True, timeout=10)


def test_the_disk_of_these_tests_does_fill_up(disk):
    with pytest.raises(OSError) as caught:
        (disk.folder / "x").write_bytes(bytes(100_000))
    assert caught.value.errno == errno.ENOSPC


def test_an_output_without_room_ends_the_build_and_with_room_it_is_finished(disk, build_here, tmp_path, tree_digests):
    with pytest.raises(DataError, match=r"disk/out/.*No space left on device.*run it again") as caught:
        build_here(**SCENES, output=f"{disk.folder}/out")
    assert caught.value.exit_code == 74
    stands = {name: data for name, data in tree_digests(disk.folder / "out").items() if name.endswith("_stats.json")}
    assert not (disk.folder / "out/manifest.json").exists()
    disk.resize(4000)
    build_here(**SCENES, output=f"{disk.folder}/out")
    build_here(**SCENES, output=f"{tmp_path}/whole")
    whole = tree_digests(tmp_path / "whole")
    assert tree_digests(disk.folder / "out") == whole and stands.items() <= whole.items()


@pytest.mark.parametrize("kilobytes", range(4, 60, 8))
def test_wherever_the_room_ends_nothing_is_lost(disk, build_here, tmp_path, tree_digests, kilobytes):
    disk.resize(kilobytes)
    with pytest.raises(DataError, match="No space left on device"):
        build_here(**SCENES, output=f"{disk.folder}/out")
    disk.resize(4000)
    build_here(**SCENES, output=f"{disk.folder}/out")
    build_here(**SCENES, output=f"{tmp_path}/whole")
    assert tree_digests(disk.folder / "out") == tree_digests(tmp_path / "whole")


def test_a_cache_without_room_is_no_fault_of_the_addresses(disk, build_here, tmp_path, make_png, tree_digests):
    (tmp_path / "files").mkdir()
    with Web(tmp_path / "files") as web:
        for number in range(8):
            (tmp_path / f"files/{number}.png").write_bytes(make_png(number, side=64))
        lines = [f'{{"image": "{web.address}/file/{number}.png", "caption": "c"}}' for number in range(8)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        source = {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl"}
        fetch = {"allow_networks": ["127.0.0.0/8"], "cache": f"{disk.folder}/cache"}
        tree = {"source": source, "output": f"{tmp_path}/out", "fetch": fetch}
        with pytest.raises(DataError, match="disk/cache: No space left on device"):
            build_here(**tree)
        assert not (tmp_path / "out/00000_fetch.parquet").exists()  # nothing of it is written down as an outcome
        disk.resize(4000)
        assert (build_here(**tree)["out"], build_here(**tree)["rejected"]) == (8, {})


@pytest.mark.real
@pytest.mark.slow
def test_a_full_disk_is_74_on_the_command_line_and_the_same_command_finishes_it(disk, tmp_path, repository):
    config = tmp_path / "build.yaml"
    config.write_text(f"source: {{kind: scenes, count: 60}}\noutput: {disk.folder}/out\nshard_size: 20\nworkers: 1\n")
    command = [sys.executable, "-m", "launchers.cli", "data", "build", str(config), "--json"]
    full = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert full.returncode == 74 and "Traceback" not in full.stderr
    assert f"error: {disk.folder}/out" in full.stderr and "No space left on device" in full.stderr
    disk.resize(4000)
    assert subprocess.run(command, cwd=repository, capture_output=True, timeout=120).returncode == 0


@on_s3
def test_a_bucket_whose_quota_is_used_up_is_an_error_of_storage_and_is_finished_later(
    gateway: Gateway, bucket, build_here, tmp_path
):
    name, output = bucket.removeprefix("s3://"), f"{bucket}/set"
    gateway.limit_objects(name, 5)
    with pytest.raises(DataError, match=rf"{output}/.*: quota exceeded .QuotaExceeded.*again"):
        build_here(**SCENES, output=output)
    stands = contents(output)
    assert len(stands) == 5 and "manifest.json" not in stands
    gateway.limit_objects(name, -1)
    build_here(**SCENES, output=output)
    build_here(**SCENES, output=f"{tmp_path}/whole")
    assert stands.items() <= contents(output).items() and contents(output) == contents(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ no right


@pytest.fixture
def not_ours(bucket: str, monkeypatch):
    """The address of a bucket that belongs to another user than the one in the environment."""
    for name, value in OTHER.items():
        monkeypatch.setenv(name, value)
    return bucket


def contents(output):
    storage = open_storage(output)
    return {name: storage.get(name) for name in storage.list()}


READ, WRITE = ["s3:GetObject", "s3:ListBucket"], ["s3:PutObject"]
RIGHTS = [
    # what is allowed, with which objects, what the error is about
    ([], "*", "permission denied"),
    (READ, "*", "build.json: permission denied"),
    (WRITE, "*", "permission denied"),
    ([*READ, *WRITE], "*.json", "permission denied"),
]


@on_s3
@pytest.mark.parametrize(("actions", "keys", "said"), RIGHTS, ids=["nothing", "reading", "writing", "no shards"])
def test_a_bucket_without_the_right_is_refused_and_with_it_the_build_is_finished(
    gateway: Gateway, not_ours, build_here, actions, keys, said
):
    name, output = not_ours.removeprefix("s3://"), f"{not_ours}/set"
    gateway.allow(name, actions, keys)
    with pytest.raises(DataError, match=rf"{output}.*{said} .(AccessDenied|403).*grant these credentials") as caught:
        build_here(**SCENES, output=output)
    assert caught.value.exit_code == 74
    gateway.allow(name, [*READ, *WRITE, "s3:DeleteObject"])
    stands = contents(output)
    assert set(stands) <= {"build.json"}
    build_here(**SCENES, output=output)
    whole = contents(output)
    assert stands.items() <= whole.items() and len(whole) == 3 * 4 + 4
