"""One row's audio looked at: what is wrong with it, or how it sounds. The builder, `check` and the job share it."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
import soundfile
import xxhash

from jobs.audio import MAX_DURATION_S, NOT_READ, UNREADABLE, AudioInfo, fault_of, open_source
from jobs.manifest.row import Reject, Row
from jobs.manifest.truncation import missing_part, mp3_header
from jobs.manifest.windows import cut, problem_of
from service.spec.paths import unknown_uri
from service.spec.sections import DataConfig

BLOCK_S = 30
FULL_SCALE = 0.9995
"""A sample from here on counts as clipped: the largest of 16-bit audio, and a little below for what was resampled."""

SLACK_S, SLACK = 0.1, 0.02
"""A file may be this much shorter than its row says, in seconds or as a share: durations are rounded, MP3s padded."""

MP3_DELAY = 2 * 1152
"""Samples of an MP3 that a decoder may leave out at its ends."""


@dataclass(frozen=True)
class Limits:
    """What a clip must keep to; see the settings of `data`.

    Attributes:
        decode: read the whole file; else its header alone, which finds no silence, no clipping and no broken middle.
    """

    min_s: float
    max_s: float
    silence_dbfs: float
    clipped_share: float
    decode: bool

    @classmethod
    def of(cls, data: DataConfig, *, decode: bool | None = None, max_s: float = MAX_DURATION_S) -> Limits:
        """The limits that a spec sets, and the longest clip that is heard whole (`math.inf`: of any length)."""
        full = data.check == "decode" if decode is None else decode
        return cls(data.min_duration_s, max_s, data.silence_dbfs, data.clipped_share, full)


@dataclass(frozen=True)
class Sound:
    """What is known of a clip's audio.

    Attributes:
        duration_s: of the clip, which may be a part of its file.
        frames: of the clip, in the file's own rate.
        rms_dbfs: loudness without the mean; None where the file was not decoded.
        digest: hash of the decoded samples, the same for every lossless copy; empty where the file was not decoded.
        version: of a file in object storage, which content it is; see `jobs.audio.Source`.
    """

    duration_s: float
    sample_rate_hz: int
    channels: int
    frames: int
    rms_dbfs: float | None = None
    digest: bytes = b""
    version: str = ""


Verdict = tuple[Row, Sound | Reject]


def examine(row: Row, limits: Limits) -> list[Verdict]:
    """Look at a row's audio.

    Returns:
        one verdict or, for a recording over 30 s that has segments, one per window: the row as it is to be used, and
        its sound or what is wrong with it.
    """
    if row.fault:
        return [(row, row.fault)]
    if not row.path:
        return [(row, Reject("missing", "path is empty"))]
    if problem := problem_of(row.segments):
        return [(row, Reject("bad-segments", problem))]
    try:
        source = open_source(row.path)
        promise = _read_promise(source.opened)
        with soundfile.SoundFile(source.opened) as file:
            if file.samplerate <= 0:
                raise soundfile.SoundFileError(f"a sample rate of {file.samplerate} Hz")
            info = AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels, file.frames)
            return _examine_file(row, _Audio(file, info, promise, source.version), limits)
    except UNREADABLE as error:
        return [(row, _unreadable(row, error))]


@dataclass(frozen=True)
class _Promise:
    """What a file's bytes say of its length: what is missing at its end, and an MP3's samples (0: not said)."""

    cut_off: str
    mp3_samples: int


@dataclass(frozen=True)
class _Audio:
    """An open file, its header as libsndfile reads it, what its bytes promise, and its version in object storage."""

    file: soundfile.SoundFile
    info: AudioInfo
    promise: _Promise
    version: str


def _read_promise(source: str | io.BytesIO) -> _Promise:
    if isinstance(source, str):
        with open(source, "rb", buffering=4096) as file:
            return _promise_of(file)
    promise = _promise_of(source)
    source.seek(0)
    return promise


def _promise_of(file: BinaryIO) -> _Promise:
    try:
        cut_off = missing_part(file)
        said = mp3_header(file)
    except struct.error:
        return _Promise("its header is cut", 0)
    return _Promise(cut_off, said.samples if said else 0)


def _examine_file(row: Row, audio: _Audio, limits: Limits) -> list[Verdict]:
    info = audio.info
    if audio.promise.cut_off:
        return [(row, Reject("truncated", f"is cut off: {audio.promise.cut_off}"))]
    if info.frames == 0:
        return [(row, Reject("too-short", "holds no sound (0 frames)"))]
    if reject := _shorter_than_said(row, info):
        return [(row, reject)]
    whole = row.start_s is None and row.end_s is None
    if row.segments and whole and info.duration_s > limits.max_s:
        return [(window, _sound(window, audio, limits)) for window in cut(row, info.duration_s, limits.max_s)]
    return [(row, _sound(row, audio, limits))]


def _sound(row: Row, audio: _Audio, limits: Limits) -> Sound | Reject:
    info = audio.info
    first = min(info.frames, round((row.start_s or 0.0) * info.sample_rate_hz))
    end = info.frames if row.end_s is None else min(info.frames, round(row.end_s * info.sample_rate_hz))
    duration_s = (end - first) / info.sample_rate_hz
    if duration_s > limits.max_s:
        if len(row.segments) == 1:
            return Reject("bad-segments", f"a segment of {duration_s:.1f} s; at most {limits.max_s:.0f} s")
        return Reject(
            "too-long", f"{duration_s:.1f} s long; at most {limits.max_s:.0f} s, so that nothing is cut off: split it"
        )
    if duration_s < limits.min_s:
        return Reject("too-short", f"{duration_s:.3f} s long; at least {limits.min_s:g} s")
    sound = Sound(duration_s, info.sample_rate_hz, info.channels, end - first, version=audio.version)
    return _listen(row, audio, sound, first, limits) if limits.decode else sound


def _listen(row: Row, audio: _Audio, sound: Sound, first: int, limits: Limits) -> Sound | Reject:
    """Decode the clip: its loudness, its clipped samples, its hash, and whether all of it is there."""
    file = audio.file
    if file.tell() != first:
        file.seek(first)
    digest = xxhash.xxh3_128(f"{sound.sample_rate_hz} {sound.channels}".encode())
    total = squares = 0.0
    clipped = done = 0
    while done < sound.frames:
        block_SC = file.read(min(sound.frames - done, BLOCK_S * sound.sample_rate_hz), dtype="float32", always_2d=True)
        if not len(block_SC):
            break
        done += len(block_SC)
        digest.update(block_SC)
        flat = block_SC.reshape(-1)
        total += float(flat.sum())
        squares += float(np.dot(flat, flat))
        if max(float(flat.max()), -float(flat.min())) >= FULL_SCALE:
            clipped += int(np.count_nonzero(np.abs(flat) >= FULL_SCALE))
    expected = sound.frames
    if file.format == "MP3":
        # Without a header that counts its frames, libsndfile's length of an MP3 is a guess.
        expected = min(expected, audio.promise.mp3_samples - MP3_DELAY) if first == 0 else 0
    if done == 0 or done < expected:
        have_s, promised_s = done / sound.sample_rate_hz, sound.frames / sound.sample_rate_hz
        return Reject("truncated", f"is cut off: {have_s:.2f} s of {promised_s:.2f} s can be decoded")
    return _judge(row, replace(sound, frames=done, digest=digest.digest()), total, squares, clipped, limits)


def _judge(row: Row, sound: Sound, total: float, squares: float, clipped: int, limits: Limits) -> Sound | Reject:
    """Whether a decoded clip can be heard, from the sums over its samples."""
    count = sound.frames * sound.channels
    if not np.isfinite(squares):
        return Reject("unreadable", "holds samples that are no finite numbers; export it again")
    rms_dbfs = 10 * float(np.log10(max(1e-20, squares / count - (total / count) ** 2)))
    if rms_dbfs < limits.silence_dbfs and not row.no_speech:
        return Reject("silent", f"is silent ({rms_dbfs:.0f} dBFS; at least {limits.silence_dbfs:g})")
    if clipped / count > limits.clipped_share:
        share = f"{clipped / count:.1%} of its samples at full scale; at most {limits.clipped_share:.1%}"
        return Reject("clipped", f"is clipped ({share})")
    return replace(sound, rms_dbfs=round(rms_dbfs, 1))


def _shorter_than_said(row: Row, info: AudioInfo) -> Reject | None:
    have_s = info.duration_s
    claims = [(row.end_s, "its row ends"), (row.segments[-1].end_s if row.segments else None, "its segments end")]
    if row.start_s is None and row.end_s is None:
        claims.append((row.duration_s, "its row ends"))
    for said_s, who in claims:
        if said_s is not None and have_s < said_s - max(SLACK_S, SLACK * said_s):
            return Reject("truncated", f"is {have_s:.2f} s long, and {who} at {said_s:.2f} s")
    return None


def _unreadable(row: Row, error: Exception) -> Reject:
    reason = fault_of(row.path, error).faults[0].message
    if isinstance(error, FileNotFoundError) or unknown_uri(row.path):
        return Reject("missing", reason)
    if PurePosixPath(row.path).suffix.lower() in NOT_READ:
        return Reject("container", reason)
    if "lost sync" in reason:
        return Reject("truncated", f"is cut off or broken in the middle: {reason}")
    return Reject("unreadable", reason)
