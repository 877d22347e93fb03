"""Audio files to mono 16 kHz samples, whatever their rate and channel count."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from service.errors import Fault, ManifestError
from service.spec.paths import is_stored, is_uri, unknown_uri
from service.storage.near import ChangedError, Version, fetch_near

SAMPLE_RATE_HZ = 16_000
"""What every Whisper checkpoint hears."""

MAX_DURATION_S = 30.0
"""One Whisper window. Anything beyond it would be cut off silently by the feature extractor."""

NOT_READ = (".m4a", ".mp4", ".webm", ".wma", ".aac", ".mkv", ".mov")
"""Containers that libsndfile does not open."""

UNREADABLE = (OSError, soundfile.SoundFileError, ValueError, ImportError)  # the last two: a protocol without a driver
"""What opening and decoding raise."""


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file's header says."""

    duration_s: float
    sample_rate_hz: int
    channels: int
    frames: int


@dataclass(frozen=True)
class Source:
    """An audio file at hand.

    Attributes:
        opened: what libsndfile is given: a path, or the bytes.
        version: of what lies in object storage, which content it is; else empty.
    """

    opened: str | io.BytesIO
    version: str = ""


def open_source(path: str, version: str = "") -> Source:
    """Have a file at hand: itself, or a copy of what lies in object storage, which the node's processes share.

    Args:
        path: path or URI.
        version: what it must be: `Source.version` of an earlier call; empty: what there is now.

    Raises:
        OSError, ValueError, ImportError: there is no such file, or it cannot be had.
        StorageError, InputError: the store cannot be used, whatever the file.
    """
    if is_stored(path):
        near = fetch_near(path, Version.parse(version) if version else None)
        opened = str(near.content) if isinstance(near.content, Path) else io.BytesIO(near.content)
        return Source(opened, str(near.version))
    if problem := unknown_uri(path, "a path"):
        raise ValueError(problem)
    if is_uri(path):
        try:
            with fsspec.open(path, "rb") as file:  # a clip is small
                return Source(io.BytesIO(file.read()))
        except UNREADABLE:
            raise
        except Exception as error:  # each store's driver has errors of its own
            raise OSError(str(error)) from error
    with open(path, "rb"):  # libsndfile says "System error" for a missing file
        return Source(path)


def fault_of(path: str, error: Exception) -> ManifestError:
    """What the user is told where a file cannot be opened or decoded."""
    if problem := unknown_uri(path, "a path"):
        return ManifestError([Fault(path, problem)])
    if path.lower().endswith(NOT_READ):
        stem = path.rsplit(".", 1)[0]
        return ManifestError(
            [Fault(path, f"this container cannot be read; convert it: ffmpeg -i {path} -ar 16000 -ac 1 {stem}.flac")]
        )
    if isinstance(error, ChangedError):
        return ManifestError([Fault(path, "has changed since the job checked it")])
    said = str(getattr(error, "error_string", error)).rstrip(".")
    reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read as audio ({said})"
    return ManifestError([Fault(path, reason)])


def probe(path: str) -> AudioInfo:
    """Read a file's header.

    Raises:
        ManifestError: there is no such file, or it is not audio that libsndfile reads.
    """
    try:
        with soundfile.SoundFile(open_source(path).opened) as file:
            if file.samplerate <= 0:
                raise soundfile.SoundFileError(f"a sample rate of {file.samplerate} Hz")
            return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels, file.frames)
    except UNREADABLE as error:
        raise fault_of(path, error) from error


def read_audio(
    path: str, start_s: float | None = None, end_s: float | None = None, version: str = ""
) -> NDArray[np.float32]:
    """Decode a file or a part of it, mix it down and resample it.

    Args:
        path: path or URI.
        start_s: where the part begins, in seconds; None: at the file's begin.
        end_s: where it ends; None: at the file's end.
        version: of what lies in object storage, which content it must be; see `open_source`.

    Returns:
        float32 samples (S,) at 16 kHz, full scale 1.

    Raises:
        ManifestError: the file cannot be read, or holds NaN or infinity.
    """
    try:
        with soundfile.SoundFile(open_source(path, version).opened) as file:
            rate_hz = file.samplerate
            if start_s:
                file.seek(min(file.frames, round(start_s * rate_hz)))
            wanted = -1 if end_s is None else max(0, round(end_s * rate_hz) - round((start_s or 0.0) * rate_hz))
            samples_SC = file.read(wanted, dtype="float32", always_2d=True)
    except UNREADABLE as error:
        raise fault_of(path, error) from error
    if not np.isfinite(samples_SC).all():
        raise ManifestError([Fault(path, "holds samples that are no finite numbers; export it again")])
    mono_S = samples_SC.mean(axis=1, dtype=np.float32)
    if rate_hz != SAMPLE_RATE_HZ:
        mono_S = soxr.resample(mono_S, rate_hz, SAMPLE_RATE_HZ)
    return np.ascontiguousarray(mono_S, dtype=np.float32)
