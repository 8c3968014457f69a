"""What an override means, by the type of its field; and what is said where YAML made something else of a text."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError
from data_pipeline.settings import (
    Location,
    OptionalLocation,
    Settings,
    _members,
    check_settings,
    load_settings,
    override_settings,
)
from data_pipeline.text.config import VocabConfig
from launchers.spec import KubernetesCluster, LocalCluster, SlurmCluster
from pretrain.config import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]


class Left(Settings):
    kind: Literal["left"] = "left"
    value: int = 0


class Right(Settings):
    kind: Literal["right"] = "right"
    value: str = ""


class Example(Settings):
    """A field of every type that the configurations have."""

    text: str = "before"
    maybe_text: str | None = "before"
    place: Location = "before"
    maybe_place: OptionalLocation = "before"
    choice: Literal["a", "b"] = "a"
    stage: Literal[0, 1] = 0
    number: pydantic.PositiveInt = 1
    share: float = 1.0
    weight: float | str = 1.0
    maybe_number: int | None = 5
    flag: bool = False
    pair: tuple[float, float] = (0.0, 0.0)
    names: tuple[str, ...] = ()
    maybe_names: tuple[str, ...] | None = None
    table: dict[str, str] = {}
    anything: dict[str, Any] = {}
    side: Left | Right = pydantic.Field(Left(), discriminator="kind")
    sides: tuple[Left | Right, ...] = ()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "empty.yaml"
    path.write_text("side: {kind: right}\n")
    return path


def read(empty: Path, *overrides: str) -> Example:
    return load_settings(Example, empty, overrides)


AS_WRITTEN = (
    "shots #2", "no", "yes", "true", "null", "~", "007", "1e3", "2024", "2024-01-01", "24:00:00", "1_000", "0x10",
    ".inf", "nan", "[a]", "{a: b}", "a: b", "'quoted'", '"quoted"', "a=b", " x ", "# x", "%x", "@x", "&x", "*x", "!x",
    "a\nb", "-", "é图🙂", "",
)  # fmt: skip


@pytest.mark.parametrize("text", AS_WRITTEN)
@pytest.mark.parametrize("field", ["text", "table.key", "side.value"])
def test_a_text_field_takes_what_was_written(field: str, text: str, empty: Path) -> None:
    found: Any = read(empty, f"{field}={text}").model_dump()
    for part in field.split("."):
        found = found[part]
    assert found == text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20))
def test_any_text_is_taken_as_it_is(text: str, empty: Path) -> None:
    found = read(empty, f"text={text}", f"maybe_text={text}", f"weight=1/{text}x")
    assert (found.text, found.maybe_text, found.weight) == (text, text, f"1/{text}x")


@pytest.mark.parametrize("text", [text for text in AS_WRITTEN if text not in ("", "~")])
def test_a_path_takes_what_was_written(text: str, empty: Path) -> None:
    found = read(empty, f"place={text}", f"maybe_place={text}")
    assert found.place == found.maybe_place == text


def test_an_empty_value_is_empty(empty: Path) -> None:
    words = ("text", "maybe_text", "maybe_place", "maybe_number")
    found = read(empty, *(f"{name}=" for name in words))
    assert [getattr(found, name) for name in words] == ["", None, None, None]


def test_a_path_that_must_be_there_is_not_empty(empty: Path) -> None:
    with pytest.raises(ConfigError, match=r"place = '': empty; set a file"):
        read(empty, "place=")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("number=007", 7), ("number=1e3", 1000), ("number=+10", 10), ("share=-1.5E+2", -150.0),
        ("share=3e-4", 3e-4), ("share=.5", 0.5),
        ("weight=2", 2), ("weight=1/3", "1/3"), ("maybe_number=null", None), ("maybe_number=3", 3), ("stage=1", 1),
        ("choice=b", "b"), ("flag=true", True), ("flag=no", False), ("flag=1", True), ("pair=[0.5,1e-1]", (0.5, 0.1)),
        ("names=[no, 007, 2024-01-01, 'a #b']", ("no", "007", "2024-01-01", "a #b")), ("names=[]", ()),
        ("maybe_names=[on]", ("on",)), ("maybe_names=null", None), ("table={a: 007}", {"a": "007"}),
        ("anything={a: 1, b: [true]}", {"a": 1, "b": [True]}), ("sides=[{kind: left, value: 3}]", (Left(value=3),)),
    ],
)  # fmt: skip
def test_a_value_is_read_by_the_type_of_its_field(override: str, value: Any, empty: Path) -> None:
    assert getattr(read(empty, override), override.partition("=")[0]) == value


def test_a_value_of_no_known_type_is_a_number_or_text(empty: Path) -> None:
    words = ("anything.a.b=1e-3", "anything.a.c=x #y", "anything.d=true", "anything.e=7")
    assert read(empty, *words).anything == {"a": {"b": 1e-3, "c": "x #y"}, "d": True, "e": 7}


@pytest.mark.parametrize(
    "text",
    [
        "1:30",
        "0x10",
        "2024-01-01",
        "1,5",
        "[1]",
        "true",
        "nan",
        "inf",
        "1e999",
        "",
        "ten",
        "1_000",
        "1_0.5",
        "１２",
        "٣",
    ],
)
def test_what_is_no_decimal_number_is_no_number(text: str, empty: Path) -> None:
    with pytest.raises(ConfigError, match="number"):
        read(empty, f"number={text}")


@pytest.mark.parametrize("text", ["inf", "-Infinity", "nan", "1e999", "1_000", "１２", "٣", "0x10", "ten"])
def test_words_and_other_digits_are_text_where_any_value_is_taken(text: str, empty: Path) -> None:
    assert read(empty, f"anything.a={text}").anything == {"a": text}


@pytest.mark.parametrize("override", ["share=1_000", "share=1_0.5e1_0", "maybe_number=1_0", "number=-1_0"])
def test_a_number_in_groups_is_refused_by_name(override: str, empty: Path) -> None:
    with pytest.raises(ConfigError, match=f"override '{override}': .* without underscores"):
        read(empty, override)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-._eE٣１ aif", max_size=8))
def test_a_value_of_no_known_type_is_text_or_a_finite_decimal_number(text: str) -> None:
    value = override_settings(Example, {}, [f"anything.a={text}"], "x").anything["a"]
    if isinstance(value, int | float):
        assert math.isfinite(value) and value == float(text) and set(text.strip()) <= set("0123456789+-.eE")


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_a_number_is_finite(text: str, empty: Path) -> None:
    with pytest.raises(ConfigError, match="finite"):
        read(empty, f"share={text}")


@pytest.mark.parametrize(("text", "value"), [("no", "no"), ("3", 3)])
def test_of_sections_that_differ_the_one_of_its_kind_is_meant(text: str, value: Any, empty: Path) -> None:
    assert read(empty, "side.kind=left", "side.value=3").side == Left(value=3)
    assert read(empty, f"side.value={text}").side == Right(value=text)


@pytest.mark.parametrize(
    "override", ["text", "=x", "side.kind.a=1", "names=[a", "sides=[a: b: c]", "text=\udcff", "text=\0"]
)
def test_what_is_no_override_is_refused(override: str, empty: Path) -> None:
    with pytest.raises(ConfigError, match="override"):
        read(empty, override)


def test_an_override_that_is_not_utf_8_is_to_be_typed_again(empty: Path) -> None:
    with pytest.raises(ConfigError, match="is not UTF-8; type the value again"):
        read(empty, "text=\udcff")


# ---------------------------------------------------------------------------------------- the user's own folder


@pytest.mark.parametrize(
    ("text", "expanded"),
    [("~", "/h"), ("~/a b", "/h/a b"), ("a/~", "a/~"), ("./~", "./~"), ("s3://~/x", "s3://~/x"), ("a::~/b", "a::/h/b")],
)
def test_a_tilde_is_the_users_home(
    text: str, expanded: str, empty: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", "/h")
    found = read(empty, f"place={text}", f"maybe_place={text}", f"text={text}")
    assert (found.place, found.maybe_place, found.text) == (expanded, expanded, text)
    (tmp_path / "file.yaml").write_text(json.dumps({"place": text}))
    assert load_settings(Example, tmp_path / "file.yaml").place == expanded


def test_a_tilde_of_nobody_is_refused(empty: Path) -> None:
    with pytest.raises(ConfigError, match=r"home folder ~nobody-here does not exist; .* or \./~nobody-here/x"):
        read(empty, "place=~nobody-here/x")


def test_every_path_of_a_run_and_of_a_build_knows_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    words = ["run", "initial", "data.dataset", "data.text_tokenizer", "data.image_tokenizer", "data.evaluation",
             "train.checkpoints", "tracking.uri"]  # fmt: skip
    run = load_settings(RunConfig, REPOSITORY / "configs/demo/gpt.yaml", [f"{word}=~/{word}" for word in words])
    assert all(f'"/h/{word}"' in run.model_dump_json() for word in words)
    words = ["source.path", "output", "image_tokenizer", "captions.deny", "fetch.cache"]
    build = load_settings(BuildConfig, REPOSITORY / "configs/data/folder.yaml", [f"{word}=~/{word}" for word in words])
    assert all(f'"/h/{word}"' in build.model_dump_json() for word in words)


# -------------------------------------------------------------------------------------------------- YAML files


@pytest.mark.parametrize(("text", "kind"), [("007", "int"), ("no", "bool"), ("1.5", "float"), ("2024-01-01", "date")])
def test_what_yaml_makes_of_a_text_is_explained(text: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"text: {text}\n")
    with pytest.raises(ConfigError, match=f"text = .*: YAML reads this as a {kind}, .* in quotation marks"):
        load_settings(Example, path)
    path.write_text(f'text: "{text}"\n')
    assert load_settings(Example, path).text == text


def test_the_home_of_this_user_is_the_one_of_the_system(empty: Path) -> None:
    assert read(empty, "place=~/x").place == os.path.expanduser("~/x")


@pytest.mark.parametrize(
    ("recipe", "override", "foreign"),
    [
        ("configs/clip/vit-b-32.yaml", "model.kind=bert", "kind 'clip', and 'bert' has no embed_dim, vision, text;"),
        (
            "configs/text_to_image/pai-painter-base.yaml",
            "model.kind=electra",
            "kind 'gpt', and 'electra' has no text_vocab",
        ),
        (
            "configs/image_tokenizer/vqgan-f16-16384.yaml",
            "task.kind=mlm",
            "kind 'reconstruction', and 'mlm' has no",
        ),
    ],
)
def test_another_kind_over_a_recipe_is_told_as_what_it_is(recipe: str, override: str, foreign: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_settings(RunConfig, REPOSITORY / recipe, [override])
    said = str(refused.value)
    assert foreign in said and "start from a file of kind" in said and "\n" not in said


def test_another_kind_that_has_the_keys_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("source: {kind: csv, path: a, key: b}\noutput: c\n")
    build = load_settings(BuildConfig, path, ["source.kind=jsonl"])
    assert build.source.kind == "jsonl" and build.source.key == "b"


@pytest.mark.parametrize("base", ["3", "true", "2024-01-01", "[a.yaml]", "{a: 1}", "''", '"a\\0b"'])
def test_a_base_that_names_no_file_is_refused_by_name(base: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {base}\ntext: a\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: base = .*quote the name of a file"):
        load_settings(Example, path)


def choices(kinds: list[Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Every key of the sections that takes one of a few words, with these words."""
    for kind in kinds:
        for name, field in kind.model_fields.items():
            members = list(_members(field.annotation))
            words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
            if words and name != "kind":
                yield (*prefix, name), [str(word) for word in words]
            below = [member for member in members if isinstance(member, type) and issubclass(member, Settings)]
            if len(below) == 1:
                yield from choices(below, (*prefix, name))


PLACES: list[type[Settings]] = [LocalCluster, SlurmCluster, KubernetesCluster, BuildConfig, VocabConfig, RunConfig]
CHOICES = [(schema, path, words) for schema in PLACES for path, words in choices([schema])]


@pytest.mark.parametrize(
    ("schema", "path", "words"), CHOICES, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_a_word_that_is_no_choice_is_refused_with_those_that_are(
    schema: type[Settings], path: tuple[str, ...], words: list[str]
) -> None:
    tree: dict[str, Any] = {}
    place = tree
    for section in path[:-1]:
        place = place.setdefault(section, {})
    place[path[-1]] = "nowhere"
    with pytest.raises(ConfigError) as told:
        check_settings(schema, tree, "file")
    line = next(line for line in str(told.value).splitlines() if ".".join(path) in line)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("schema", "tree", "known"),
    [
        (SlurmCluster, {"place": "nowhere"}, "account, "),
        (LocalCluster, {"kind": "local", "xyzzy": 1}, "known keys are env, kind, nodes, procs_per_node"),
        (RunConfig, {"model": {"kind": "clip", "vision": {"xyzzy": 1}}}, "heads, image_size, layers"),
        (RunConfig, {"model": {"kind": "gpt", "xyzzy": 1}}, "text_tokens"),
        (RunConfig, {"data": {"datasets": [{"path": "a", "xyzzy": 1}]}}, "known keys are path, weight"),
        (RunConfig, {"optim": {"roles": {"discriminator": {"xyzzy": 1}}}}, "betas"),
        (RunConfig, {"xyzzy": 1}, "known keys are data, deepspeed, "),
    ],
)  # fmt: skip
def test_an_unknown_key_without_a_near_one_is_refused_with_those_of_its_section(
    schema: type[Settings], tree: dict[str, Any], known: str
) -> None:
    with pytest.raises(ConfigError) as told:
        check_settings(schema, tree, "file")
    assert known in next(line for line in str(told.value).splitlines() if "unknown key" in line)


def test_json_with_escapes_of_letters_beyond_16_bits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "build.json"
    tree = {"source": {"kind": "folder", "path": "a 😀 é"}, "output": "out-😀"}
    path.write_text(json.dumps(tree))
    assert load_settings(BuildConfig, path) == check_settings(BuildConfig, tree, "")
    path.write_text(json.dumps(tree).replace("\\ude00", ""))
    with pytest.raises(ConfigError, match="not YAML in UTF-8"):
        load_settings(BuildConfig, path)
