import pytest

from data_pipeline.build.captions import clean_caption, clean_captions
from data_pipeline.config import CaptionRules

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
    ],
)
def test_captions_outside_of_the_rules_are_left_out_with_a_reason(captions, rules, kept, reason):
    assert clean_captions(captions, CaptionRules(**rules)) == (kept, reason)
