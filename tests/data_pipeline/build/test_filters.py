import pytest

from data_pipeline.build.filters import Condition, Filters
from data_pipeline.errors import ConfigError

ROW = {"width": 640, "height": 480, "nsfw": 0.1, "label": "cat", "text_number": "12.5", "nothing": None, "chars": 20}

MET = [
    ("width >= 256", True),
    ("width >= 256 and height >= 512", False),
    ("width >= 256 or height >= 512", True),
    ("not nsfw > 0.5", True),
    ("0.05 < nsfw < 0.2", True),
    ("0.05 < nsfw < 0.1", False),
    ("min(width, height) >= 480", True),
    ("max(width, height) / min(width, height) <= 1.3", False),
    ("label in ['cat', 'dog']", True),
    ("label not in ('cat', 'dog')", False),
    ("lower(label) == 'cat'", True),
    ("len(label) == 3", True),
    ("text_number > 12", True),
    ("12.5 == text_number", True),
    ("text_number > 13", False),
    ("label > 3", False),
    ("nothing < 1", False),
    ("absent < 1", False),
    ("absent < 1 or width > 1", False),
    ("width > 1 or absent < 1", True),
    ("width // 100 % 2 == 0 and -nsfw < 0", True),
    ("width / (height - 480) > 1", False),
    ("True", True),
]


@pytest.mark.parametrize(("text", "met"), MET)
def test_a_condition_is_met_or_says_why_not(text, met):
    why = Condition(text, "filters.x").why_not(ROW)
    assert (why == "") == met
    assert met or why.startswith(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "width.__class__",
        "(lambda: 1)()",
        "[x for x in label]",
        "label[0] == 'c'",
        "open('/etc/passwd')",
        "f'{width}'",
        "width if height else 1",
        "width ** 999999999",
        "x := 1",
        "width >",
        "",
        "len(x=1)",
        "1 if True else 2",
        "width > 1" + " and width > 1" * 100,
    ],
)
def test_what_is_no_plain_condition_is_refused_naming_it(text):
    with pytest.raises(ConfigError, match="filters.mine"):
        Condition(text, "filters.mine")


def test_conditions_on_the_image_wait_for_it():
    filters = Filters({"small": "width >= 256", "nsfw": "nsfw < 0.05", "both": "width > 1 and nsfw < 0.05"})
    assert filters.before({"nsfw": 0.1})[0] == "nsfw" and filters.before({"nsfw": 0.01}) == ("", "")
    assert filters.after({"nsfw": 0.01, "width": 100})[0] == "small"
    assert filters.after({"nsfw": 0.2, "width": 300})[0] == "both"
    assert filters.names == {"width", "nsfw"}


def test_a_condition_has_at_most_a_thousand_characters():
    longest = "width >= " + "1" * 991
    assert Condition(longest, "filters.x").why_not({"width": 1})
    with pytest.raises(ConfigError, match="1001 characters; a condition has at most 1000"):
        Condition(longest + "1", "filters.x")
