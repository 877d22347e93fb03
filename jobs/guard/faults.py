"""What a transcript can have wrong that no error rate tells of: text on silence, loops, senseless timestamps."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.spec.languages import WITHOUT_SPACES

if TYPE_CHECKING:
    from jobs.guard.hear import Piece  # which brings torch, and the summary needs but the words below

TEXT_ON_SILENCE, LOOPS, BAD_TIMESTAMPS = "text_on_silence", "loops", "bad_timestamps"

KINDS = {
    TEXT_ON_SILENCE: "writes text where nothing is said",
    LOOPS: "repeats itself in a loop",
    BAD_TIMESTAMPS: "gives timestamps that go back, lie beyond the clip's end or are missing",
}
"""Faults, in words."""

MAX_COMPRESSION = 2.4
"""OpenAI's threshold: a text that zlib makes smaller than this many times repeats itself."""

LOOKED_AT = 600
"""Bytes that are compressed at once, about what is said in 30 s: the longer a text, the better it compresses."""

SHORTEST = 100
"""Bytes from which on a compression ratio tells: a short sentence said three times is speech."""

REPEATS, REPEATED_WORDS, REPEATED_CHARACTERS, LONGEST_PHRASE = 4, 8, 16, 60
"""A phrase of up to LONGEST_PHRASE words, so often in a row and of so many words in all, is a loop; of so many
characters in a language without spaces."""

BEYOND_S = 1.0
"""How far behind the clip's end a timestamp may lie: clips are padded with silence."""

BACK_S = 0.05
"""How far a timestamp may go back: rounding."""

_BETWEEN_WORDS = re.compile(r"[\s.,;:!?…、。，！？·\"“”«»()\[\]-]+")


def is_loop(text: str, language: str) -> bool:
    """Whether a transcript repeats itself: the same phrase again and again, or more repetition than speech has.

    Source of the second: Radford et al. 2022, section 4.5.
    """
    plain = text.casefold()
    if language in WITHOUT_SPACES:
        units, wanted = [character for character in plain if character.isalnum()], REPEATED_CHARACTERS
    else:
        units, wanted = [word for word in _BETWEEN_WORDS.split(plain) if word], REPEATED_WORDS
    return _has_phrase_in_a_row(units, wanted) or compression(text) > MAX_COMPRESSION


def _has_phrase_in_a_row(units: Sequence[str], wanted: int) -> bool:
    for length in range(1, min(LONGEST_PHRASE, len(units) // REPEATS) + 1):
        # Units in a row that equal the one a phrase before them; the first phrase is not among them.
        enough = max(REPEATS * length, wanted) - length
        same = 0
        for before, unit in zip(units, units[length:], strict=False):
            same = same + 1 if before == unit else 0
            if same >= enough:
                return True
    return False


def compression(text: str) -> float:
    """How many times smaller zlib makes the most repetitive part of a text; 0 for a text too short to tell."""
    content = text.strip().encode()
    starts = range(0, max(1, len(content) - LOOKED_AT // 2), LOOKED_AT // 2)
    parts = [content[start : start + LOOKED_AT] for start in starts]
    return max((len(part) / len(zlib.compress(part)) for part in parts if len(part) >= SHORTEST), default=0.0)


def timestamp_problem(pieces: Sequence[Piece], duration_s: float) -> str:
    """What is wrong with the timestamps of a clip of that length; empty where nothing is."""
    last_s = 0.0
    for piece in pieces:
        if piece.start_s < last_s - BACK_S:
            return f"a segment begins at {piece.start_s:.2f} s, after one that goes to {last_s:.2f} s"
        end_s = piece.start_s if piece.end_s is None else piece.end_s
        if end_s < piece.start_s:
            return f"a segment begins at {piece.start_s:.2f} s and ends at {end_s:.2f} s"
        if end_s > duration_s + BEYOND_S:
            return f"a timestamp at {end_s:.2f} s, and the clip ends at {duration_s:.2f} s"
        if piece.end_s is None:
            return f"the segment that begins at {piece.start_s:.2f} s has no end"
        last_s = end_s
    return ""
