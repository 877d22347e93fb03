"""What a manifest is made of: a row, the segments inside a long recording, and the reasons to leave a row out."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = {
    "bad-row": "the row itself: too many or too few fields, a number that is none, broken quoting, not UTF-8",
    "no-transcript": "a file for which the source gives no transcript",
    "missing": "no such file",
    "container": "a container that libsndfile does not open (m4a, mp4, webm...)",
    "unreadable": "not audio, or broken",
    "truncated": "shorter than its header, its captions or its row says",
    "too-short": "less than data.min_duration_s",
    "too-long": "over 30 s, and no segments to cut it at",
    "silent": "nothing to hear",
    "clipped": "too many samples at full scale",
    "bad-segments": "segments that cannot be used: out of order, without length, or over 30 s",
    "empty-text": "no text, and not marked as no_speech",
    "text-in-no-speech": "marked as no_speech, and yet with text",
    "control-token": "text that the tokenizer would read as a command",
    "too-many-tokens": "more label tokens than the decoder has positions",
    "language": "a language code that Whisper, or this checkpoint, does not know",
    "duplicate": "the same audio with the same text as another row",
    "conflict": "the same audio as another row, with another text",
}
"""Why a row is left out, as rejects.csv has it."""

SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id", "spk", "group")
"""Columns that name the speaker; of those that a row fills the first counts."""

WARNINGS = {"script": "text that is mostly in a script its language is not written in"}
"""What is only pointed out."""


@dataclass(frozen=True)
class Segment:
    """A piece of a recording and what is said in it; seconds from the beginning of the file."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Reject:
    """Why a row is left out (a key of KINDS) or pointed out (one of WARNINGS), and the reason in words."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One clip, as a source or a CSV claims it to be.

    Attributes:
        name: what it is called in reports: its path as it was given.
        path: absolute path or URI of the audio.
        language: Whisper's code.
        line: where it ends in its file; 0 where it does not come from one.
        duration_s: what the source says; None where it says nothing.
        start_s: begin of the clip inside the file; None: the file's begin.
        end_s: its end; None: the file's end.
        segments: pieces with times from the file's begin, in order; with them, the text is theirs.
        no_speech: nothing is said, on purpose: trains the no-speech token.
        extras: columns that are carried along.
        fault: what is wrong with the row before anything is looked at.
    """

    name: str
    path: str
    text: str
    language: str
    line: int = 0
    duration_s: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    segments: tuple[Segment, ...] = ()
    no_speech: bool = False
    extras: dict[str, str] = field(default_factory=dict)
    fault: Reject | None = None


def speaker_of(row: Row) -> str:
    """Who speaks, as the row's source names them; empty: not known."""
    return next((row.extras[name] for name in SPEAKER_COLUMNS if row.extras.get(name)), "")


def join_text(segments: tuple[Segment, ...], *, spaces: bool = True) -> str:
    """The text of segments in a row; `spaces` as the language writes words apart or not."""
    return (" " if spaces else "").join(segment.text for segment in segments)
