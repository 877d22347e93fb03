"""Figures as people read them."""

from __future__ import annotations

import unicodedata
from typing import Any

from service.spec.counted import counted as counted
from service.spec.languages import LANGUAGES

NONE = "–"
"""Stands where there is no value."""

_STEERING = set(range(0x202A, 0x202F)) | set(range(0x2066, 0x206A)) | {0x200E, 0x200F, 0x061C}
"""Characters that turn the direction of the text around them."""


def percent(rate: float | None, digits: int = 1) -> str:
    """`6.3%`; a dash for None."""
    return NONE if rate is None else f"{rate:.{digits}%}"


def points(difference: float | None) -> str:
    """A difference of two rates in percentage points, always with its sign: `−53.2`."""
    return NONE if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def interval(bounds: list[float] | None) -> str:
    """`3.8% to 8.9%`; nothing for None."""
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}" if bounds else ""


def count(number: float | None) -> str:
    """`1,234`; a dash for None."""
    return NONE if number is None else f"{number:,.0f}"


def clock(seconds: float | None) -> str:
    """`0:07`, `12:30` or `3:05:00`; a dash for None."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def hours(value: float | None) -> str:
    """Hours of audio: `12.5 h`, `9 min`; a dash for None."""
    if value is None:
        return NONE
    if value >= 10:
        return f"{value:,.0f} h"
    return f"{value:.1f} h" if value >= 1 else f"{60 * value:.1f} min" if value < 1 / 6 else f"{60 * value:.0f} min"


def language(code: str) -> str:
    """A language's name in English, or the code itself where it is none of Whisper's."""
    return LANGUAGES[code].title() if code in LANGUAGES else code or "no language"


def setting(value: Any) -> str:
    """A setting's value in few signs: `0.0001`, `on`, `q_proj, v_proj`."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting(one)}" for key, one in value.items()) or "none"
    return str(value)


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: control and direction characters as `\\x1b`, `\\u202e`."""
    return "".join(
        character if unicodedata.category(character) not in ("Cc", "Cs") and ord(character) not in _STEERING
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )  # fmt: skip
