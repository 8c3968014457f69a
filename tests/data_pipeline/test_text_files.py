import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.text_files import UndecodableText, decode_text, newline_of

MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff\0"))


@given(TEXT, st.sampled_from(sorted(MARKED)), st.sampled_from([None, "latin-1", "utf-16", "gb18030"]))
def test_a_byte_order_mark_names_the_encoding_whatever_the_configuration_says(text, codec, stated):
    assert decode_text(MARKED[codec] + text.encode(codec), stated) == text


@given(TEXT)
def test_text_without_a_mark_is_utf8_unless_the_encoding_is_stated(text):
    assert decode_text(text.encode()) == text
    assert decode_text(text.encode("utf-16-le"), "UTF-16") == text


def test_two_byte_order_marks_are_taken_off():
    assert decode_text(codecs.BOM_UTF8 * 2 + b"a cat") == "a cat"


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_bytes_that_are_not_text_are_named_with_their_place_in_the_file(mark):
    with pytest.raises(UndecodableText, match=f"^byte 0xe9 at {len(mark) + 3} is not UTF-8$"):
        decode_text(mark + "café".encode("latin-1"))
    assert decode_text("café".encode("latin-1"), "latin-1") == "café"


def test_half_a_character_of_utf16_is_refused():
    with pytest.raises(UndecodableText, match="is not UTF-16-LE"):
        decode_text(codecs.BOM_UTF16_LE + b"a\0b")


@pytest.mark.parametrize("codec", ["rot13", "base64", "punycode", "unicode_escape"])
def test_a_codec_that_is_no_encoding_of_text_files_is_refused(codec):
    with pytest.raises(LookupError):
        newline_of(codec)


@pytest.mark.parametrize("codec", ["utf-8", "latin-1", "cp1252", "gb18030", "shift_jis", "big5", "utf-16-le", "cp037"])
def test_an_encoding_of_text_files_has_a_line_feed(codec):
    assert newline_of(codec).decode(codec) == "\n"
