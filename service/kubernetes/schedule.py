"""Schedules of CronJobs, as Kubernetes reads them."""

from __future__ import annotations

_MONTHS = ["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"]
_DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]
_FIELDS: tuple[tuple[str, int, int, list[str]], ...] = (
    ("minute", 0, 59, []),
    ("hour", 0, 23, []),
    ("day of the month", 1, 31, []),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
_MACROS = {"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}


def schedule_problem(schedule: str) -> str:
    """What keeps a schedule from being one that Kubernetes takes; empty where nothing does."""
    if "TZ" in schedule:
        return "names a time zone; give it with --time-zone"
    if schedule.startswith("@"):
        return "" if schedule in _MACROS else f"is not one of {', '.join(sorted(_MACROS))}"
    parts = schedule.split()
    if len(parts) != len(_FIELDS):
        return f'has {len(parts)} fields, not 5 (minute, hour, day, month, weekday); "0 2 * * *" is two in the night'
    for part, (what, least, most, names) in zip(parts, _FIELDS, strict=True):
        if not all(_is_range(one, least, most, names) for one in part.split(",")):
            return f"has {part!r} as its {what}; {least} to {most}, *, ranges 1-5, lists 1,3 and steps */15 are known"
    return ""


def _is_range(text: str, least: int, most: int, names: list[str]) -> bool:
    """Whether it is one part of a field: `*`, a number or a range of them, with or without a step."""
    span, _, step = text.partition("/")
    if "/" in text and not (step.isascii() and step.isdigit() and int(step) >= 1):
        return False
    if span in ("*", "?"):
        return True
    ends = span.split("-")
    numbers = [_number(end, least, names) for end in ends]
    if len(numbers) > 2 or any(number is None or not least <= number <= most for number in numbers):
        return False
    return len(numbers) == 1 or (numbers[0] or 0) <= (numbers[1] or 0)


def _number(text: str, least: int, names: list[str]) -> int | None:
    if text.upper() in names:
        return names.index(text.upper()) + least
    return int(text) if text.isascii() and text.isdigit() else None
