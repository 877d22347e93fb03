"""Numbers with what they count."""

from __future__ import annotations


def counted(number: float, one: str, many: str | None = None) -> str:
    """A number and what it counts: `1 clip`, `1,234 clips`, `0.5 CPUs`."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {one if number == 1 else many or one + 's'}"
