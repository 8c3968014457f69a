"""Text rules: what a caption looks like when it is stored, the same for every language."""

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

# Full-width forms and curly quotes are how Chinese is written, not damage.
_FTFY = ftfy.TextFixerConfig(fix_character_width=False, uncurl_quotes=False, normalization="NFC")

SURE = 0.9  # a language counts as another one from this probability on: captions are too short for less
_SCRIPTS = {  # as Unicode names the letters; every other language is written in LATIN
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
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI"}  # words are not told apart by spaces


def clean_caption(text: str, fix: bool = True) -> str:
    """One line of NFC text: mojibake and entities repaired where `fix`, controls and runs of space one space."""
    text = ftfy.fix_text(text, _FTFY) if fix else unicodedata.normalize("NFC", text)
    text = text.encode("utf-8", "replace").decode("utf-8")
    visible = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(visible.split())


def clean_captions(captions: tuple[str, ...], rules: CaptionRules) -> tuple[tuple[str, ...], str]:
    """-> (captions kept in order, each once; why none is left: the reason of the last that was left out).

    Reasons: empty_caption, caption_too_short, caption_too_long, caption_denied, caption_language.
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
    """Is it not clearly another language? First by its letters, then, for languages that share them, by py3langid."""
    scripts = Counter(script for letter in text if (script := script_of(letter)))
    if not scripts:
        return True
    wanted = [language for language in languages if _fits(scripts, _SCRIPTS.get(language, {"LATIN"}))]
    if not wanted or max(scripts, key=lambda name: scripts[name]) in _UNSPACED:
        return bool(wanted)
    found, probability = _identifier().classify(text)
    return found in wanted or probability < SURE


def language_of(text: str) -> str:
    """The most likely language, zh for every Chinese; ? where py3langid is not sure."""
    scripts = Counter(script for letter in text if (script := script_of(letter)))
    for language in ("zh", "ja", "ko"):
        if scripts and _fits(scripts, _SCRIPTS[language]):
            return language
    found, probability = _identifier().classify(text)
    return str(found) if scripts and probability >= SURE else "?"


def _fits(scripts: Counter[str], own: set[str]) -> bool:
    """Are most letters its own, and is none of them Japanese where it is not?"""
    kana = scripts["HIRAGANA"] + scripts["KATAKANA"]
    return 2 * sum(scripts[name] for name in own) >= scripts.total() and (not kana or "HIRAGANA" in own)


@cache
def script_of(letter: str) -> str:
    """LATIN, CJK, CYRILLIC, ...; empty for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    return unicodedata.name(letter, "").partition(" ")[0]


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def known_languages() -> frozenset[str]:
    """The ISO 639-1 codes that can be asked for."""
    return frozenset(_identifier().labels)


def check_languages(languages: tuple[str, ...]) -> None:
    """Raises ConfigError for a code that is not known."""
    unknown = sorted(set(languages) - known_languages()) if languages else []
    if unknown:
        raise ConfigError(f"captions.languages: {', '.join(unknown)} not known; codes are ISO 639-1, as en, zh, fr")


# ------------------------------------------------------------------------------------------- deny-lists


class DenyList:
    """Words and phrases; one of letters without spaces between words (Chinese, ...) is found anywhere, others whole."""

    def __init__(self, lines: list[str]) -> None:
        terms = {_folded(line) for line in lines if line.strip() and not line.startswith("#")}
        unspaced = {term for term in terms if any(script_of(letter) in _UNSPACED for letter in term)}
        self._anywhere = _by_length(unspaced, len)
        self._words = _by_length({" ".join(_words(term)) for term in terms - unspaced}, lambda term: len(term.split()))

    def finds(self, text: str) -> bool:
        """Is one of the terms in the text?"""
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
    """Raises DataError where there is no such file."""
    return DenyList(_deny_lines(path))


def deny_digest(path: str | None) -> str:
    """sha256 of the list: another list is another build."""
    return "" if path is None else hashlib.sha256("\n".join(_deny_lines(path)).encode()).hexdigest()


def _deny_lines(path: str) -> list[str]:
    try:
        return decode_text(Path(path).read_bytes()).splitlines()
    except (OSError, UndecodableText) as error:
        raise DataError(f"{path}: {error}; captions.deny names a UTF-8 file with one word or phrase a line") from None
