import gzip
import json

import pytest

from data_pipeline.config import CaptionRules
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.captions import check_languages, clean_caption, clean_captions, may_be

TEXTS = [
    ("  a  dog \n runs ", "a dog runs"),
    ("caf\u0065\u0301", "café"),
    ("schÃ¶n", "schön"),
    ("salt &amp; pepper", "salt & pepper"),
    ("null\0byte\x07", "nullbyte"),
    ("红色，圆形。", "红色，圆形。"),
    ("“quoted” text", "“quoted” text"),
    ("line\u2028break", "line break"),
    ("lone \ud800 half", "lone \ufffd half"),
    (" \t\u3000 ", ""),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_a_caption_is_cleaned(text, expected):
    assert clean_caption(text) == expected
    assert clean_caption(expected) == expected


@pytest.mark.parametrize(
    ("captions", "rules", "kept", "reason"),
    [
        (("a", "b", "a"), {}, ("a", "b"), ""),
        (("", " "), {}, (), "empty_caption"),
        ((), {}, (), "empty_caption"),
        (("ab", "abcd"), {"min_chars": 3}, ("abcd",), ""),
        (("ab",), {"min_chars": 3}, (), "caption_too_short"),
        (("abcd",), {"max_chars": 3}, (), "caption_too_long"),
        (("红色",), {"min_chars": 3}, (), "caption_too_short"),  # characters, in every script
        (("红色圆形", "红圆形"), {"max_chars": 3}, ("红圆形",), ""),
    ],
)
def test_captions_outside_of_the_rules_are_left_out_with_a_reason(captions, rules, kept, reason):
    assert clean_captions(captions, CaptionRules(**rules)) == (kept, reason)


LANGUAGES = [
    ("a dog runs on the beach", ("en",), True),
    ("a dog runs on the beach", ("zh",), False),
    ("a dog runs on the beach", ("fr", "de"), False),
    ("red circle", ("en",), True),
    ("red circle", ("de",), True),  # too short to be sure of another language
    ("un chien court sur la plage", ("en",), False),
    ("un chien court sur la plage", ("en", "fr"), True),
    ("一只狗在海滩上奔跑", ("zh",), True),
    ("红色圆形", ("zh",), True),
    ("红色圆形", ("en",), False),
    ("红色圆形", ("en", "zh"), True),
    ("犬がビーチを走る", ("zh",), False),
    ("犬がビーチを走る", ("ja",), True),
    ("собака бежит по пляжу", ("en",), False),
    ("собака бежит по пляжу", ("ru",), True),
    ("12:30", ("en",), True),
    ("iPhone 手机壳红色新款", ("zh",), True),
]


@pytest.mark.parametrize(("text", "languages", "kept"), LANGUAGES)
def test_a_caption_that_is_clearly_another_language_is_left_out(text, languages, kept):
    rules = CaptionRules(languages=languages)
    assert clean_captions((text,), rules) == (((text,), "") if kept else ((), "caption_language"))


def test_real_captions_of_both_languages_are_nearly_all_told_apart(shared):
    lines = gzip.decompress((shared / "data/emoji-captions/captions.jsonl.gz").read_bytes()).splitlines()[::5]
    rows = [json.loads(line) for line in lines]
    for column, own, other in (("caption_en", "en", "zh"), ("caption_zh", "zh", "en")):
        assert sum(may_be(row[column], (own,)) for row in rows) > 0.97 * len(rows)
        assert sum(may_be(row[column], (other,)) for row in rows) < 0.05 * len(rows)


def test_a_language_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="xx"):
        check_languages(("en", "xx"))


DENIED = [
    ("a Bad dog", True),
    ("a badger", False),
    ("BAD!", True),
    ("ｂａｄ", True),
    ("an ugly  thing here", True),
    ("an ugly, thing", True),
    ("ugly", False),
    ("这是坏话吗", True),
    ("这是好话", False),
    ("# comment", False),
]


@pytest.mark.parametrize(("text", "denied"), DENIED)
def test_denied_words_are_found_whole_and_chinese_ones_anywhere(tmp_path, text, denied):
    (tmp_path / "deny.txt").write_text("# comment\nbad\nugly thing\n坏话\n\n")
    rules = CaptionRules(deny=str(tmp_path / "deny.txt"), fix_text=False)
    assert (clean_captions((text,), rules)[1] == "caption_denied") == denied


def test_only_the_caption_that_is_denied_is_left_out(tmp_path):
    (tmp_path / "deny.txt").write_text("bad")
    rules = CaptionRules(deny=str(tmp_path / "deny.txt"))
    assert clean_captions(("good", "bad", "图片"), rules) == (("good", "图片"), "")


def test_a_list_that_is_not_there_is_named():
    with pytest.raises(DataError, match="/nowhere.*captions.deny"):
        clean_captions(("x",), CaptionRules(deny="/nowhere"))


def test_a_byte_order_mark_does_not_hide_the_first_word_of_a_deny_list(tmp_path):
    path = tmp_path / "deny.txt"
    path.write_bytes(b"\xef\xbb\xbfguns\nknives\n")
    assert clean_captions(("two guns",), CaptionRules(deny=str(path))) == ((), "caption_denied")
