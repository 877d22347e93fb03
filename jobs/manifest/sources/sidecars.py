"""Transcripts from files beside the audio: `clip.txt`, `.srt`, `.vtt`, or `.json` as Whisper's own tools write it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.manifest.captions import parse_captions
from jobs.manifest.row import Reject, Row, join_text
from jobs.manifest.rows import YES, parse_segments
from jobs.manifest.sources.folder import SIDECARS, audio_files, count_audio, name_of, require_folder, sidecars_of
from jobs.manifest.sources.options import SourceOptions, language_code
from service.spec.languages import WITHOUT_SPACES


class SidecarSource:
    """A folder with a transcript file beside each audio file.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, location: str, options: SourceOptions) -> None:
        self._folder = require_folder(location)
        self._language = options.language

    def total(self) -> int:
        """Audio files."""
        return count_audio(self._folder)

    def rows(self) -> Iterator[Row]:
        """A row per audio file."""
        return map(self._row, audio_files(self._folder))

    def _row(self, file: Path) -> Row:
        name, fault = name_of(file, self._folder)
        path = str(file.absolute())
        found = sidecars_of(file) if fault is None else []
        if fault is None and not found:
            names = ", ".join(f"{file.stem}{suffix}" for suffix in SIDECARS)
            fault = Reject("no-transcript", f"has no transcript beside it ({names})")
        elif fault is None:
            try:
                return Row(name, path, **self._read(found[0]))
            except (OSError, ValueError, TypeError, RecursionError) as error:
                fault = Reject("no-transcript", f"its transcript, {found[0].name}, cannot be read ({error})")
        return Row(name, path, "", self._language, fault=fault)

    def _read(self, sidecar: Path) -> dict[str, Any]:
        content = sidecar.read_bytes().decode("utf-8-sig")
        suffix = sidecar.suffix.lower()
        if suffix == ".json":
            return self._from_json(json.loads(content))
        if suffix == ".txt":
            return {"text": " ".join(content.split()), "language": self._language}
        segments = tuple(parse_captions(content))
        text = join_text(segments, spaces=self._language not in WITHOUT_SPACES)
        return {"text": text, "language": self._language, "segments": segments}

    def _from_json(self, content: Any) -> dict[str, Any]:
        if isinstance(content, str):
            content = {"text": content}
        if not isinstance(content, dict):
            raise ValueError("it holds no object with a text")
        language = language_code(str(content.get("language") or ""), self._language)
        segments = parse_segments(content["segments"]) if content.get("segments") else ()
        text = content.get("text")
        if segments or text is None:
            text = join_text(segments, spaces=language not in WITHOUT_SPACES)
        if not isinstance(text, str):
            raise ValueError(f"its text is {json.dumps(text)[:40]}")
        used = {"text", "language", "segments", "no_speech"}
        return {
            "text": " ".join(text.split()),
            "language": language,
            "segments": segments,
            "no_speech": str(content.get("no_speech", "")).lower() in YES,
            "extras": {
                key: str(value)
                for key, value in content.items()
                if key not in used and isinstance(value, str | int | float) and not isinstance(value, bool)
            },
        }
