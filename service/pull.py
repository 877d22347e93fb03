"""A complete run brought to this machine, all of it or some artifacts, gone on with where it was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from service.artifacts import (
    ADAPTER,
    CARD,
    EXPORTS,
    MANIFEST,
    MERGED,
    METRICS,
    PULLED,
    REPORT,
    SPEC,
    FileRecord,
    RunManifest,
)
from service.errors import Fault, InputError, NotFoundError, VerificationError
from service.storage import Progress, Storage, sha256_of
from service.storage.transfer import Meter, download, in_parallel

ALWAYS = (SPEC, METRICS, CARD, REPORT)
"""What comes with every artifact, beside manifest.json."""

FOLDERS = {"adapter": ADAPTER, "hf": MERGED}
"""Artifacts that are no exports, and their folders."""

_MEASURED_AS = {"adapter": "tuned"}
"""Under which name the manifest has the WER of an artifact, where it is another."""


class Artifact(BaseModel):
    """Something that a run has made for a runtime to open."""

    name: str
    folder: str
    files: int
    size_bytes: int
    wer: float | None
    refused: str | None
    """Why it is not to be used; None: it is."""


class PullReport(BaseModel):
    """What `pull` did."""

    root: str
    folder: str
    artifacts: list[str]
    files: int
    size_bytes: int
    downloaded: int
    """Files that were not there yet."""
    left_out: dict[str, str]
    """Refused artifacts, each with its reason."""


def artifacts_of(manifest: RunManifest) -> list[Artifact]:
    """The artifacts of a run, refused ones too."""
    exports = {PurePosixPath(record.path).parts[1] for record in _below(manifest, EXPORTS)}
    exports |= manifest.refused.keys() - FOLDERS.keys()
    folders = FOLDERS | {name: f"{EXPORTS}/{name}" for name in sorted(exports)}
    found = []
    for name, folder in folders.items():
        records = _below(manifest, folder)
        if records or name in manifest.refused:
            found.append(
                Artifact(
                    name=name,
                    folder=folder,
                    files=len(records),
                    size_bytes=sum(record.size_bytes for record in records),
                    wer=manifest.wer.get(_MEASURED_AS.get(name, name)),
                    refused=manifest.refused.get(name),
                )
            )
    return found


def pull(
    source: Storage,
    manifest: RunManifest,
    target: Path,
    *,
    only: Sequence[str] = (),
    refused: bool = False,
    progress: Progress | None = None,
) -> PullReport:
    """Bring the files of a complete run to a folder; those that are there and right are passed over.

    Args:
        source: the run's root.
        manifest: its manifest.json.
        target: the folder.
        only: artifacts: a name, or the first word of several (`ggml` of ggml-f16); none: all of the run.
        refused: also artifacts that are not to be used.
        progress: takes (bytes done, bytes in all).

    Raises:
        InputError: there is no such artifact, or it is refused.
        VerificationError: a file is not what the manifest says.
    """
    chosen, left_out = _choose(manifest, only, refused=refused)
    unwanted = tuple(f"{one.folder}/" for one in artifacts_of(manifest) if one.name not in chosen)
    wanted = tuple(f"{one.folder}/" for one in artifacts_of(manifest) if one.name in chosen)
    records = [
        record
        for record in manifest.files
        if (record.path.startswith(wanted) or record.path in ALWAYS if only else not record.path.startswith(unwanted))
    ]
    _require_inside(records)
    meter = Meter(sum(record.size_bytes for record in records), progress)

    def get(record: FileRecord) -> bool:
        path = target / record.path
        if path.is_file() and path.stat().st_size == record.size_bytes and sha256_of(path) == record.sha256:
            meter.advance(record.size_bytes)
            return False

        def read(start: int, length: int) -> bytes:
            return source.read_bytes(record.path, start, length)

        try:
            download(read, record.size_bytes, record.sha256, record.sha256, path, meter)
        except (NotFoundError, VerificationError) as error:
            raise VerificationError(f"{source.path(record.path)}: is not what {MANIFEST} says ({error})") from error
        return True

    downloaded = sum(in_parallel(get, records))
    brought = {record.path for record in records}
    Storage(str(target)).write_json(PULLED, [one.path for one in manifest.files if one.path not in brought])
    Storage(str(target)).write_bytes(MANIFEST, source.read_bytes(MANIFEST))
    return PullReport(
        root=source.uri,
        folder=str(target),
        artifacts=chosen,
        files=len(records) + 1,
        size_bytes=sum(record.size_bytes for record in records),
        downloaded=downloaded,
        left_out=left_out,
    )


def _choose(manifest: RunManifest, only: Sequence[str], *, refused: bool) -> tuple[list[str], dict[str, str]]:
    """The names of the artifacts to bring, and the refused ones among those asked for with their reasons."""
    there = {one.name: one for one in artifacts_of(manifest)}
    asked: list[str] = []
    faults = []
    for word in only or there:
        found = [name for name in there if name == word or name.startswith(f"{word}-")]
        if not found:
            faults.append(Fault("--only", f"is no artifact of this run; it has {', '.join(there) or 'none'}", word))
        kept = [name for name in found if refused or not there[name].refused]
        if only and found and not kept:
            reason = there[found[0]].refused
            faults.append(Fault("--only", f"was refused: {reason}; --refused brings it all the same", found[0]))
        asked += found
    if faults:
        raise InputError(faults)
    left_out = {name: str(there[name].refused) for name in asked if there[name].refused and not refused}
    return [name for name in dict.fromkeys(asked) if name not in left_out], left_out


def _below(manifest: RunManifest, folder: str) -> list[FileRecord]:
    return [record for record in manifest.files if record.path.startswith(f"{folder}/")]


def _require_inside(records: list[FileRecord]) -> None:
    """A manifest may come from anywhere: no name in it leads out of the folder."""
    for record in records:
        path = PurePosixPath(record.path)
        if path.is_absolute() or ".." in path.parts:
            raise VerificationError(f"{MANIFEST}: {record.path!r} leads out of the folder; nothing was downloaded")
