"""Which script a text is in, and which ones a language is written in. Latin alone is used by all that are not listed.

Source: Unicode's CLDR (supplementalData, languageData), by the words with which Unicode's character names begin.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

SCRIPTS: dict[str, tuple[str, ...]] = {
    "am": ("ETHIOPIC",), "ar": ("ARABIC",), "as": ("BENGALI",), "az": ("LATIN", "CYRILLIC", "ARABIC"),
    "ba": ("CYRILLIC",), "be": ("CYRILLIC",), "bg": ("CYRILLIC",), "bn": ("BENGALI",), "bo": ("TIBETAN",),
    "bs": ("LATIN", "CYRILLIC"), "el": ("GREEK",), "fa": ("ARABIC",), "gu": ("GUJARATI",), "ha": ("LATIN", "ARABIC"),
    "he": ("HEBREW",), "hi": ("DEVANAGARI",), "hy": ("ARMENIAN",), "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "jw": ("LATIN", "JAVANESE"), "ka": ("GEORGIAN",), "kk": ("CYRILLIC", "LATIN", "ARABIC"), "km": ("KHMER",),
    "kn": ("KANNADA",), "ko": ("HANGUL", "CJK"), "lo": ("LAO",), "mk": ("CYRILLIC",), "ml": ("MALAYALAM",),
    "mn": ("CYRILLIC", "MONGOLIAN"), "mr": ("DEVANAGARI",), "ms": ("LATIN", "ARABIC"), "my": ("MYANMAR",),
    "ne": ("DEVANAGARI",), "pa": ("GURMUKHI", "ARABIC"), "ps": ("ARABIC",), "ru": ("CYRILLIC",),
    "sa": ("DEVANAGARI",), "sd": ("ARABIC", "DEVANAGARI"), "si": ("SINHALA",), "sr": ("CYRILLIC", "LATIN"),
    "su": ("LATIN", "SUNDANESE"), "ta": ("TAMIL",), "te": ("TELUGU",), "tg": ("CYRILLIC", "ARABIC"), "th": ("THAI",),
    "tk": ("LATIN", "CYRILLIC", "ARABIC"), "tt": ("CYRILLIC", "LATIN"), "uk": ("CYRILLIC",), "ur": ("ARABIC",),
    "uz": ("LATIN", "CYRILLIC", "ARABIC"), "yi": ("HEBREW",), "yue": ("CJK", "BOPOMOFO"), "zh": ("CJK", "BOPOMOFO"),
}  # fmt: skip

_AS = {"KATAKANA-HIRAGANA": "KATAKANA", "HALFWIDTH": "KATAKANA", "FULLWIDTH": "LATIN", "IDEOGRAPHIC": "CJK"}


def foreign_script(text: str, language: str) -> str:
    """The script that most letters are in, where most are in none that the language is written in; else nothing.

    Words of other languages inside a text are ordinary; a text that is mostly in another script is mostly a mistake.
    """
    if text.isascii() and "LATIN" in SCRIPTS.get(language, ("LATIN",)):
        return ""
    found = Counter(name for character in text if (name := script_of(character)))
    usual = SCRIPTS.get(language, ("LATIN",))
    own = sum(found[name] for name in usual)
    if own * 2 >= found.total():
        return ""
    return next(name for name, _ in found.most_common() if name not in usual)


@lru_cache(maxsize=65_536)
def script_of(character: str) -> str:
    """The script of a letter, as Unicode's names begin (`LATIN`, `CYRILLIC`, `CJK`); nothing for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return ""
    first = unicodedata.name(character, "").split(" ", 1)[0]
    return _AS.get(first, first)
