"""Text rules: what a caption looks like when it is stored, the same for every language."""

import unicodedata

import ftfy

from data_pipeline.config import CaptionRules

# Full-width forms and curly quotes are how Chinese is written, not damage.
_FTFY = ftfy.TextFixerConfig(fix_character_width=False, uncurl_quotes=False, normalization="NFC")


def clean_caption(text: str, fix: bool = True) -> str:
    """One line of NFC text: mojibake and entities repaired where `fix`, controls and runs of space one space."""
    text = ftfy.fix_text(text, _FTFY) if fix else unicodedata.normalize("NFC", text)
    text = text.encode("utf-8", "replace").decode("utf-8")
    visible = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(visible.split())


def clean_captions(captions: tuple[str, ...], rules: CaptionRules) -> tuple[tuple[str, ...], str]:
    """-> (captions kept in order, each once; why none is left: empty_caption, caption_too_short, caption_too_long)."""
    kept: dict[str, None] = {}
    reason = "empty_caption"
    for caption in captions:
        text = clean_caption(caption, rules.fix_text)
        if not text:
            continue
        if len(text) < rules.min_chars:
            reason = "caption_too_short"
        elif rules.max_chars is not None and len(text) > rules.max_chars:
            reason = "caption_too_long"
        else:
            kept[text] = None
    return tuple(kept), "" if kept else reason
