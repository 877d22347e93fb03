"""Captions (.srt, .vtt) to segments."""

from __future__ import annotations

import html
import re

from jobs.manifest.row import Segment

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[.,](\d{1,3})"
_CUE = re.compile(rf"^\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[^<>]*>|\{\\[^{}]*\}")
"""Mark-up inside captions: <i>, <v Speaker>, WebVTT's <00:00:01.000>, and {\\an8} of SubStation in SRT files."""


def parse_captions(text: str) -> list[Segment]:
    """Read SRT or WebVTT: cues in the order of their times, mark-up taken out, empty cues left out.

    Args:
        text: the file's content. Numbers, cue names, NOTE, STYLE and REGION blocks and cue settings are passed over.

    Raises:
        ValueError: a cue ends before it begins, or there is no cue at all.
    """
    segments = []
    cues = 0
    for block in re.split(r"\n[ \t]*\n", text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()):
        lines = block.split("\n")
        if lines[0].startswith(("NOTE", "STYLE", "REGION")) and not any(map(_CUE.match, lines[:1])):
            continue
        for index, line in enumerate(lines):
            if found := _CUE.match(line):
                cues += 1
                start_s, end_s = _seconds(found.groups()[:4]), _seconds(found.groups()[4:])
                if end_s <= start_s:
                    raise ValueError(f"a cue ends at {end_s:.3f} s and begins at {start_s:.3f} s")
                said = " ".join(html.unescape(_TAG.sub("", " ".join(lines[index + 1 :]))).split())
                if said:
                    segments.append(Segment(start_s, end_s, said))
                break
    if not cues and text.strip("\ufeff \r\n\t").removeprefix("WEBVTT").strip():
        raise ValueError("holds no cue (00:00:01,000 --> 00:00:02,500)")
    return sorted(segments, key=lambda segment: (segment.start_s, segment.end_s))


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, fraction = parts
    return (
        int(hours or 0) * 3600
        + int(minutes or 0) * 60
        + int(seconds or 0)
        + int((fraction or "0").ljust(3, "0")) / 1000
    )
