"""Long recordings cut at the borders of their segments into windows that Whisper hears whole. Nothing is copied."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from jobs.manifest.row import Row, Segment, join_text
from service.spec.languages import WITHOUT_SPACES

STEP_S = 0.02
"""Whisper's timestamps stand on this grid."""

MARGIN_S = 0.2
"""Silence that a window keeps before its first and after its last segment, where there is room."""


def problem_of(segments: tuple[Segment, ...]) -> str:
    """What keeps segments from being used; empty where nothing does."""
    for segment in segments:
        if segment.start_s < 0 or segment.end_s <= segment.start_s:
            return f"a segment from {segment.start_s:.2f} s to {segment.end_s:.2f} s has no length"
    for before, after in pairwise(segments):
        if after.start_s < before.start_s:
            return f"the segment at {after.start_s:.2f} s stands after the one at {before.start_s:.2f} s"
    return ""


def joined(segments: tuple[Segment, ...], *, spaces: bool = True) -> tuple[Segment, ...]:
    """Segments of which no two overlap: those that do become one, since Whisper's timestamps only go forward."""
    whole: list[Segment] = []
    for segment in segments:
        if whole and segment.start_s < whole[-1].end_s - STEP_S / 2:
            last = whole[-1]
            text = join_text((last, segment), spaces=spaces)
            whole[-1] = Segment(last.start_s, max(last.end_s, segment.end_s), text)
        elif whole and segment.start_s < whole[-1].end_s:
            whole.append(replace(segment, start_s=whole[-1].end_s))
        else:
            whole.append(segment)
    return tuple(segment for segment in whole if segment.end_s > segment.start_s)


def cut(row: Row, duration_s: float, max_s: float) -> list[Row]:
    """Windows of a recording, each as long as its segments allow, from the first to the last segment.

    Args:
        row: with segments.
        duration_s: of the audio.
        max_s: longest window, in seconds.

    Returns:
        rows with start_s, end_s and their segments. A segment that alone is longer than `max_s` is a row by itself, for
        the caller to refuse.
    """
    spaces = row.language not in WITHOUT_SPACES
    segments = joined(row.segments, spaces=spaces)
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and segment.end_s - groups[-1][0].start_s <= max_s:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    windows = []
    for index, group in enumerate(groups):
        before = groups[index - 1][-1].end_s if index else 0.0
        after = groups[index + 1][0].start_s if index + 1 < len(groups) else duration_s
        start_s, end_s = group[0].start_s, group[-1].end_s
        room = max(0.0, max_s - (end_s - start_s)) / 2
        margin = min(MARGIN_S, room)
        # Half of a gap at most: the neighbour's speech may begin a little before its time.
        lead = min(margin, (start_s - before) / (2 if index else 1))
        tail = min(margin, max(0.0, (after - end_s) / (2 if index + 1 < len(groups) else 1)))
        pieces = tuple(group)
        windows.append(
            replace(
                row,
                start_s=round(start_s - lead, 3),
                end_s=round(end_s + tail, 3),
                segments=pieces,
                text=join_text(pieces, spaces=spaces),
                duration_s=None,
            )
        )
    return windows
