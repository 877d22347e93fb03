"""Checks of the files and folders that a spec names. Only headers are read: rows and audio are checked by the job."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

from service.artifacts import ADAPTER, SPEC
from service.spec import look
from service.spec.csv_header import NO_ROW, header_problem
from service.spec.findings import Finding, Findings
from service.spec.job import JobSpec
from service.spec.paths import MODELS, STORES, is_uri
from service.spec.utf8 import WAY_OUT, first_line_not_utf8
from service.spec.whisper_dims import CONFIG, is_folder

ADAPTER_CONFIG = "adapter_config.json"

PARTS_OF_A_CHECKPOINT = {
    "weights": (
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ),
    "feature extractor": ("preprocessor_config.json", "processor_config.json"),
    "tokenizer": ("tokenizer.json", "vocab.json"),
}
"""What stands beside config.json: one file of each."""

AUDIO = {".aiff", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"}


def _train_csvs(spec: JobSpec) -> Findings:
    train, held_out = spec.training.train_csv, spec.training.val_csv
    yield from _csv("training.train_csv", train)
    yield from _csv("training.val_csv", held_out)
    if train and held_out and _same(train, held_out):
        yield Finding(
            ("training.val_csv", "training.train_csv"),
            "is the training set itself, on which every model looks good; give clips that are held out",
            held_out,
        )


def _guard_csv(spec: JobSpec) -> Findings:
    source, train = spec.guard.csv, spec.training.train_csv
    yield from _csv("guard.csv", source)
    if source and train and _same(source, train):
        text = "is the training set itself, on which no loss shows; give clips of what is not trained"
        yield Finding(("guard.csv", "training.train_csv"), text, source)


def _scored_csv(spec: JobSpec) -> Findings:
    yield from _csv("evaluation.csv", spec.evaluation.csv)


def _csv(setting: str, path: str | None) -> Findings:
    if path is None or is_uri(path):
        return
    if problem := csv_problem(Path(path)):
        yield Finding((setting,), problem, path)


def csv_problem(path: Path) -> str:
    """What keeps a CSV from being used, judged by its header and first row; empty where nothing does."""
    if look.is_dir(path):
        return "is a folder; `whisper-jobs manifest build` makes CSVs from a folder of audio"
    if path.suffix.lower() in AUDIO:
        return "is an audio file; give a CSV with the columns path and text"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            has_row = next(rows, None) is not None
    except FileNotFoundError:
        return "does not exist; give the path of a CSV, absolute or from the current folder on"
    except OSError as error:
        return f"cannot be read ({(error.strerror or str(error)).lower()}); give a CSV with the columns path and text"
    except UnicodeDecodeError:
        with open(path, "rb") as raw:
            return f"has a line {first_line_not_utf8(raw)} that is not UTF-8 text; {WAY_OUT}"
    except (csv.Error, ValueError):
        return "is not a CSV; give one with the columns path and text"
    return header_problem([column.strip().lower() for column in header]) or ("" if has_row else NO_ROW)


READ = ("training.train_csv", "training.val_csv", "guard.csv", "evaluation.csv", *MODELS)
"""Settings that name what a run reads."""


def _setting(spec: JobSpec, path: str) -> str | None:
    section, name = path.split(".")
    value: str | None = getattr(getattr(spec, section), name)
    return value


def _root(spec: JobSpec) -> Findings:
    """The run's root: a folder of its own, in which nothing lies that the run reads."""
    setting = "training.outdir" if spec.training.outdir else "storage.uri"
    value = spec.training.outdir or spec.storage.uri
    if is_uri(value) and not value.startswith("file://"):
        if setting == "training.outdir" and value.startswith(STORES) and "/" not in value.split("://", 1)[1].strip("/"):
            yield Finding((setting,), "is a whole bucket; give a folder in it, such as <bucket>/runs", value)
        for path in READ:
            source = _setting(spec, path)
            if source and f"{source.rstrip('/')}/".startswith(f"{value.rstrip('/')}/") and setting == "training.outdir":
                yield Finding((setting, path), f"holds what {path} names, which a run may overwrite", value)
        return
    folder = Path(value.removeprefix("file://"))
    blocked = next((place for place in (folder, *folder.parents) if look.exists(place)), folder)
    if look.is_file(blocked):
        message = "is a file; give a folder" if blocked == folder else f"lies below {blocked}, a file; give a folder"
        yield Finding((setting,), message, value)
    if setting != "training.outdir" or look.is_file(blocked):
        return
    for path in READ:
        source = _setting(spec, path)
        if not source or is_uri(source) or (path in MODELS and not is_folder(source)):
            continue
        if look.real(source).is_relative_to(look.real(folder)):
            what = path.removeprefix("training.")
            message = f"holds the {what}, which a run may overwrite; give a folder of its own"
            yield Finding((setting, path), message, value)
            return


def _base_folder(spec: JobSpec) -> Findings:
    """A local checkpoint has weights, a feature extractor and a tokenizer: the last two are often not saved with it."""
    name = spec.training.base_model
    if not is_folder(name) or not look.is_file(Path(name) / CONFIG):
        return
    for what, files in PARTS_OF_A_CHECKPOINT.items():
        if not any(look.is_file(Path(name) / file) for file in files):
            save = "save the model there" if what == "weights" else "save the base model's WhisperProcessor there"
            yield Finding(("training.base_model",), f"holds no {what} ({' or '.join(files[:2])}); {save}", name)
            return


def _scored_path(spec: JobSpec) -> Findings:
    model = spec.evaluation.model
    if model and is_folder(model) and not look.is_dir(model):
        state = "is a file" if look.exists(model) else "does not exist"
        yield Finding(("evaluation.model",), f"{state}; give a hub id, a folder or the root of a run", model)


def _exported_path(spec: JobSpec) -> Findings:
    source = spec.export.source
    if not source or is_uri(source) or not is_folder(source):
        return
    folder = Path(source)
    if not look.is_dir(folder):
        state = "is a file" if look.exists(source) else "does not exist"
        yield Finding(
            ("export.source",), f"{state}; give the root of a run, an adapter's folder or a checkpoint", source
        )
        return
    kinds = (CONFIG, ADAPTER_CONFIG, f"{ADAPTER}/{ADAPTER_CONFIG}")
    if not any(look.is_file(folder / name) for name in kinds):
        kinds_text = f"no run ({kinds[2]}), no adapter ({kinds[1]}) and no checkpoint ({kinds[0]})"
        yield Finding(("export.source",), f"is {kinds_text}; give one of them", source)
    elif spec.evaluation.csv is None and not look.is_file(folder / SPEC):
        text = "is missing: no export leaves without having been heard; give held-out clips (--csv)"
        yield Finding(("evaluation.csv", "export.source"), text)


def _same(one: str, other: str) -> bool:
    if is_uri(one) or is_uri(other):
        return one == other
    return look.real(one) == look.real(other)


FILE_CHECKS: dict[str, tuple[Callable[[JobSpec], Findings], ...]] = {
    "train": (_train_csvs, _guard_csv, _root, _base_folder),
    "search": (_train_csvs, _guard_csv, _root, _base_folder),
    "evaluate": (_scored_csv, _scored_path, _root),
    "export": (_scored_csv, _exported_path, _root),
}
"""The checks that look at files, by the kind of job."""
