"""Text files that are not UTF-8: which line shows it, and the way out."""

from __future__ import annotations

from collections.abc import Iterable

WAY_OUT = "save the file as UTF-8 (one in Latin-1: iconv -f latin1 -t utf-8 OLD > NEW)"

NOT_UTF8 = f"is not UTF-8 text; {WAY_OUT}"


def first_line_not_utf8(lines: Iterable[bytes]) -> int:
    """Number of the first line that is not UTF-8; 0 where all are."""
    for number, line in enumerate(lines, 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0
