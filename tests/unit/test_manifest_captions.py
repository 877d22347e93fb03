"""Captions become segments; long recordings are cut at their borders into windows that Whisper hears whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.manifest.captions import parse_captions
from jobs.manifest.row import Row, Segment
from jobs.manifest.windows import cut, joined, problem_of

SRT = """1
00:00:01,000 --> 00:00:02,500
Turn it <i>on</i>,
please.

2
00:01:00,040 --> 01:00:00,000 X1:40 X2:600
{\\an8}Tom &amp; Jerry

3
00:00:03,000 --> 00:00:04,000

"""
VTT = """WEBVTT - a title
Kind: captions

NOTE nothing of this
00:00:00.000 --> 00:00:09.000 is said

STYLE
::cue { color: white }

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Eve>Turn it <c.loud>on</c>

01:02:03.250 --> 01:02:04.000
<00:00:01.500>off
"""


def test_srt_is_read() -> None:
    assert parse_captions(SRT) == [
        Segment(1.0, 2.5, "Turn it on, please."),
        Segment(60.04, 3600.0, "Tom & Jerry"),
    ]


def test_vtt_is_read_without_notes_styles_and_mark_up() -> None:
    assert parse_captions(VTT) == [Segment(1.0, 2.5, "Turn it on"), Segment(3723.25, 3724.0, "off")]


@pytest.mark.parametrize("mark", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_make_no_difference(mark: str, bom: str) -> None:
    assert parse_captions(bom + SRT.replace("\n", mark)) == parse_captions(SRT)


def test_cues_come_in_the_order_of_their_times() -> None:
    text = "2\n00:00:05,000 --> 00:00:06,000\nb\n\n1\n00:00:01,000 --> 00:00:02,000\na\n"
    assert [segment.text for segment in parse_captions(text)] == ["a", "b"]


def test_what_are_no_captions_is_an_error() -> None:
    with pytest.raises(ValueError, match="no cue"):
        parse_captions("just some words")
    with pytest.raises(ValueError, match="ends at 1"):
        parse_captions("00:00:02.000 --> 00:00:01.000\nback in time")
    assert parse_captions("WEBVTT\n\n") == []


@given(st.text(max_size=300))
def test_any_text_is_captions_or_a_value_error(text: str) -> None:
    try:
        segments = parse_captions(text)
    except ValueError:
        return
    assert all(segment.end_s > segment.start_s for segment in segments)


@st.composite
def recordings(draw: st.DrawFn) -> tuple[tuple[Segment, ...], float]:
    """Segments in order that do not overlap, none longer than 30 s, and the recording's length."""
    now, segments = 0.0, []
    for index in range(draw(st.integers(1, 25))):
        now += draw(st.sampled_from([0.0, 0.01, 0.3, 2.0, 45.0]))
        length = draw(st.floats(0.1, 29.9))
        segments.append(Segment(round(now, 3), round(now + length, 3), f"w{index}"))
        now = segments[-1].end_s
    return tuple(segments), now + draw(st.sampled_from([0.0, 0.1, 60.0]))


@given(recordings())
def test_every_segment_is_whole_in_one_window_and_every_window_fits(
    recording: tuple[tuple[Segment, ...], float],
) -> None:
    segments, length_s = recording
    assert not problem_of(segments)
    windows = cut(Row("a", "a", "", "en", segments=segments), length_s, 30.0)
    assert tuple(segment for window in windows for segment in window.segments) == segments
    assert " ".join(window.text for window in windows) == " ".join(segment.text for segment in segments)
    for window in windows:
        assert window.start_s is not None
        assert window.end_s is not None
        assert 0 <= window.start_s <= window.segments[0].start_s
        assert window.segments[-1].end_s <= window.end_s <= length_s + 1e-3
        assert window.end_s - window.start_s <= 30.002
    for before, after in pairwise(windows):
        assert before.end_s <= after.start_s + 1e-3  # type: ignore[operator]
        # As much as fits: the next segment would have been too much.
        assert after.segments[0].end_s - before.segments[0].start_s > 30


def test_overlapping_segments_become_one() -> None:
    segments = (Segment(0, 2, "a"), Segment(1.5, 3, "b"), Segment(2.995, 4, "c"), Segment(5, 6, "d"))
    assert joined(segments) == (Segment(0, 3, "a b"), Segment(3, 4, "c"), Segment(5, 6, "d"))
    assert joined(segments[:2], spaces=False)[0].text == "ab"
