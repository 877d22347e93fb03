"""What has to go to storage before a cluster can read what a spec names, and what of it is there already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from service.artifacts import size_text
from service.errors import Fault, InputError, ManifestError
from service.spec import look
from service.spec.checks import trains
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.paths import is_uri
from service.storage import Progress, Storage
from service.storage.transfer import in_parallel
from service.upload.csvs import CSVS, clip_name, clips_of, hash_rewritten, row_faults
from service.upload.hashes import Files, LocalFile
from service.upload.models import (
    VAL,
    base_of,
    checkpoint_files,
    dataset_files,
    is_local,
    lends_rows,
    model_files,
)

UPLOADS, MODELS, DATASETS = "uploads", "models", "datasets"

SHOWN_FAULTS = 100

_OF_TRAINING = ("training.train_csv", "training.val_csv", "guard.csv")

CSV_SETTINGS = {
    "train": _OF_TRAINING,
    "search": _OF_TRAINING,
    "evaluate": ("evaluation.csv",),
    "export": ("evaluation.csv",),
}
"""Settings that name a CSV that a job reads, by its kind."""

_ASKED_ONE_BY_ONE = 300
"""Up to so many names a store is asked for each; of more it lists all that it has, a thousand at a time."""


@dataclass(frozen=True)
class Item:
    """What goes for one setting.

    Attributes:
        setting: `training.train_csv`.
        source: the CSV or folder on this machine.
        value: what the setting is to be.
        files: how many files go there, the CSV itself counted; a file that several settings read counts in each.
        size_bytes: of all of them.
        present_files: those that are there already.
        present_bytes: of those.
    """

    setting: str
    source: str
    value: str
    files: int
    size_bytes: int
    present_files: int = 0
    present_bytes: int = 0


@dataclass(frozen=True)
class UploadPlan:
    """What `upload` will do.

    Attributes:
        spec: the job, as it reads from this machine.
        uri: the root of the uploads.
        items: what goes, by setting.
        files: how many files there are, each content once.
        size_bytes: of all of them.
        new_files: those that are not there yet.
        new_bytes: of those.
    """

    spec: JobSpec
    uri: str
    items: list[Item]
    files: int
    size_bytes: int
    new_files: int
    new_bytes: int
    objects: dict[str, LocalFile] = field(repr=False, default_factory=dict)
    """Files to send that are not there yet, by name below the root."""
    csvs: dict[str, str] = field(repr=False, default_factory=dict)
    """CSVs to write that are not there yet, by name below the root: the local CSV of each."""
    local: Files = field(repr=False, default_factory=Files)

    def words(self) -> str:
        """In one line."""
        there = self.files - self.new_files
        known = f", {there:,} are there already" if there else ""
        return f"{self.new_files:,} of {counted(self.files, 'file')}, {size_text(self.new_bytes)}{known}"

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        counts = {name: getattr(self, name) for name in ("uri", "files", "size_bytes", "new_files", "new_bytes")}
        return counts | {"settings": [asdict(item) for item in self.items]}


def uploads_uri(spec: JobSpec) -> str:
    """Where the uploads of a spec go: beside the roots of its runs."""
    outdir, uri = spec.training.outdir, spec.storage.uri
    if outdir and (is_uri(outdir) or not is_uri(uri)):
        uri = outdir.rstrip("/").rpartition("/")[0]
    return f"{uri.removeprefix('file://').rstrip('/')}/{UPLOADS}"


def plan_uploads(
    spec: JobSpec, uri: str, storage: Storage | None = None, progress: Progress | None = None
) -> UploadPlan:
    """Look at all that a spec reads from this machine, and hash it. Nothing is sent.

    Args:
        spec: the job, checked, its paths absolute.
        uri: the root of the uploads, as `uploads_uri` gives it.
        storage: the same root, asked what is there already; None: nothing is asked, and all counts as new.
        progress: takes (bytes hashed, bytes in all).

    Raises:
        ManifestError, InputError: something cannot be sent; all faults at once.
        StorageError: the store refuses, or fails for too long.
    """
    files = Files()
    csvs = {name: value for name in CSV_SETTINGS[spec.kind] if (value := _value(spec, name)) and not is_uri(value)}
    folders, faults = _folders(spec)
    for source in dict.fromkeys(csvs.values()):
        faults += _csv_faults(source, files, reject=spec.data.bad_rows == "reject")
    files.look(str(path) for found in folders.values() for path in found.files.values())
    for setting, found in folders.items():
        for name, path in found.files.items():
            if problem := files.problem(str(path)):
                faults.append(Fault(setting, f"lacks {name} ({problem})", str(found.path)))
    if not faults:
        faults += files.hash(progress)
    _raise(faults)
    plan = _Planned(uri, files)
    for setting, source in csvs.items():
        plan.add_csv(setting, source)
    for setting, found in folders.items():
        plan.add_folder(setting, found)
    _raise(plan.faults)
    return plan.finish(spec, storage)


@dataclass(frozen=True)
class _Folder:
    """A folder that goes: its files by name below it, and where to."""

    path: Path
    files: dict[str, Path]
    place: str = MODELS


def _folders(spec: JobSpec) -> tuple[dict[str, _Folder], list[Fault]]:
    """The folders of models and datasets that a job reads, by setting."""
    found: dict[str, _Folder] = {}
    faults: list[Fault] = []

    def add(setting: str, name: str, files: Callable[[Path, str], dict[str, Path]], place: str = MODELS) -> None:
        try:
            found[setting] = _Folder(Path(name).absolute(), files(Path(name).absolute(), setting), place)
        except InputError as error:
            faults.extend(error.faults)

    if trains(spec):
        if is_local(spec.training.base_model):
            add("training.base_model", spec.training.base_model, checkpoint_files)
        if spec.data.dataset and is_local(spec.data.dataset):
            add("data.dataset", spec.data.dataset, dataset_files, DATASETS)
        return found, faults
    setting = {"evaluate": "evaluation.model", "export": "export.source"}[spec.kind]
    model = _value(spec, setting)
    base = spec.export.base if spec.kind == "export" else None
    if model and is_local(model):
        add(setting, model, model_files)
        named = base_of(Path(model)) if base is None else None
        # One that is not here may be where the job runs: the job tells.
        if named and is_local(named) and look.is_dir(named):
            if spec.kind == "export":
                base = named
            else:
                faults.append(_base_elsewhere(setting, Path(model), named))
        if spec.kind == "export" and spec.evaluation.csv is None and setting in found:
            if lends_rows(Path(model)):
                found[setting].files[VAL] = Path(model, VAL).absolute()
            else:
                text = (
                    "is missing, and the run's own held-out clips are files of one machine; give a CSV, which is sent"
                )
                faults.append(Fault("evaluation.csv", text))
    if base and is_local(base):
        add("export.base", base, checkpoint_files)
    return found, faults


def _base_elsewhere(setting: str, folder: Path, base: str) -> Fault:
    merged = folder / "merged"
    way_out = (
        f"score its merged model, {merged}" if merged.is_dir() else "merge it (whisper-jobs export), and score that"
    )
    return Fault(setting, f"is an adapter on {base}, a folder of this machine; {way_out}", str(folder))


def _csv_faults(source: str, files: Files, *, reject: bool) -> list[Fault]:
    """What is wrong with a CSV and its rows, SHOWN_FAULTS of them at most; rows that the job may leave out are left to
    it."""
    shown: list[Fault] = []
    count = 0
    try:
        for fault in row_faults(source, files):
            count += not reject
            if len(shown) < count <= SHOWN_FAULTS:
                shown.append(fault)
    except ManifestError as error:
        return [*shown, *error.faults]
    return [*shown, Fault("...", f"and {counted(count - len(shown), 'more row')}")] if count > len(shown) else shown


def _raise(faults: list[Fault]) -> None:
    if not faults:
        return
    rows = any(", line " in fault.where for fault in faults)
    if rows:
        text = "mend the rows, or have the job leave them out with --set data.bad_rows=reject; nothing was sent"
        faults = [*faults, Fault("rows cannot be sent", text)]
    raise ManifestError(faults) if rows else InputError(faults)


class _Planned:
    """A plan in the making: the objects of all settings, each content once.

    Args:
        uri: the root of the uploads.
        files: all of the local files, hashed.
    """

    def __init__(self, uri: str, files: Files) -> None:
        self._uri, self._files = uri, files
        self._objects: dict[str, LocalFile] = {}
        self._csvs: dict[str, tuple[str, int]] = {}
        self._names: dict[str, set[str]] = {}
        self._sources: dict[str, tuple[str, str]] = {}
        self.faults: list[Fault] = []

    def add_csv(self, setting: str, source: str) -> None:
        """A CSV with its clips."""
        names = self._names[setting] = set()
        for clip in clips_of(source, self._files):
            names.add(name := clip_name(clip))
            self._objects.setdefault(name, clip)
        digest, size = hash_rewritten(source, self._files)
        name = f"{CSVS}/{digest}.csv"
        train, trained = self._sources.get("training.train_csv", ("", ""))
        if name == trained and source != train:
            text = f"holds the same clips and texts as {train}, the training set; give clips that are held out"
            self.faults.append(Fault(setting, text, source))
        self._csvs[name] = source, size
        names.add(name)
        self._sources[setting] = source, name

    def add_folder(self, setting: str, folder: _Folder) -> None:
        """A model's or a dataset's folder. Its name stays: jobs and cards are named by it."""
        files = {name: self._files[str(path)] for name, path in folder.files.items()}
        listing = "".join(f"{name}\0{file.sha256}\n" for name, file in sorted(files.items()))
        place = f"{folder.place}/{hashlib.sha256(listing.encode()).hexdigest()[:32]}/{folder.path.name}"
        self._objects.update({f"{place}/{name}": file for name, file in files.items()})
        self._names[setting] = {f"{place}/{name}" for name in files}
        self._sources[setting] = str(folder.path), place

    def finish(self, spec: JobSpec, storage: Storage | None) -> UploadPlan:
        """The plan, with what is there already."""
        sizes = {name: file.size for name, file in self._objects.items()}
        sizes |= {name: size for name, (_, size) in self._csvs.items()}
        present = _present(storage, sizes) if storage else set()
        missing = sizes.keys() - present
        return UploadPlan(
            spec=spec,
            uri=self._uri,
            items=[self._item(setting, sizes, present) for setting in self._sources],
            files=len(sizes),
            size_bytes=sum(sizes.values()),
            new_files=len(missing),
            new_bytes=sum(sizes[name] for name in missing),
            objects={name: file for name, file in self._objects.items() if name in missing},
            csvs={name: source for name, (source, _) in self._csvs.items() if name in missing},
            local=self._files,
        )

    def _item(self, setting: str, sizes: dict[str, int], present: set[str]) -> Item:
        source, name = self._sources[setting]
        names = self._names[setting]
        return Item(
            setting=setting,
            source=source,
            value=f"{self._uri}/{name}",
            files=len(names),
            size_bytes=sum(sizes[name] for name in names),
            present_files=len(names & present),
            present_bytes=sum(sizes[name] for name in names & present),
        )


def _present(storage: Storage, sizes: dict[str, int]) -> set[str]:
    """The names that are there already. A name says what the content is, and none appears before it is whole."""
    if storage.is_local:
        places = {name: storage.local(name) for name in sizes}
        return {name for name, place in places.items() if place.is_file() and place.stat().st_size == sizes[name]}
    objects = storage.objects()
    if len(sizes) <= _ASKED_ONE_BY_ONE:
        found = dict(zip(sizes, in_parallel(objects.look, list(sizes)), strict=True))
        return {name for name, there in found.items() if there and there.size == sizes[name]}
    return {name for name, there in objects.listed().items() if sizes.get(name) == there.size}


def _value(spec: JobSpec, setting: str) -> str | None:
    section, name = setting.split(".")
    value: str | None = getattr(getattr(spec, section), name)
    return value
