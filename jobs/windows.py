"""A window of several utterances: their audio one after the other, and one transcript of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.audio import SAMPLE_RATE_HZ
from jobs.manifest.row import Segment
from jobs.tokens import Prompter, Tokens, segments_of


def join_clips(clips: Sequence[NDArray[np.float32]], gap: int) -> tuple[NDArray[np.float32], list[tuple[int, int]]]:
    """Clips one after the other.

    Args:
        clips: float32 samples (S,) of each.
        gap: samples of silence between two.

    Returns:
        all of them, and the samples at which each begins and ends.
    """
    ends = np.cumsum([len(clip) + gap for clip in clips]) - gap
    spans = [(int(end) - len(clip), int(end)) for clip, end in zip(clips, ends, strict=True)]
    window_S = np.zeros(spans[-1][1], np.float32)
    for clip, (begin, end) in zip(clips, spans, strict=True):
        window_S[begin:end] = clip
    return window_S, spans


def encode_window(
    prompter: Prompter,
    records: Sequence[Mapping[str, Any]],
    spans: Sequence[tuple[int, int]],
    speeds: Sequence[float],
    *,
    timestamps: bool,
) -> Tokens:
    """Tokens of one window.

    Args:
        prompter: builds them.
        records: prepared rows of one language.
        spans: the samples at which each begins and ends in the window.
        speeds: at which each is played.
        timestamps: with the times of each row's segments or, where it has none, of its begin and end.
    """
    language = records[0]["language"]
    if not timestamps:
        return prompter.encode_texts([record["text"] for record in records], language)
    segments: list[Segment] = []
    for record, (begin, end), speed in zip(records, spans, speeds, strict=True):
        begin_s, end_s = begin / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ
        own = segments_of(record, speed=speed, begin_s=begin_s)
        segments += own or [Segment(begin_s, end_s, record["text"])]
    return prompter.encode_segments(segments, language)
