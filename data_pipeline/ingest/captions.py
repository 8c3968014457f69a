"""Caption cleaning and filtering: one set of rules for all languages."""

import hashlib
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import ftfy

from data_pipeline.config import CaptionRules
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.text_files import UndecodableText, decode_text

# Full-width forms and curly quotes are normal in Chinese text, so they are kept.
_FTFY = ftfy.TextFixerConfig(fix_character_width=False, uncurl_quotes=False, normalization="NFC")

SURE = 0.9  # minimum probability to accept py3langid's answer: short captions make lower ones unreliable
_SCRIPTS = {  # scripts by the first word of the Unicode letter name; languages not listed use LATIN
    "zh": {"CJK"},
    "ja": {"CJK", "HIRAGANA", "KATAKANA"},
    "ko": {"HANGUL", "CJK"},
    **dict.fromkeys(("ru", "uk", "bg", "be", "mk", "sr", "kk", "ky", "mn"), {"CYRILLIC"}),
    **dict.fromkeys(("ar", "fa", "ur", "ps", "ug"), {"ARABIC"}),
    **dict.fromkeys(("hi", "mr", "ne"), {"DEVANAGARI"}),
    "el": {"GREEK"},
    "he": {"HEBREW"},
    "th": {"THAI"},
}
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI"}  # spaces do not separate words reliably


def clean_caption(text: str, fix: bool = True) -> str:
    """Return one line of NFC text; control characters and runs of whitespace become one space.

    fix: also repair mojibake and HTML entities.
    """
    text = ftfy.fix_text(text, _FTFY) if fix else unicodedata.normalize("NFC", text)
    text = text.encode("utf-8", "replace").decode("utf-8")
    visible = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(visible.split())


def clean_captions(captions: tuple[str, ...], rules: CaptionRules) -> tuple[tuple[str, ...], str]:
    """Return (cleaned captions in order, without repeats; rejection reason, empty if any caption is kept).

    The reason is that of the last non-empty caption rejected: caption_too_short, caption_too_long, caption_denied or
    caption_language; empty_caption if all are empty.
    """
    kept: dict[str, None] = {}
    reason = "empty_caption"
    for caption in captions:
        text = clean_caption(caption, rules.fix_text)
        if text and not (why := _why_not(text, rules)):
            kept[text] = None
        elif text:
            reason = why
    return tuple(kept), "" if kept else reason


def _why_not(text: str, rules: CaptionRules) -> str:
    if len(text) < rules.min_chars:
        return "caption_too_short"
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return "caption_too_long"
    if rules.deny is not None and deny_list(rules.deny).finds(text):
        return "caption_denied"
    if rules.languages and not may_be(text, rules.languages):
        return "caption_language"
    return ""


# --------------------------------------------------------------------------------------------- language


def may_be(text: str, languages: tuple[str, ...]) -> bool:
    """Return whether the text may be in one of `languages`: by script first, then by py3langid within a script.

    Returns True when py3langid is not sure, and for text without letters.
    """
    scripts = Counter(script for letter in text if (script := script_of(letter)))
    if not scripts:
        return True
    wanted = [language for language in languages if _fits(scripts, _SCRIPTS.get(language, {"LATIN"}))]
    if not wanted or max(scripts, key=lambda name: scripts[name]) in _UNSPACED:
        return bool(wanted)
    found, probability = _identifier().classify(text)
    return found in wanted or probability < SURE


def language_of(text: str) -> str:
    """Return the most likely language code; zh for every variety of Chinese, ? if py3langid is not sure."""
    scripts = Counter(script for letter in text if (script := script_of(letter)))
    for language in ("zh", "ja", "ko"):
        if scripts and _fits(scripts, _SCRIPTS[language]):
            return language
    found, probability = _identifier().classify(text)
    return str(found) if scripts and probability >= SURE else "?"


def _fits(scripts: Counter[str], own: set[str]) -> bool:
    """Return whether at least half of the letters are in the scripts `own`, with no kana unless `own` has it."""
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    return 2 * sum(scripts[name] for name in own) >= scripts.total() and (not kana or "HIRAGANA" in own)


@cache
def script_of(letter: str) -> str:
    """Return the script of a letter (LATIN, CJK, CYRILLIC, ...); empty for other characters."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def known_languages() -> frozenset[str]:
    """Return the supported ISO 639-1 codes."""
    return frozenset(_identifier().labels)


def check_languages(languages: tuple[str, ...]) -> None:
    """Raise ConfigError for an unknown language code."""
    unknown = sorted(set(languages) - known_languages()) if languages else []
    if unknown:
        raise ConfigError(f"captions.languages: {', '.join(unknown)} unknown; use ISO 639-1 codes such as en, zh, fr")


# ------------------------------------------------------------------------------------------- deny-lists


class DenyList:
    """Denied words and phrases. Terms in unspaced scripts (Chinese, ...) match anywhere, others as whole words."""

    def __init__(self, lines: list[str]) -> None:
        terms = {_folded(line) for line in lines if line.strip() and not line.startswith("#")}
        unspaced = {term for term in terms if any(script_of(letter) in _UNSPACED for letter in term)}
        self._anywhere = _by_length(unspaced, len)
        self._words = _by_length({" ".join(_words(term)) for term in terms - unspaced}, lambda term: len(term.split()))

    def finds(self, text: str) -> bool:
        """Return whether the text contains one of the terms."""
        text = _folded(text)
        words = _words(text)
        return any(
            " ".join(words[start : start + length]) in terms
            for length, terms in self._words.items()
            for start in range(len(words) - length + 1)
        ) or any(
            text[start : start + length] in terms
            for length, terms in self._anywhere.items()
            for start in range(len(text) - length + 1)
        )


def _by_length(terms: set[str], length: Any) -> dict[int, set[str]]:
    grouped: dict[int, set[str]] = {}
    for term in terms - {""}:
        grouped.setdefault(length(term), set()).add(term)
    return grouped


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text).split()


@cache
def deny_list(path: str) -> DenyList:
    """Read a deny-list. Raises DataError if the file cannot be read as UTF-8."""
    return DenyList(_deny_lines(path))


def deny_digest(path: str | None) -> str:
    """Return the sha256 of the list, empty without one; part of the build's pin."""
    return "" if path is None else hashlib.sha256("\n".join(_deny_lines(path)).encode()).hexdigest()


def _deny_lines(path: str) -> list[str]:
    try:
        return decode_text(Path(path).read_bytes()).splitlines()
    except (OSError, UndecodableText) as error:
        raise DataError(
            f"{path}: {error}; captions.deny must be a UTF-8 file with one word or phrase per line"
        ) from None
