"""Everything that the root of a run holds for a report, as one plain object. What is missing is left out."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from service import artifacts
from service.artifacts import RunManifest, read_manifest
from service.errors import InputError, NotFoundError
from service.report.curves import Curves, read_curves
from service.report.lines import Line, read_lines
from service.storage import Storage
from service.trials import Search, read_search

T = TypeVar("T")

SIDES = {
    "base": artifacts.BASE_LINES,
    "tuned": artifacts.TUNED_LINES,
    "model": artifacts.MODEL_LINES,
}
"""Models whose utterances a root may hold, in the order in which they are shown."""

PREPARED = "stages/prepare.json"
"""What the first stage has left: the data's figures, before manifest.json has them."""

SHOWN_REJECTS = 500


@dataclass(frozen=True)
class Rejects:
    """rejects.csv.

    Attributes:
        counts: rows by split and kind.
        rows: the first SHOWN_REJECTS of them, each as {"split", "path", "kind", "reason"}.
    """

    counts: Counter[tuple[str, str]]
    rows: list[dict[str, str]]

    @property
    def total(self) -> int:
        """How many there are."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        uri: its root.
        spec: spec.json.
        metrics: metrics.json; {} while there is none.
        manifest: manifest.json; None while the run is not complete.
        data: per split what is known of it.
        curves: of the training.
        sides: utterances by model, see SIDES.
        search: the table of a search.
        rejects: rows that were left out.
    """

    uri: str
    spec: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    manifest: RunManifest | None = None
    data: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    sides: dict[str, list[Line]] = field(default_factory=dict)
    search: Search | None = None
    rejects: Rejects | None = None

    @property
    def kind(self) -> str:
        """What the job does."""
        return str(self.spec.get("kind", "train"))

    @property
    def job_id(self) -> str:
        """Name of the job."""
        named = self.metrics.get("job_id") or (self.manifest.job_id if self.manifest else None)
        return str(named or self.spec.get("name") or self.uri.rstrip("/").rsplit("/", 1)[-1])

    @property
    def final(self) -> str | None:
        """Which of the metrics is the run's result: `tuned`, or `model` of a job that only scores or exports."""
        return next((name for name in ("tuned", "model") if name in self.metrics), None)

    @property
    def result(self) -> list[Line]:
        """What the run's model heard."""
        return next((self.sides[name] for name in ("tuned", "model", "base") if name in self.sides), [])


def read_run(root: Storage, manifest: RunManifest | None = None) -> Run:
    """Read a run.

    Args:
        root: its root.
        manifest: what is about to be written as manifest.json, where it is not there yet.

    Raises:
        NotFoundError: there is no such root, or it is none of a run.
        InputError: one of its files cannot be read.
    """
    if not root.exists():
        raise NotFoundError(f"{root.uri}: no such folder; give the root of a run")
    if not root.exists(artifacts.SPEC):
        raise NotFoundError(f"{root.uri}: no {artifacts.SPEC}: this is not the root of a run")
    if manifest is None and root.exists(artifacts.MANIFEST):
        manifest = read_manifest(root)
    search = _read(root, artifacts.TRIALS, lambda _: read_search(root))
    winner = search.winner if search else None
    spec = _read(root, artifacts.SPEC, _mapping) or {}
    # An export has been heard as a merged checkpoint; of a training that is the tuned model once more.
    files = SIDES | ({"model": artifacts.MERGED_LINES} if spec.get("kind") == "export" else {})
    sides = {name: _read(root, file, read_lines) for name, file in files.items()}
    prepared = _read(root, PREPARED, _mapping) or {}
    return Run(
        uri=root.uri,
        spec=spec,
        metrics=_read(root, artifacts.METRICS, _mapping) or {},
        manifest=manifest,
        data=manifest.data if manifest else prepared.get("result", {}),
        curves=_read(root, artifacts.EVENTS, lambda content: read_curves(content, winner)) or Curves(),
        sides={name: lines for name, lines in sides.items() if lines},
        search=search,
        rejects=_read(root, artifacts.REJECTS, _rejects),
    )


def _read(root: Storage, name: str, parse: Callable[[bytes], T]) -> T | None:
    """A file of the root as it is parsed; None: there is none."""
    try:
        content = root.read_bytes(name)
    except NotFoundError:
        return None
    try:
        return parse(content)
    except (ValueError, KeyError, TypeError, csv.Error, ValidationError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{root.path(name)}: cannot be read ({reason})") from error


def _mapping(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise TypeError("it is no JSON object")
    return found


def _rejects(content: bytes) -> Rejects:
    found = Rejects(Counter(), [])
    for row in csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")):
        found.counts[str(row["split"]), str(row["kind"])] += 1
        if len(found.rows) < SHOWN_REJECTS:
            found.rows.append({key: str(row[key]) for key in ("split", "path", "kind", "reason")})
    return found
