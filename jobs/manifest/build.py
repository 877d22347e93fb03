"""`manifest build`: a folder of audio whose file names carry the transcripts -> train.csv, val.csv and rejects.csv."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jobs.audio import MAX_DURATION_S, NOT_READ, probe
from service.artifacts import REJECTS
from service.errors import Fault, InputError, ManifestError
from service.spec.languages import LANGUAGES

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aiff", ".aif", ".au", ".caf", *NOT_READ)

DEFAULT_PATTERN = r"(?:[^_]+__)??(?:(?P<language>[a-z]{2}|haw|yue)__)?(?P<text>(?:(?!__).)+)"
"""Takes `turn_it_on.wav`, `0001__turn_it_on.wav`, `en__turn_it_on.wav` and `0001__en__turn_it_on.wav`."""

COLUMNS = ("path", "text", "language", "duration_s")


@dataclass(frozen=True)
class Clip:
    """A usable clip: path relative to the manifest's folder, `/` between its parts."""

    path: str
    text: str
    language: str
    duration_s: float


@dataclass(frozen=True)
class Reject:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    train: int
    val: int
    rejected: int
    train_hours: float
    val_hours: float
    folder: str


def build(
    audio_dir: Path,
    out: Path,
    *,
    pattern: str = DEFAULT_PATTERN,
    val_ratio: float = 0.1,
    seed: int = 42,
    language: str = "en",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Write train.csv, val.csv and rejects.csv for the audio below a folder.

    Args:
        audio_dir: searched with all of its sub-folders.
        out: folder of the manifests; made if it is not there.
        pattern: regular expression over a file's name without its extension, with a named group `text` and, optionally,
            `language`; it must match the whole name. Underscores in the text become spaces.
        val_ratio: share of the sentences that is held out, 0 < val_ratio < 1.
        seed: the split's seed. A sentence's side depends on it and on the sentence alone, so it stays when files are
            added, and no sentence is on both sides.
        language: code for files whose name gives none.
        progress: called with (files done, files).

    Raises:
        InputError: the folder, pattern or ratio is unusable.
        ManifestError: nothing usable is left on one of the sides.
    """
    expression = _check_arguments(audio_dir, pattern, val_ratio, language)
    files = sorted(_audio_files(audio_dir))
    if not files:
        raise ManifestError([Fault(str(audio_dir), f"holds no audio ({', '.join(AUDIO_SUFFIXES[:6])}, ...)")])
    clips: list[Clip] = []
    rejects: list[Reject] = []
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        found = pool.map(lambda file: _examine(file, audio_dir, out, expression, language), files)
        for done, item in enumerate(found, 1):
            if isinstance(item, Clip):
                clips.append(item)
            else:
                rejects.append(item)
            progress(done, len(files))
    train, val = _split(clips, val_ratio, seed)
    if not train or not val:
        side = "train" if not train else "validation"
        raise ManifestError(
            [
                Fault(
                    str(audio_dir),
                    f"leaves no {side} clip: {len(clips)} usable of {len(files)} files"
                    + (
                        f"; left out: {rejects[0].path}, {rejects[0].reason}"
                        if rejects
                        else "; give more files or another --val-ratio"
                    ),
                )
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "train.csv", COLUMNS, (_fields(clip) for clip in train))
    _write(out / "val.csv", COLUMNS, (_fields(clip) for clip in val))
    _write(out / REJECTS, ("path", "reason"), ((reject.path, reject.reason) for reject in rejects))
    return BuildReport(
        train=len(train),
        val=len(val),
        rejected=len(rejects),
        train_hours=sum(clip.duration_s for clip in train) / 3600,
        val_hours=sum(clip.duration_s for clip in val) / 3600,
        folder=str(out),
    )


def _check_arguments(audio_dir: Path, pattern: str, val_ratio: float, language: str) -> re.Pattern[str]:
    faults = []
    if not audio_dir.is_dir():
        faults.append(Fault("AUDIO_DIR", "is not a folder", str(audio_dir)))
    if not 0 < val_ratio < 1:
        faults.append(Fault("--val-ratio", "must lie between 0 and 1, such as 0.1", val_ratio))
    if language not in LANGUAGES:
        faults.append(Fault("--language", "is not a language code that Whisper knows, such as en", language))
    expression = None
    try:
        expression = re.compile(pattern)
        if "text" not in expression.groupindex:
            faults.append(Fault("--pattern", "has no named group (?P<text>...)", pattern))
    except re.error as error:
        faults.append(Fault("--pattern", f"is not a valid regular expression ({error})", pattern))
    if faults or expression is None:
        raise InputError(faults)
    return expression


def _audio_files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.lower().endswith(AUDIO_SUFFIXES):
                yield Path(parent, name)


def _examine(file: Path, audio_dir: Path, out: Path, expression: re.Pattern[str], default: str) -> Clip | Reject:
    name = file.relative_to(audio_dir).as_posix()
    shown = name.encode(errors="backslashreplace").decode()
    if shown != name:
        return Reject(shown, "its name is not UTF-8")
    match = expression.fullmatch(file.stem)
    if match is None:
        return Reject(shown, f"its name does not match the pattern {expression.pattern}")
    groups = match.groupdict()
    text = " ".join((groups["text"] or "").replace("_", " ").split())
    language = (groups.get("language") or default).lower()
    if not text:
        return Reject(shown, "its name holds no text")
    if language not in LANGUAGES:
        return Reject(shown, f"{language!r} is not a language code that Whisper knows")
    try:
        info = probe(str(file))
    except ManifestError as error:
        return Reject(shown, error.faults[0].message)
    if info.frames == 0:
        return Reject(shown, "holds no sound (0 frames)")
    if info.duration_s > MAX_DURATION_S:
        return Reject(shown, f"{info.duration_s:.1f} s long; at most {MAX_DURATION_S:.0f} s")
    relative = os.path.relpath(file.absolute(), out.absolute()).replace(os.sep, "/")
    return Clip(relative, text, language, round(info.duration_s, 3))


def _split(clips: list[Clip], val_ratio: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    def side(clip: Clip) -> bool:
        # A hash of the sentence, not its rank in a shuffle: adding files moves no other file.
        digest = hashlib.sha256(f"{seed}\0{clip.text.casefold()}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < val_ratio * 2**64

    return [clip for clip in clips if not side(clip)], [clip for clip in clips if side(clip)]


def _fields(clip: Clip) -> tuple[str, str, str, str]:
    return clip.path, clip.text, clip.language, f"{clip.duration_s:.3f}"


def _write(path: Path, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    aside.replace(path)
