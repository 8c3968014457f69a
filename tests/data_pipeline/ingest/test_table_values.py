"""What stands in the columns of tables: missing columns and values, types that JSON lacks, names that samples use."""

import datetime
import decimal
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.ingest.records import json_value
from data_pipeline.ingest.shard import DETAIL_AT_MOST
from data_pipeline.stream.reader import Stream


@pytest.fixture
def build(tmp_path, build_here, make_png):
    """build(kind, rows or table, ...) -> (stats, samples, rejects); row n has image n.png."""
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(make_png(number))

    def run(kind, rows, filters=None, **more):
        path = tmp_path / f"x.{kind}"
        if kind == "parquet":
            pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
        else:
            path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
        source = {"kind": kind, "path": str(path), **more}
        stats = build_here(source=source, output=f"{tmp_path}/out", filters=filters or {})
        assert stats["in"] == stats["out"] + sum(stats["rejected"].values())
        stream = Stream(tmp_path / "out", seed=0)
        rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
        return stats, [stream.fetch(number) for number in range(stream.samples)], rejects

    return run


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_column_that_the_first_rows_lack_is_one_that_a_later_row_has(kind, build):
    rows = [{"image": "0.png", "title": "a"}, {"image": "1.png"}, {"image": "2.png", "caption": "c", "title": "d"}]
    stats, samples, _ = build(kind, rows, captions=["title", "caption"])
    assert (stats["in"], stats["rejected"]) == (3, {"empty_caption": 1})
    assert [sample.texts for sample in samples] == [("a",), ("d", "c")]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_column_that_no_row_has_is_refused_with_those_that_are_there(kind, build):
    with pytest.raises(
        ConfigError, match=r"source.captions='caption': not a column of .*; columns are image, title, text"
    ):
        build(kind, [{"image": "0.png", "title": "a"}, {"image": "0.png", "text": "b"}])


def test_a_column_of_jsonl_may_stand_in_one_of_several_files(tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    for name, column in (("a", "title"), ("b", "caption")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"image": "0.png", column: name}))
    source = {"kind": "jsonl", "path": f"{tmp_path}/a.jsonl::{tmp_path}/b.jsonl", "captions": ["caption", "title"]}
    stats = build_here(source=source, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"]) == (2, 2)


# ------------------------------------------------------------------------------------------------- values


def numbers_of_json(text):
    """The values of a JSON text; names such as NaN, which are not JSON, are refused."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.datetimes()
    | st.dates()
    | st.times()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.timedeltas()
    | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.lists(st.tuples(st.text(max_size=3) | st.integers(), inner), max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_every_value_but_bytes_can_stand_in_json(value):
    numbers_of_json(json.dumps(json_value(value), allow_nan=False))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_value_of_json_is_itself(value):
    assert json_value(value) == value


def test_times_decimals_and_maps_are_kept_and_can_be_asked_for(build):
    when = [datetime.datetime(2024, 1, 2, 3, 4, 5), datetime.datetime(2023, 1, 1)]
    table = pa.table(
        {
            "image": ["0.png", "1.png"],
            "caption": ["a", "b"],
            "when": pa.array(when, pa.timestamp("us")),
            "exact": pa.array([when[0]] * 2, pa.timestamp("ns", tz="UTC")),
            "day": pa.array([when[0].date()] * 2),
            "long": pa.array([90] * 2, pa.duration("s")),
            "price": pa.array([decimal.Decimal("12.50"), decimal.Decimal("1.25")]),
            "number": pa.array([decimal.Decimal(10**12)] * 2, pa.decimal128(38, 0)),
            "large": pa.array([decimal.Decimal(10**30)] * 2, pa.decimal128(38, 0)),
            "tags": pa.array([[("a", 1.5)], [("a", math.nan)]], pa.map_(pa.string(), pa.float64())),
            "by_number": pa.array([[(1, "x")]] * 2, pa.map_(pa.int64(), pa.string())),
            "nested": pa.array([{"at": when[0], "score": math.inf}] * 2),
        }
    )
    filters = {"recent": 'when > "2023-06"', "dear": "price > 2", "tagged": "len(tags) == 1"}
    stats, (sample,), _ = build("parquet", table, filters)
    assert stats["rejected"] == {"recent": 1}
    assert sample.meta == {
        "when": "2024-01-02T03:04:05",
        "exact": "2024-01-02T03:04:05+00:00",
        "day": "2024-01-02",
        "long": 90,
        "price": "12.50",
        "number": 10**12,
        "large": str(10**30),
        "tags": {"a": 1.5},
        "by_number": [[1, "x"]],
        "nested": {"at": "2024-01-02T03:04:05", "score": None},
    }


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_nan_and_infinity_are_null_in_what_is_stored(kind, build, by_tarfile, tmp_path):
    rows = [{"image": "0.png", "caption": "a", "x": math.nan, "y": -math.inf, "z": [math.inf, 1.5]}]
    _, (sample,), _ = build(kind, rows)
    assert sample.meta == {"x": None, "y": None, "z": [None, 1.5]}
    (stored,) = by_tarfile(tmp_path / "out")
    assert numbers_of_json(stored["json"])["z"] == [None, 1.5]


def test_nan_beside_an_image_is_null_in_what_is_stored(tmp_path, build_here, folder, by_tarfile):
    (folder / "a/1.json").write_text('{"caption": "c", "score": NaN, "more": {"x": [-Infinity]}}')
    build_here(source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out")
    trees = [numbers_of_json(sample["json"]) for sample in by_tarfile(tmp_path / "out")]
    assert {"score": None, "more": {"x": [None]}}.items() <= trees[1].items()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_with_the_names_of_a_samples_own_are_kept_and_can_be_asked_for(kind, build):
    rows = [{"image": f"{n}.png", "caption": "a", "key": n, "captions": f"other {n}"} for n in range(3)]
    stats, samples, _ = build(kind, rows, {"late": "key >= 1"})
    assert stats["rejected"] == {"late": 1}
    assert [(sample.key, sample.texts, sample.meta) for sample in samples] == [
        (f"{n:09d}", ("a",), {"source_key": n, "source_captions": f"other {n}"}) for n in (1, 2)
    ]


def test_the_key_can_be_asked_for_whatever_its_column_is_named(build):
    rows = [{"image": f"{n}.png", "caption": "a", "id": f"k{n}"} for n in range(3)]
    stats, _, _ = build("parquet", rows, {"one": 'key == "k1"'}, key="id")
    assert (stats["out"], stats["rejected"]) == (1, {"one": 2})


def test_a_column_that_cannot_be_asked_for_is_told_with_its_other_name(build):
    with pytest.raises(ConfigError, match="'text' is not a column that filters can use.*named caption"):
        build("parquet", [{"image": "0.png", "text": "a"}], {"long": "len(text) > 3"}, captions=["text"])


def test_times_that_python_cannot_hold_cost_no_row(build):
    table = pa.table({"image": ["0.png"], "caption": ["a"], "when": pa.array([2**60], pa.timestamp("us"))})
    stats, (sample,), _ = build("parquet", table)
    assert stats["rejected"] == {} and isinstance(sample.meta["when"], str)


# ---------------------------------------------------------------------------------------- keys and details


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_null_or_nan_key_is_no_key(kind, missing, build):
    rows = [{"image": f"{n}.png", "caption": "a", "id": key} for n, key in enumerate([1.5, missing, missing, 2.5])]
    stats, samples, rejects = build(kind, rows, key="id")
    assert (stats["in"], stats["rejected"]) == (4, {"no_key": 2})
    assert [sample.key for sample in samples] == ["1.5", "2.5"]
    assert [row["key"] for row in rejects] == ["row 000000001", "row 000000002"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nan_in_place_of_an_image_or_a_caption_is_a_missing_one(kind, build):
    rows = [{"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": None}, {"image": None, "caption": "b"}]
    if kind == "jsonl":
        rows = [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
    stats, _, _ = build(kind, rows)
    assert stats["rejected"] == {"empty_caption": 1, "no_image": 1}


@pytest.mark.parametrize("column", ["image", "caption"])
@pytest.mark.parametrize(
    "value", [["x" * 80] * 4000, {"path": "y" * 300_000}, 5, True, {"a": {"b": []}}, "/" + "z" * 300_000]
)
def test_a_value_of_another_type_is_a_row_of_rejects_with_a_short_detail(column, value, build):
    rows = [{"image": "0.png", "caption": "a"}, {"image": "1.png", "caption": "b", column: value}]
    stats, samples, rejects = build("jsonl", rows)
    if column == "caption" and isinstance(value, str | list):
        return
    assert len(samples) == 1 and [len(row["detail"]) <= DETAIL_AT_MOST for row in rejects] == [True]
