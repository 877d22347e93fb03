"""Transcripts and audio from a `datasets` source: a hub id, or a local folder that `datasets` has saved or can load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.manifest.row import Reject, Row
from jobs.manifest.rows import KNOWN, YES
from jobs.manifest.sources.options import SourceOptions, language_code
from jobs.manifest.sources.table import LANGUAGE_NAMES, plain_text
from service.errors import Fault, InputError
from service.spec.csv_header import PATH_NAMES, TEXT_NAMES

AUDIO = "audio"
"""Folder below the manifests for audio that is inside a dataset's tables."""

_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
_MAGIC = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff"}


def is_dataset_folder(folder: Path) -> bool:
    """Whether `datasets` made a folder: saved to disk, or tables in Parquet or Arrow."""
    if any((folder / name).exists() for name in _SAVED):
        return True
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*.arrow", "data/*.parquet"))


class HubSource:
    """A dataset, all of its splits. Its audio is taken as stored, never decoded and encoded again.

    Raises:
        InputError: it cannot be had.
    """

    def __init__(self, location: str, options: SourceOptions) -> None:
        import datasets

        datasets.disable_progress_bars()
        self._location, self._options = location, options
        folder = Path(location)
        try:
            if any((folder / name).exists() for name in _SAVED):
                found = datasets.load_from_disk(location)
            else:
                # From the hub row by row: nothing but what is used is kept.
                found = datasets.load_dataset(location, options.dataset_config, streaming=not folder.is_dir())
        except Exception as error:  # whatever the hub, HTTP and the builders raise
            reason = str(error).strip().split("\n", 1)[0][:200]
            raise InputError([Fault("SOURCE", f"cannot be loaded as a dataset ({reason})", location)]) from error
        self._splits: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}
        self._columns = {name: self._find_columns(split) for name, split in self._splits.items()}

    def _find_columns(self, split: Any) -> tuple[str, str]:
        import datasets

        features = split.features or {}
        audio = [name for name, kind in features.items() if isinstance(kind, datasets.Audio)]
        options = self._options
        found = []
        for option, what, wanted in (
            ("--path-column", "audio", [options.path_column] if options.path_column else [*audio, *PATH_NAMES]),
            ("--text-column", "transcripts", [options.text_column] if options.text_column else [*TEXT_NAMES]),
        ):
            name = next((name for name in wanted if name in features), None)
            if name is None:
                text = f"has no known column of {what} (it has {', '.join(features)}); give {option}"
                raise InputError([Fault("SOURCE", text, self._location)])
            found.append(name)
        return found[0], found[1]

    def total(self) -> int:
        """Rows, where the dataset is not streamed."""
        return sum(len(split) if hasattr(split, "__len__") else 0 for split in self._splits.values())

    def rows(self) -> Iterator[Row]:
        """A row per example. Its split becomes the column `split`."""
        import datasets

        for name, split in self._splits.items():
            audio_column, text_column = self._columns[name]
            if isinstance(split.features[audio_column], datasets.Audio):
                split = split.cast_column(audio_column, datasets.Audio(decode=False))
            for number, example in enumerate(split):
                yield self._row(f"{name}/{number:09}", name, example, audio_column, text_column)

    def _row(self, name: str, split: str, example: dict[str, Any], audio_column: str, text_column: str) -> Row:
        language_column = next((column for column in LANGUAGE_NAMES if column in example), "")
        used = {audio_column, text_column, language_column, *KNOWN, "split"}
        extras = {
            column: plain_text(value)
            for column, value in example.items()
            if column not in used and isinstance(value, str | int | float | None)
        }
        path, fault = "", None
        try:
            path = self._place(example[audio_column])
        except (ValueError, TypeError, AttributeError) as error:
            fault = Reject("missing", f"the dataset gives no audio ({error})")
        return Row(
            name=name,
            path=path,
            text=" ".join(plain_text(example[text_column]).split()),
            language=language_code(plain_text(example.get(language_column)), self._options.language),
            no_speech=plain_text(example.get("no_speech")).lower() in YES,
            extras=extras | {"split": split},
            fault=fault,
        )

    def _place(self, audio: Any) -> str:
        """A path to the audio of an example; what has none is written below the manifests under its hash."""
        if isinstance(audio, str):
            return audio if "://" in audio or Path(audio).is_absolute() else str(Path(self._location, audio).absolute())
        content, path = audio.get("bytes"), audio.get("path")
        if content is None:
            if path and Path(path).exists():
                return str(Path(path).absolute())
            raise ValueError(f"no bytes, and no file {path}")
        digest = hashlib.sha256(content).hexdigest()[:32]
        guess = _MAGIC.get(content[:4], ".mp3" if content[:1] == b"\xff" or content[:3] == b"ID3" else ".bin")
        suffix = Path(path or "").suffix.lower() or guess
        target = self._options.out.absolute() / AUDIO / digest[:2] / f"{digest}{suffix}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.new")
            aside.write_bytes(content)
            aside.replace(target)
        return str(target)
