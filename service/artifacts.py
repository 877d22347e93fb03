"""The artifacts of a run: their layout, manifest.json, and the check of both.

<root>/
  spec.json  events.jsonl  metrics.json  README.md  rejects.csv
  data/             the rows that were used, with their hash
  evaluation/       every utterance's reference and hypotheses
  checkpoints/      as Ray Train keeps them, and initial/: how the adapter began
  report.html       all of it, for a browser
  search/           a search's table (trials.json), and per trial its record, curves and, while it may win, checkpoints
  tensorboard/      training curves
  adapter/          PEFT
  merged/           transformers checkpoint: the artifact `hf`
  exports/<name>/   the other artifacts, each a folder that its runtime opens
  manifest.json     written last: its presence means complete
"""

from __future__ import annotations

import json
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import NotFinishedError, NotFoundError

SPEC = "spec.json"
EVENTS = "events.jsonl"
METRICS = "metrics.json"
CARD = "README.md"
REJECTS = "rejects.csv"
REPORT = "report.html"
SEARCH = "search"
TRIALS = f"{SEARCH}/trials.json"
WINNER = f"{SEARCH}/winner.json"
"""The train job that makes a search's winner, as a spec that can be run as it stands."""
FINALISTS = f"{SEARCH}/adapters"
"""Adapters of the other configurations that were taken to the end, by trial."""
DATA = "data"
EVALUATION = "evaluation"
BASE_LINES = f"{EVALUATION}/base.jsonl"
TUNED_LINES = f"{EVALUATION}/tuned.jsonl"
MERGED_LINES = f"{EVALUATION}/merged.jsonl"
MODEL_LINES = f"{EVALUATION}/model.jsonl"
GUARD_BASE_LINES = f"{EVALUATION}/guard_base.jsonl"
GUARD_TUNED_LINES = f"{EVALUATION}/guard_tuned.jsonl"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
ADAPTER = "adapter"
MERGED = "merged"
EXPORTS = "exports"
PULLED = ".wj-pulled.json"
"""Beside the manifest of a run of which a part was pulled: the files that were left out."""

REFUSED = "REFUSED.txt"
"""In the folder of an export that did not pass its proof: why."""
MANIFEST = "manifest.json"

DATASET = f"{DATA}/dataset"

UNLISTED = (MANIFEST, f"{CHECKPOINTS}/", f"{TENSORBOARD}/", f"{DATASET}/", f"{SEARCH}/trials/")
"""What manifest.json does not hash: itself, and what is there for going on with a run rather than a result of it (of
the data it has the hash of what was used, and of a search's trials the table)."""


class FileRecord(BaseModel):
    """One file of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size_bytes: int
    sha256: str


class BaseModelRecord(BaseModel):
    """The checkpoint that a run began with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    revision: str | None
    """Commit on the hub; None for a local folder."""
    weights_sha256: dict[str, str]
    """SHA-256 of each weight file, as the hub shows it too."""


class RunManifest(BaseModel):
    """manifest.json: what a complete run consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    job_id: str
    kind: str
    spec_sha256: str
    created: str
    """UTC time of completion, ISO 8601."""
    versions: dict[str, str]
    base: BaseModelRecord | None
    data: dict[str, Any]
    """Per split: rows, hours and the SHA-256 of its content."""
    wer: dict[str, float]
    """Word error rate per artifact, after Whisper's normaliser, as a fraction."""
    promoted: bool | None
    refused: dict[str, str] = {}
    """Artifacts that did not pass their proof, each with the reason."""
    search: dict[str, Any] | None = None
    """Of a search: its winner, that one's settings, its seed, and every trial's result."""
    files: list[FileRecord]


class Files(Protocol):
    """What this module needs of a storage root (service.storage.Storage has it)."""

    uri: str

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""

    def read_bytes(self, name: str) -> bytes:
        """The whole file."""

    def files(self) -> Any:
        """Every file as (name, size in bytes)."""

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content."""


class VerifyReport(BaseModel):
    """What `verify` found."""

    root: str
    files: int
    size_bytes: int
    problems: list[str]


def folder_of(artifact: str) -> str:
    """Where an artifact of a run lies, below its root."""
    return {"hf": MERGED, ADAPTER: ADAPTER}.get(artifact, f"{EXPORTS}/{artifact}")


def size_text(size_bytes: int) -> str:
    """A size in words: `370 kB`, `4.9 MB`, `1.62 GB`."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def file_records(root: Files) -> list[FileRecord]:
    """Name, size and hash of every file that manifest.json lists."""
    return [
        FileRecord(path=name, size_bytes=size, sha256=root.sha256(name))
        for name, size in root.files()
        if not name.startswith(UNLISTED)
    ]


def read_manifest(root: Files) -> RunManifest:
    """manifest.json of a complete run.

    Raises:
        NotFoundError: there is no such root.
        NotFinishedError: the run has not written it yet, or it cannot be read.
    """
    if not root.exists():
        raise NotFoundError(f"{root.uri}: no such folder; give the root of a run")
    if not root.exists(MANIFEST):
        held = "the run is not complete" if root.exists(SPEC) else "this is not the root of a run"
        raise NotFinishedError(f"{root.uri}: no {MANIFEST}: {held}")
    try:
        return RunManifest.model_validate_json(root.read_bytes(MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise NotFinishedError(f"{root.uri}/{MANIFEST}: cannot be read: {place}: {first['msg'].lower()}") from None


def verify(root: Files) -> VerifyReport:
    """Recheck every file of a complete run against manifest.json: presence, size, hash, and nothing unlisted.

    Raises:
        NotFoundError: there is no such root.
        NotFinishedError: there is no readable manifest.json.
    """
    manifest = read_manifest(root)
    present = {name: size for name, size in root.files() if not name.startswith(UNLISTED)}
    problems = []
    left_out = set(json.loads(root.read_bytes(PULLED))) if root.exists(PULLED) else set()
    expected = [record for record in manifest.files if record.path in present or record.path not in left_out]
    for record in expected:
        size = present.pop(record.path, None)
        if size is None:
            problems.append(f"{record.path}: missing")
        elif size != record.size_bytes:
            problems.append(f"{record.path}: {size} bytes, {record.size_bytes} expected")
        elif root.sha256(record.path) != record.sha256:
            problems.append(f"{record.path}: content differs from what was published (SHA-256)")
    problems += [f"{name}: not in {MANIFEST}" for name in present]
    return VerifyReport(
        root=root.uri,
        files=len(expected),
        size_bytes=sum(record.size_bytes for record in expected),
        problems=problems,
    )
