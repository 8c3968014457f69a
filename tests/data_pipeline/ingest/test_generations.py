"""Builds that fetch, compare, retry and grow: the account is exact, and what stands never changes."""

import base64
import dataclasses
import hashlib
import json
import re
import resource
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest import run, shard
from data_pipeline.ingest.plan import make_plan
from data_pipeline.ingest.run import retry
from data_pipeline.shards.manifest import canonical_json, read_manifest
from data_pipeline.shards.verify import verify
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream
from tests.data_pipeline.web import Web

FAST = {"allow_networks": ["127.0.0.0/8"], "timeout_s": 20, "attempts": 2}
PATHS = [
    "/file/0.png",
    "/file/gone",
    "/file/1.png",
    "/status/503/x",
    "/cut/1.png",
    "/file/html.png",
    "/file/empty",
    "/huge/x",
]
REASONS = {"http_404": 1, "http_503": 1, "fetch_cut_short": 1, "not_an_image": 1, "empty_file": 1, "too_large": 1}


@pytest.fixture
def web(tmp_path, make_png):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.png").write_bytes(make_png(number))
    (folder / "html.png").write_bytes(b"<html>not found</html>")
    (folder / "empty").touch()
    with Web(folder) as server:
        yield server


def write_rows(path, web, paths):
    lines = [
        json.dumps({"id": f"k{n}", "image": web.address + one, "caption": f"c {n}"}) for n, one in enumerate(paths)
    ]
    path.write_text("\n".join(lines))


def config_of(tmp_path, **more):
    source = {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl", "key": "id"}
    return {"source": source, "output": f"{tmp_path}/out", "shard_size": 3, "fetch": FAST, **more}


def keys(output):
    stream = Stream(output, seed=0)
    return [stream.fetch(number).key for number in range(stream.samples)]


def rejects(output):
    return {row["key"]: row for row in pq.read_table(output / "rejects.parquet").to_pylist()}


def fake_names(digests):
    """Digests of the files that make up the dataset: what a build with other addresses of the same images shares."""
    return {name: digest for name, digest in digests.items() if re.fullmatch(r"\d+\.tar(\.idx)?", name)}


# ---------------------------------------------------------------------------------------------- fetching


@pytest.mark.slow
def test_a_fetched_build_accounts_for_every_address(web, tmp_path, build_here):
    write_rows(tmp_path / "rows.jsonl", web, [*PATHS[:3], "/stall/x", *PATHS[4:]])
    stats = build_here(**config_of(tmp_path, fetch={**FAST, "timeout_s": 2}))
    stalled = {"fetch_timeout" if name == "http_503" else name: count for name, count in REASONS.items()}
    assert (stats["in"], stats["out"], stats["rejected"]) == (8, 2, stalled)
    assert keys(tmp_path / "out") == ["k0", "k2"]
    assert Stream(tmp_path / "out", seed=0).fetch(0).meta == {"url": f"{web.address}/file/0.png"}
    found = rejects(tmp_path / "out")
    assert (found["k1"]["http_status"], found["k1"]["transient"], found["k1"]["url"]) == (
        404,
        False,
        web.address + PATHS[1],
    )
    assert (found["k3"]["attempts"], found["k3"]["transient"]) == (2, True)
    verify(tmp_path / "out")
    assert not (tmp_path / "out/.raw").exists() and not (tmp_path / "out/.tmp").exists()


def test_what_was_fetched_once_is_what_a_build_that_was_interrupted_goes_on_with(web, tmp_path, build_here, make_png):
    write_rows(tmp_path / "rows.jsonl", web, [f"/file/{number}.png" for number in range(6)])
    made = []
    original = shard.build_shard

    def interrupted(plan, number, after=None):
        made.append(shard.fetch_shard(plan, number))
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_here(**config_of(tmp_path))
    (web.folder / "0.png").write_bytes(make_png(99))  # the web has changed meanwhile
    assert made == [3] and run.build_shard is original
    build_here(**config_of(tmp_path))
    assert Stream(tmp_path / "out", seed=0).fetch(0).image == make_png(0)
    assert web.asked["/file/0.png"] == 1


def test_a_cache_of_ones_own_is_kept_and_serves_other_builds(web, tmp_path, build_here, tree_digests):
    write_rows(tmp_path / "rows.jsonl", web, [f"/file/{number}.png" for number in range(4)])
    build_here(**config_of(tmp_path, fetch={**FAST, "cache": f"{tmp_path}/cache"}))
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert names == {hashlib.sha256((web.folder / f"{n}.png").read_bytes()).hexdigest() for n in range(4)}


def test_columns_are_judged_before_anything_is_fetched(web, tmp_path, build_here):
    rows = [
        {"image": f"{web.address}/file/{number}.png", "caption": "" if number == 1 else "c", "nsfw": number / 10}
        for number in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "jsonl", "path": f"{tmp_path}/rows.jsonl"}
    filters = {"unsafe": "nsfw < 0.35", "too_narrow": "width >= 16 and aspect <= 1"}
    stats = build_here(**config_of(tmp_path, source=source, filters=filters))
    assert stats["rejected"] == {"empty_caption": 1, "unsafe": 1} and stats["out"] == 3
    assert sorted(web.asked) == ["/file/0.png", "/file/2.png", "/file/3.png"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_rows_are_chosen_by_the_scores_that_laion_publishes(tmp_path, build_here, make_png, kind):
    (tmp_path / "0.png").write_bytes(make_png())
    scores = [("UNLIKELY", 0.1, 6.5, 0.33), ("NSFW", 0.1, 6.5, 0.33), ("UNLIKELY", 0.9, 6.5, 0.33)]
    scores += [("UNLIKELY", 0.1, 4.0, 0.33), ("UNLIKELY", 0.1, 6.5, 0.2), ("UNSURE", None, 6.5, 0.3)]
    names = ("NSFW", "pwatermark", "AESTHETIC_SCORE", "similarity")
    rows = [{"URL": "0.png", "TEXT": f"c{n}", **dict(zip(names, row, strict=True))} for n, row in enumerate(scores)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    else:
        lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
        (tmp_path / "x.csv").write_text("\n".join(lines))
    filters = {"unsafe": "NSFW in ['UNLIKELY', 'UNSURE']", "watermark": "pwatermark < 0.5"}
    filters |= {"ugly": "AESTHETIC_SCORE >= 5", "unlike": "similarity >= 0.28"}
    source = {"kind": kind, "path": f"{tmp_path}/x.{kind}", "image": "URL", "captions": ["TEXT"]}
    stats = build_here(source=source, output=f"{tmp_path}/out", filters=filters)
    assert stats["rejected"] == {"unsafe": 1, "watermark": 2, "ugly": 1, "unlike": 1}
    assert Stream(tmp_path / "out", seed=0).fetch(0).texts == ("c0",)


def test_a_condition_on_the_image_sees_the_size_that_it_came_with(folder, build_here, tmp_path):
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out"}
    with pytest.raises(DataError, match="too_small_for_us 6"):
        build_here(**tree, filters={"too_small_for_us": "width >= 17"}, images={"mode": "stretch", "size": 32})


def test_a_misspelt_column_in_a_condition_is_refused_before_the_build(tmp_path, build_here):
    (tmp_path / "x.csv").write_text("image,caption,similarity\nhttp://h/x,c,0.3\n")
    tree = {"source": {"kind": "csv", "path": f"{tmp_path}/x.csv"}, "output": f"{tmp_path}/out"}
    with pytest.raises(ConfigError, match="'similarty' is not a column.*similarity"):
        build_here(**tree, filters={"low": "similarty > 0.3"})


# ------------------------------------------------------------------------------------------------- retry


@pytest.mark.slow
def test_retry_adds_what_failed_and_changes_nothing_that_stands(web, tmp_path, build_here, make_config, make_png):
    write_rows(tmp_path / "rows.jsonl", web, PATHS)
    tree = config_of(tmp_path)
    first = build_here(**tree)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("0*")}
    (web.folder / "gone").write_bytes(make_png(20))
    (web.folder / "html.png").write_bytes(make_png(21))
    second = retry(make_config(**tree), progress=False)
    left = {name: count for name, count in REASONS.items() if name not in ("http_404", "not_an_image")}
    assert (second["in"], second["out"], second["rejected"]) == (8, 4, left)
    assert all((tmp_path / "out" / name).read_bytes() == data for name, data in before.items())
    assert keys(tmp_path / "out") == ["k0", "k2", "k1", "k5"]
    assert set(rejects(tmp_path / "out")) == {"k3", "k4", "k6", "k7"}
    verify(tmp_path / "out")
    storage = open_storage(tmp_path / "out")
    old = json.loads(storage.get(f"manifest-{first['fingerprint'][:12]}.json"))
    assert old["samples"] == 2 and read_manifest(storage).samples == 4
    assert hashlib.sha256(storage.get(f"manifest-{first['fingerprint'][:12]}.json")).hexdigest() == first["fingerprint"]


@pytest.mark.slow
def test_retry_again_and_again_counts_every_row_once(web, tmp_path, build_here, make_config, make_png):
    write_rows(tmp_path / "rows.jsonl", web, PATHS)
    tree = config_of(tmp_path)
    build_here(**tree)
    for name in ("gone", "html.png", "empty"):
        (web.folder / name).write_bytes(make_png(len(name)))
        stats = retry(make_config(**tree), progress=False)
        assert stats["in"] == 8 == stats["out"] + sum(stats["rejected"].values())
        verify(tmp_path / "out")
    assert stats["rejected"] == {"http_503": 1, "fetch_cut_short": 1, "too_large": 1}


def test_retry_with_nothing_to_do_changes_nothing(scenes, make_config, build_here, tree_digests):
    before = tree_digests(scenes)
    tree = {"source": {"kind": "scenes", "count": 25}, "output": str(scenes), "shard_size": 10}
    assert retry(make_config(**tree), progress=False)["out"] == 25
    assert tree_digests(scenes) == before


def test_retry_that_was_interrupted_is_finished_to_the_same_bytes(
    folder, build_here, make_config, tmp_path, tree_digests
):
    good = {path: path.read_bytes() for path in folder.rglob("*.png")}
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 2}
    for path in list(good)[1:]:
        path.write_bytes(b"")
    build_here(**tree)
    for path, data in good.items():
        path.write_bytes(data)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    retry(make_config(**tree), progress=False)
    whole = tree_digests(tmp_path / "out")
    for kept in (1, 2):
        copy = tmp_path / f"copy{kept}"
        shutil.copytree(tmp_path / "copy", copy)
        made = []

        def some(plan, number, after=None, made=made, kept=kept):
            if len(made) == kept:
                raise KeyboardInterrupt
            made.append(number)
            return shard.build_shard(plan, number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "build_shard", some)
            with pytest.raises(KeyboardInterrupt):
                retry(make_config(**{**tree, "output": str(copy)}), progress=False)
        retry(make_config(**{**tree, "output": str(copy)}), progress=False)
        assert tree_digests(copy) == whole


def test_retry_by_other_rules_is_refused(scenes, make_config, build_here):
    tree = {"source": {"kind": "scenes", "count": 25}, "output": str(scenes), "shard_size": 10}
    with pytest.raises(ConfigError, match="belongs to another build(.|\n)*images"):
        retry(make_config(**tree, images={"format": "jpeg"}), progress=False)


PINS = ["[", "[]", "{}", '{"base": "../../x"}', '{"source": 7}', '{"parts": [{"rows": -1, "digest": ""}]}', "[" * 10**5]


@pytest.mark.parametrize("held", PINS)
@pytest.mark.parametrize("name", ["build.json", "build-0001.json"])
def test_a_damaged_pin_is_an_error_in_a_line(scenes, build_here, held, name):
    (scenes / name).write_text(held)
    with pytest.raises((DataError, ConfigError), match=rf"{name}|belongs to another build"):
        build_here(source={"kind": "scenes", "count": 26}, output=str(scenes), shard_size=10, grow=True)


def test_retry_of_what_is_not_finished_is_refused(tmp_path, make_config):
    with pytest.raises(DataError, match="tessera data build"):
        retry(make_config(source={"kind": "scenes", "count": 5}, output=f"{tmp_path}/none"), progress=False)


# ------------------------------------------------------------------------------------------------ growth


def test_new_files_of_a_folder_become_new_shards(folder, build_here, tmp_path, make_png, tree_digests):
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 4}
    first = build_here(**tree)
    before = tree_digests(tmp_path / "out")
    (folder / "a" / "00.png").write_bytes(make_png(30))  # sorts between the old ones
    (folder / "a" / "00.txt").write_text("new")
    with pytest.raises(ConfigError, match="grow=true"):
        build_here(**tree)
    assert tree_digests(tmp_path / "out") == before
    second = build_here(**tree, grow=True)
    assert (second["in"], second["out"], second["shards"]) == (7, 7, 3)
    after = tree_digests(tmp_path / "out")
    assert {name: after[name] for name in fake_names(before)} == fake_names(before)
    assert keys(tmp_path / "out") == ["a/0", "a/1", "b/0", "b/1", "b/2", "c", "a/00"]
    assert build_here(**tree, grow=True)["fingerprint"] == second["fingerprint"] != first["fingerprint"]
    assert tree_digests(tmp_path / "out") == after
    verify(tmp_path / "out")


def test_a_table_without_keys_grows_at_its_end_only(tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    path = tmp_path / "x.csv"
    path.write_text("image,caption\n" + "".join(f"0.png,c{number}\n" for number in range(5)))
    tree = {"source": {"kind": "csv", "path": str(path)}, "output": f"{tmp_path}/out", "shard_size": 3, "grow": True}
    build_here(**tree)
    for count in (7, 8):
        path.write_text("image,caption\n" + "".join(f"0.png,c{number}\n" for number in range(count)))
        assert build_here(**tree)["in"] == count
    stream = Stream(tmp_path / "out", seed=0)
    assert [stream.fetch(number).texts[0] for number in range(8)] == [f"c{number}" for number in range(8)]
    path.write_text(path.read_text().replace("c2", "cX") + "0.png,more\n")
    with pytest.raises(DataError, match="was built from"):
        build_here(**tree)


def test_growth_of_a_build_that_noted_no_sizes_is_told_not_to_continue(tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    path = tmp_path / "x.csv"
    path.write_text("image,caption\n0.png,a\n")
    tree = {"source": {"kind": "csv", "path": str(path)}, "output": f"{tmp_path}/out", "grow": True}
    build_here(**tree)
    pin = json.loads((tmp_path / "out/build.json").read_bytes())
    pin["parts"] = [{name: part[name] for name in ("rows", "digest")} for part in pin["parts"]]
    (tmp_path / "out/build.json").write_bytes(canonical_json(pin))
    path.write_text(path.read_text() + "0.png,b\n")
    with pytest.raises(DataError, match="was built from"):
        build_here(**tree)


def test_growing_and_retrying_in_turn_keeps_the_account(folder, build_here, make_config, tmp_path, make_png):
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 4}
    (folder / "b/0.png").write_bytes(b"")
    assert build_here(**tree)["rejected"] == {"empty_file": 1}
    (folder / "0.png").write_bytes(make_png(7))
    (folder / "0.txt").write_text("zero")
    (folder / "1.png").write_bytes(b"no")
    (folder / "1.txt").write_text("one")
    grown = build_here(**tree, grow=True)
    assert (grown["in"], grown["out"], grown["rejected"]) == (8, 6, {"empty_file": 1, "not_an_image": 1})
    (folder / "b/0.png").write_bytes(make_png(8))
    (folder / "1.png").write_bytes(make_png(9))
    again = retry(make_config(**tree), progress=False)
    assert (again["in"], again["out"], again["rejected"]) == (8, 8, {})
    assert keys(tmp_path / "out") == ["a/0", "a/1", "b/1", "b/2", "c", "0", "1", "b/0"]
    rows = [row["row"] for s in range(3) for row in pq.read_table(tmp_path / f"out/0000{s}.parquet").to_pylist()]
    assert sorted(set(rows)) == list(range(8))
    verify(tmp_path / "out")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_without_a_key_are_told_apart(tmp_path, build_here, kind):
    def write(keys):
        rows = [{"id": key, "image": "gone.png", "caption": "c"} for key in keys]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
        elif kind == "jsonl":
            (tmp_path / "x.jsonl").write_text("\n".join("{" if row["id"] == "" else json.dumps(row) for row in rows))
        else:
            lines = ["id,image,caption", *(f"{row['id'] or ''},gone.png,c" for row in rows)]
            (tmp_path / "x.csv").write_text("\n".join(lines))

    def found():
        table = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
        return [(row["row"], row["key"], row["reason"]) for row in table]

    def nameless(row, key):
        return (row, f"row {row:09d}", "unreadable_row" if kind == "jsonl" and key == "" else "no_key")

    source = {"kind": kind, "path": f"{tmp_path}/x.{kind}", "key": "id"}
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": 2}
    keys = ["000000003", None, "", "b", None, "b"]
    write(keys)
    with pytest.raises(DataError, match="all 6 rows were rejected"):
        build_here(**tree)
    expected = [(0, "000000003", "unreadable_file"), nameless(1, None), nameless(2, ""), (3, "b", "unreadable_file")]
    expected += [nameless(4, None), (5, "b", "duplicate_key")]
    assert found() == expected


def test_growth_and_retry_account_for_rows_without_a_key(tmp_path, build_here, make_config, make_png):
    (tmp_path / "0.png").write_bytes(make_png())

    def lines(keys):
        rows = ["{" if key == "" else json.dumps({"id": key, "image": "0.png", "caption": "c"}) for key in keys]
        (tmp_path / "x.jsonl").write_text("\n".join(rows))

    source = {"kind": "jsonl", "path": f"{tmp_path}/x.jsonl", "key": "id"}
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": 2, "grow": True}
    lines(["a", "", None])
    assert build_here(**tree)["rejected"] == {"unreadable_row": 1, "no_key": 1}
    lines(["a", "", None, "b", None, "", "", "a"])
    grown = build_here(**tree)
    assert (grown["in"], grown["out"], grown["rejected"]) == (7, 2, {"unreadable_row": 3, "no_key": 2})
    lines(["a", "c", None, "b", None, "", "", "a"])  # mended: a row that the dataset lacks
    assert build_here(**tree)["out"] == 3
    again = retry(make_config(**tree), progress=False)
    assert again["in"] == 8 == again["out"] + sum(again["rejected"].values())
    verify(tmp_path / "out")


# --------------------------------------------------------------------------------------------- duplicates


def spread(tmp_path, images, captions=None):
    (tmp_path / "img").mkdir()
    for number, data in enumerate(images):
        (tmp_path / f"img/{number:02d}.png").write_bytes(data)
        (tmp_path / f"img/{number:02d}.txt").write_text(captions[number] if captions else f"c{number}")
    return {"kind": "folder", "path": f"{tmp_path}/img"}


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2, 5, 100])
def test_of_equal_images_the_first_stays_in_every_sharding(tmp_path, build_here, make_png, shard_size):
    pictures = [make_png(seed) for seed in (0, 1, 0, 2, 1, 0)]
    source = spread(tmp_path, pictures, ["", *"bcdef"])  # the very first is rejected: the next of its equals stays
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": shard_size, "dedup": {"exact": True}}
    stats = build_here(**tree)
    assert stats["rejected"] == {"empty_caption": 1, "duplicate_image": 2}
    assert keys(tmp_path / "out") == ["01", "02", "03"]
    assert {row["detail"] for row in rejects(tmp_path / "out").values()} >= {
        "same bytes as row 1",
        "same bytes as row 2",
    }
    assert not list((tmp_path / "out").glob("*_survey.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1, 2, 100])
def test_near_duplicates_are_found_over_all_shards_and_over_generations(tmp_path, build_here, make_config, shard_size):
    import cv2
    import numpy as np

    def photo(seed, quality):
        small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        picture = cv2.resize(small, (96, 96), interpolation=cv2.INTER_CUBIC)
        return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()

    source = spread(tmp_path, [photo(0, 95), photo(1, 95), photo(0, 70), photo(2, 95)])
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": shard_size, "dedup": {"near_bits": 6}}
    assert build_here(**tree)["rejected"] == {"near_duplicate": 1}
    (tmp_path / "img/04.png").write_bytes(photo(1, 60))
    (tmp_path / "img/05.png").write_bytes(photo(3, 60))
    for name in ("04", "05"):
        (tmp_path / f"img/{name}.txt").write_text("new")
    stats = build_here(**tree, grow=True)
    assert stats["rejected"] == {"near_duplicate": 2} and keys(tmp_path / "out") == ["00", "01", "03", "05"]
    assert rejects(tmp_path / "out")["04"]["detail"] == "looks like row 1"
    assert retry(make_config(**tree), progress=False)["rejected"] == {"near_duplicate": 2}  # nothing to try again


@pytest.mark.slow
def test_duplicates_among_rows_tried_again_are_found_whatever_the_order_of_their_ids(
    folder, build_here, make_config, tmp_path, make_png
):
    source = {"kind": "folder", "path": str(folder)}
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": 4, "dedup": {"exact": True}}
    (folder / "a/0.png").write_bytes(b"")
    build_here(**tree)
    for name in ("0", "1"):  # they come before the others, with later ids
        (folder / f"{name}.png").write_bytes(b"")
        (folder / f"{name}.txt").write_text("new")
    assert build_here(**tree, grow=True)["rejected"] == {"empty_file": 3}
    for name, seed in {"0": 40, "1": 2, "a/0": 40}.items():  # 2: that of b/0
        (folder / f"{name}.png").write_bytes(make_png(seed))
    again = retry(make_config(**tree), progress=False)
    assert (again["in"], again["out"], again["rejected"]) == (8, 6, {"duplicate_image": 2})
    found = {key: row["detail"] for key, row in rejects(tmp_path / "out").items()}
    assert found == {"1": "same bytes as row 2", "a/0": "same bytes as row 6"}


# ----------------------------------------------------------------------------- the same build, begun twice


@pytest.mark.slow
@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("task", ["survey_shard", "build_shard"])
def test_of_two_runs_of_one_build_the_slower_ends_well_and_changes_nothing(
    web, tmp_path, build_here, tree_digests, task, begun
):
    write_rows(tmp_path / "rows.jsonl", web, [f"/file/{number % 7}.png" for number in range(10)])
    tree = config_of(tmp_path, dedup={"exact": True})
    original, calls, found = getattr(run, task), [], []

    def overtaken(plan, number, after=None):
        calls.append(number)
        if len(calls) == begun:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, task, original)
                found.append(build_here(**tree))
                found.append(tree_digests(tmp_path / "out"))
        return original(plan, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, task, overtaken)
        assert build_here(**tree) == found[0]
    assert tree_digests(tmp_path / "out") == found[1]


# ---------------------------------------------------------------------------------------------- bad input


def test_rows_of_every_kind_of_damage_are_counted(tmp_path, build_here, make_png):
    (tmp_path / "ok.png").write_bytes(make_png())
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_bytes(b"<!doctype html><html><body>403</body></html>")
    rows = [
        {"id": "a", "image": "ok.png", "caption": "tab\there\u0000 and \u0007bell"},
        {"id": "b", "image": "empty.png", "caption": "x"},
        {"id": "c", "image": "page.jpg", "caption": "x"},
        {"id": "a", "image": "ok.png", "caption": "again"},
        {"id": "d", "image": "none.png", "caption": "x"},
        {"id": "e", "caption": "x"},
        {"id": "f", "image": "ok.png", "caption": {"no": 1}},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    source = {"kind": "jsonl", "path": f"{tmp_path}/x.jsonl", "key": "id"}
    stats = build_here(source=source, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"]) == (8, 1)
    assert stats["rejected"] == {
        "empty_file": 1,
        "not_an_image": 1,
        "duplicate_key": 1,
        "unreadable_file": 1,
        "no_image": 1,
        "unreadable_caption": 1,
        "unreadable_row": 1,
    }
    assert Stream(tmp_path / "out", seed=0).fetch(0).texts == ("tab here and bell",)
    told = [(row["row"], row["reason"]) for row in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()]
    assert told == [
        (1, "empty_file"),
        (2, "not_an_image"),
        (3, "duplicate_key"),
        (4, "unreadable_file"),
        (5, "no_image"),
        (6, "unreadable_caption"),
        (7, "unreadable_row"),
    ]


@pytest.mark.parametrize("kind", ["muge", "csv"])
def test_wrong_base64_is_a_row_of_rejects(tmp_path, build_here, make_png, kind):
    good = base64.urlsafe_b64encode(make_png()).decode()
    images = [good, "@@@@", good[:400], good + "!", ""]
    if kind == "muge":
        (tmp_path / "x").write_text("".join(f"{n}\t红色外套 {n}\t{image}\n" for n, image in enumerate(images)))
        source = {"kind": "muge", "path": f"{tmp_path}/x"}
    else:
        (tmp_path / "x").write_text("caption,image\n" + "".join(f"c{n},{image}\n" for n, image in enumerate(images)))
        source = {"kind": "csv", "path": f"{tmp_path}/x", "base64": True}
    stats = build_here(source=source, output=f"{tmp_path}/out")
    told = {row["row"]: row["reason"] for row in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()}
    assert told == {1: "wrong_base64", 2: "truncated", 3: "wrong_base64", 4: "no_image"}
    assert (stats["in"], stats["out"]) == (5, 1) and sum(stats["rejected"].values()) == 4


def test_a_disk_that_fills_up_ends_the_build_and_the_same_command_finishes_it(
    scenes, build_here, tmp_path, tree_digests
):
    tree = {"source": {"kind": "scenes", "count": 25}, "output": f"{tmp_path}/full", "shard_size": 10}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(DataError, match="File too large.*run it again"):
            build_here(**tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert build_here(**tree)["out"] == 25
    assert tree_digests(tmp_path / "full") == tree_digests(scenes)


@pytest.mark.parametrize("output", ["out", "OUT"])
def test_a_node_without_the_folder_of_the_command_is_refused_where_paths_are_relative(
    make_config, tmp_path, monkeypatch, output
):
    monkeypatch.chdir(tmp_path)
    config = make_config(source={"kind": "scenes", "count": 3}, output=output.replace("OUT", f"{tmp_path}/out"))
    plan = dataclasses.replace(make_plan(config), folder=f"{tmp_path}/elsewhere")
    if output == "OUT":
        assert shard.build_shard(plan, 0)["out"] == 3
    else:
        with pytest.raises(DataError, match="elsewhere: No such file.* base of out; use absolute paths"):
            shard.build_shard(plan, 0)
        assert not (tmp_path / "out").exists()
