"""A dataset that grew is still what it was under its older fingerprints."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.ingest import run
from data_pipeline.ingest.run import retry
from data_pipeline.shards.verify import verify
from data_pipeline.stream.reader import Stream


@pytest.fixture
def grown(folder, build_here, make_config, make_png, tmp_path):
    """Built of five rows of six, grown by one, then retried: -> what was read of each version when it was new."""
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 4}
    lost = (folder / "b/1.png").read_bytes()
    (folder / "b/1.png").write_bytes(b"")
    build_here(**tree)
    seen = [read(tmp_path / "out")]
    (folder / "a/new.png").write_bytes(make_png(30))
    (folder / "a/new.txt").write_text("new")
    build_here(**tree, grow=True)
    seen.append(read(tmp_path / "out"))
    (folder / "b/1.png").write_bytes(lost)
    retry(make_config(**tree), progress=False)
    return [*seen, read(tmp_path / "out")]


def read(dataset):
    """Fingerprint, samples of two epochs and more, and the state after them."""
    stream = Stream(dataset, seed=3)
    return stream.fingerprint, stream.read(0, 15), stream.state(15)


def test_every_version_reads_as_it_did_when_it_was_the_newest(grown, tmp_path):
    out = tmp_path / "out"
    assert [len({sample.key for sample in samples}) for _, samples, _ in grown] == [5, 6, 7]
    for fingerprint, samples, state in grown:
        for name in (fingerprint, fingerprint[:12]):
            assert read(f"{out}@{name}") == (fingerprint, samples, state)
    assert read(out) == grown[-1]


def test_a_saved_position_goes_on_with_the_version_it_was_saved_with(grown, tmp_path):
    out = tmp_path / "out"
    (first, _, state), *_ = grown
    with pytest.raises(DataError, match="samples: 5 saved, 7 now"):
        Stream(out, seed=3).check(state)
    Stream(f"{out}@{first}", seed=3).check(state)


def test_every_version_verifies(grown, tmp_path):
    out, fingerprints = tmp_path / "out", [fingerprint for fingerprint, _, _ in grown]
    for fingerprint, samples in zip(fingerprints, (5, 6, 7), strict=True):
        report = verify(f"{out}@{fingerprint}")
        assert (report["fingerprint"], report["samples"]) == (fingerprint, samples)
    assert sorted(verify(out)["versions"]) == sorted(fingerprint[:12] for fingerprint in fingerprints[:2])


def test_a_version_is_read_over_http(grown, tmp_path, serve, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    (first, samples, _), *_ = grown
    assert Stream(f"{serve(tmp_path / 'out')}@{first}", seed=3).read(0, 15) == samples


def test_a_version_that_is_not_kept_is_refused_with_those_that_are(grown, tmp_path):
    with pytest.raises(DataError, match="no version 0123456789ab; available are") as caught:
        Stream(f"{tmp_path}/out@0123456789ab", seed=0)
    assert all(fingerprint[:12] in str(caught.value) for fingerprint, _, _ in grown)


def test_an_older_manifest_that_was_edited_is_refused_and_told(grown, tmp_path):
    (first, _, _), *_ = grown
    path = tmp_path / "out" / f"manifest-{first[:12]}.json"
    tree = json.loads(path.read_text())
    tree["shards"][0]["digest"] = "0" * 64
    path.write_text(json.dumps(tree))
    for opened in (Stream, verify):
        with pytest.raises(DataError, match="no version"):
            opened(f"{tmp_path}/out@{first}", **({"seed": 0} if opened is Stream else {}))
    with pytest.raises(DataError, match=f"1 faults(.|\n)*no version {first[:12]}"):
        verify(tmp_path / "out")


def test_a_folder_whose_name_looks_like_a_version_is_a_folder(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "set@0123456789ab")
    assert Stream(tmp_path / "set@0123456789ab", seed=0).samples == 25


def test_rejects_are_the_last_outcome_of_each_row_by_id(
    folder, build_here, make_config, make_png, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "_ROWS_WRITTEN", 2)
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 2}
    good = {name: (folder / f"{name}.png").read_bytes() for name in ("a/0", "a/1", "b/0", "b/2")}
    for name in good:
        (folder / f"{name}.png").write_bytes(b"")
    build_here(**tree)
    for number in range(3):
        (folder / f"a/n{number}.png").write_bytes(b"no" if number else make_png(40))
        (folder / f"a/n{number}.txt").write_text("new")
    build_here(**tree, grow=True)
    for mended in ({"b/0": good["b/0"], "a/1": b"<html>"}, {"a/0": good["a/0"], "a/n1": b""}):
        for name, data in mended.items():
            (folder / f"{name}.png").write_bytes(data)
        retry(make_config(**tree), progress=False)
        last = {}
        for path in sorted((tmp_path / "out").glob("[0-9]*.parquet")):
            for row in pq.read_table(path).to_pylist():
                last[row["row"]] = (row["row"], row["key"], row["status"])
        found = pq.ParquetFile(tmp_path / "out/rejects.parquet")
        rows = [(row["row"], row["key"], row["reason"]) for row in found.read().to_pylist()]
        assert rows == [row for _, row in sorted(last.items()) if row[2] != "ok"]
        assert [found.metadata.row_group(n).num_rows for n in range(found.num_row_groups - 1)] == [2] * (len(rows) // 2)
    assert [reason for _, _, reason in rows] == ["not_an_image", "empty_file", "empty_file", "not_an_image"]
