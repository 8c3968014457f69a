"""Each kind of name, digest and count against a rule in plain Python, and what is said of one that is refused."""

import re
import unicodedata
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import DataError

HEX = set("0123456789abcdef")
WORD = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def holder(one: Any, config: Any = gate.CLOSED) -> Any:
    """A kind of file with one entry, `value`."""

    @with_config(config)
    class Holder(TypedDict):
        value: one

    return Holder


def is_file_name(name: str) -> bool:
    plain = all(letter not in "/\\" and unicodedata.category(letter) != "Cc" for letter in name)
    return plain and name[:1] not in ("", ".") and len(name.encode()) <= 255


RULES = {
    "Count": lambda value: type(value) is int and 0 <= value <= 281_474_976_710_656,
    "FileName": lambda value: isinstance(value, str) and is_file_name(value),
    "TarName": lambda value: isinstance(value, str) and is_file_name(value) and value[-4:] == ".tar" and len(value) > 4,
    "Sha256": lambda value: isinstance(value, str) and len(value) == 64 and set(value) <= HEX,
    "TokenizerId": lambda value: isinstance(value, str) and len(value) == 12 and set(value) <= HEX,
    "ParameterName": lambda value: (
        isinstance(value, str) and len(value) <= 255 and all(word and set(word) <= WORD for word in value.split("."))
    ),
}
KINDS = {name: holder(getattr(gate, name)) for name in RULES}
VALUES: list[Any] = [
    *(0, 1, 2**48 - 1, 2**48, 2**48 + 1, -1, True, False, 1.0, "1", "0", None, [], {}, 2**70),
    *(
        "a",
        "a.b",
        ".a",
        "a.",
        "..",
        ".",
        "",
        "a..b",
        "a.b.c",
        "/",
        "a/b",
        "\\",
        "a\\b",
        "/a",
        "a/",
        "a b",
        "~",
        "-",
        "_",
    ),
    *(f"a{chr(code)}" for code in [*range(33), 127, 128, 159, 160, 173, 0x2028, 0x200B, 0xFFFE]),
    *(f"{chr(code)}a" for code in [*range(33), 127, 128, 159, 160]),
    *(f"a{letter}b.tar" for letter in "\n\0/\\.\x7f "),
    *("a.tar", ".tar", "a.TAR", "atar", "a.tar\n", "a.tar.", "a.tar.tar", "..tar", "tar", "é.tar", "猫.tar", " .tar"),
    *("n" * count for count in (254, 255, 256)),
    *("n" * count + ".tar" for count in (250, 251, 252)),
    *("猫" * 85, "猫" * 86, "猫" * 83 + "aa.tar", "猫" * 83 + "aaa.tar"),
    *("a" * count for count in (11, 12, 13, 63, 64, 65)),
    *("0123456789ab", "0123456789aB", "0123456789ag", "0123456789a/", "/123456789ab", "`123456789ab", "0123456789a:"),
    *("0123456789abcdef" * 4, "0123456789abcdeF" * 4, "0123456789ab\n", "0123456789abcdef" * 4 + "\n", "٣" * 12),
    *(
        "layer.0.w_q-k",
        "a,b",
        "a@b",
        "a[b",
        "a`b",
        "a{b",
        "a:b",
        "é",
        "Az09",
        "a\n",
        "x." * 127 + "y",
        "x." * 128 + "y",
    ),
]


def takes(kind: Any, value: Any) -> bool:
    try:
        assert gate.check(kind, {"value": value}, "here", "remedy") == {"value": value}
    except DataError:
        return False
    return True


@pytest.mark.parametrize("name", RULES)
def test_a_kind_takes_what_its_rule_takes(name: str) -> None:
    taken = {repr(value) for value in VALUES if takes(KINDS[name], value)}
    assert taken == {repr(value) for value in VALUES if RULES[name](value)} and taken


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(RULES)), st.one_of(st.text(max_size=14), st.text("0123456789abcdef.", max_size=13)))
@example("FileName", "\x85")
@example("TarName", "a\x9f.tar")
def test_a_kind_takes_any_text_that_its_rule_takes(name: str, value: str) -> None:
    assert takes(KINDS[name], value) == RULES[name](value)


NAME_RULE = "without '/', '\\', control characters, or a leading dot"
SAID = [
    ("Count", -1, "here: value=-1: Input should be greater than or equal to 0; do this"),
    ("Count", 2**48 + 1, "here: value=281474976710657: Input should be less than or equal to 281474976710656; do this"),
    ("Count", "1", "here: value='1': Input should be a valid integer; do this"),
    ("FileName", "../x", f"here: value='../x': a file name {NAME_RULE}; do this"),
    ("FileName", "n" * 256, f"here: value='{'n' * 79}: Value error, a file name has at most 255 bytes; do this"),
    ("TarName", "x", f"here: value='x': NAME.tar {NAME_RULE}; do this"),
    ("Sha256", "A" * 64, f"here: value='{'A' * 64}': a sha256 is 64 lower-case hex digits; do this"),
    ("TokenizerId", "x", "here: value='x': an id is 12 lower-case hex digits; do this"),
    ("ParameterName", "a b", "here: value='a b': String should match pattern '" + "PATTERN" + "'; do this"),
    ("Sha256", None, "here: value=None: Input should be a valid string; do this"),
    ("Sha256", {"a": 1}, "here: value: Input should be a valid string; do this"),
    ("Sha256", b"x", "here: value: Input should be a valid string; do this"),
]


@pytest.mark.parametrize(("name", "value", "said"), SAID)
def test_what_is_refused_is_named_with_its_value_the_rule_and_the_remedy(name: str, value: Any, said: str) -> None:
    with pytest.raises(DataError) as raised:
        gate.check(KINDS[name], {"value": value}, "here", "do this")
    assert str(raised.value) == said.replace("PATTERN", r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


@pytest.mark.parametrize("read", ["parse", "check"])
def test_the_first_of_several_wrong_entries_is_named_by_its_path(read: str) -> None:
    files = holder(list[holder(gate.Count)])
    tree, data = {"value": [{"value": 1}, {"value": -1}, {"value": -2}]}, b'{"value": [{"value": 1}, {"value": -1}]}'
    with pytest.raises(DataError, match=r"^here: value\.1\.value=-1: Input should be greater"):
        gate.parse(files, data, "here", "x") if read == "parse" else gate.check(files, tree, "here", "x")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[]", r"^here: Input should be an object; do this$"),
        (b"{", r"^here: Invalid JSON: .*; do this$"),
        (b"", r"^here: Invalid JSON: .*; do this$"),
        (b'{"value": "1"}', r"^here: value='1': Input should be a valid integer; do this$"),
        (b'{"value": 1.0}', r"^here: value=1.0: Input should be a valid integer; do this$"),
        (b'{"value": true}', r"^here: value=True: Input should be a valid integer; do this$"),
        (b"{}", r"^here: value: Field required; do this$"),
        (b'{"value": 1, "more": 2}', r"^here: more=2: Extra inputs are not permitted; do this$"),
        (b"[" * 100_000, r"^here: Invalid JSON: .*; do this$"),
    ],
)
def test_json_that_is_something_else_is_refused_in_a_line(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as raised:
        gate.parse(KINDS["Count"], data, "here", "do this")
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_only_an_open_kind_takes_further_keys() -> None:
    assert gate.parse(holder(gate.Count, gate.OPEN), b'{"value": 1, "more": "2"}', "", "") == {"value": 1, "more": "2"}
    with pytest.raises(DataError, match="value='1'"):
        gate.parse(holder(gate.Count, gate.OPEN), b'{"value": "1"}', "here", "x")


def test_values_are_strict_also_where_the_kind_is_a_plain_type() -> None:
    assert gate.parse(int, b"1", "here", "x") == gate.check(int, 1, "here", "x") == 1
    for read in (lambda: gate.parse(int, b'"1"', "here", "x"), lambda: gate.check(int, "1", "here", "x")):
        with pytest.raises(DataError, match="^here: Input should be a valid integer; x$"):
            read()


def test_a_kind_is_compiled_once() -> None:
    assert gate._adapter(KINDS["Count"]) is gate._adapter(KINDS["Count"])


def test_what_is_shown_of_a_value_is_short() -> None:
    for value in ("x" * 10_000, ["x"] * 10_000, 10**4000):
        with pytest.raises(DataError) as raised:
            gate.check(KINDS["Sha256"], {"value": value}, "here", "do this")
        assert re.match(r"^here: value=(.{1,80}): [A-Za-z]", str(raised.value)) and len(str(raised.value)) < 200
