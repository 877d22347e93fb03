"""Which files of a folder are sent: of a checkpoint, an adapter or a run those that a job reads, of a dataset all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from service.artifacts import ADAPTER, DATA, MANIFEST, SPEC
from service.errors import Fault, InputError
from service.spec import look
from service.spec.check_files import ADAPTER_CONFIG
from service.spec.paths import is_stored
from service.spec.whisper_dims import CONFIG, is_folder

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weights of a checkpoint, in the order in which a job looks for them."""

_BESIDE = (".json", ".txt", ".model", ".md", ".jinja")
"""What is read beside the weights: configurations, vocabularies, the card. No optimizer's state, no pickle."""

VAL = f"{DATA}/val.arrow"


def checkpoint_files(folder: Path, setting: str) -> dict[str, Path]:
    """The files of a checkpoint.

    Raises:
        InputError: it is none, or not whole.
    """
    if not look.is_file(folder / CONFIG):
        raise InputError([Fault(setting, f"holds no {CONFIG}; give a folder with a checkpoint", str(folder))])
    weights = next((name for name in WEIGHTS if look.is_file(folder / name)), None)
    if weights is None:
        raise InputError([Fault(setting, f"holds no weights ({WEIGHTS[0]}); save the model there", str(folder))])
    names = {path.name for path in folder.iterdir() if path.suffix in _BESIDE and look.is_file(path)} - set(WEIGHTS)
    names |= {weights}
    if weights.endswith(".index.json"):
        try:
            names |= set(map(str, json.loads((folder / weights).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError([Fault(setting, f"has a {weights} that cannot be read ({error})", str(folder))]) from error
    return {name: folder / name for name in sorted(names)}


def adapter_files(folder: Path) -> dict[str, Path]:
    """The files of a PEFT adapter."""
    found = [path for path in folder.glob("adapter_*") if path.suffix in (".json", ".safetensors", ".bin")]
    return {path.name: path for path in sorted(found) if look.is_file(path)}


def model_files(folder: Path, setting: str) -> dict[str, Path]:
    """The files of what may be a checkpoint, an adapter or the root of a run.

    Raises:
        InputError: it is none of the three.
    """
    if look.is_file(folder / CONFIG):
        return checkpoint_files(folder, setting)
    if look.is_file(folder / ADAPTER_CONFIG):
        return adapter_files(folder)
    if look.is_file(folder / ADAPTER / ADAPTER_CONFIG) and look.is_file(folder / SPEC):
        about = {name: folder / name for name in (SPEC, MANIFEST) if look.is_file(folder / name)}
        return about | {f"{ADAPTER}/{name}": path for name, path in adapter_files(folder / ADAPTER).items()}
    kinds = f"a checkpoint ({CONFIG}), a PEFT adapter ({ADAPTER_CONFIG}) or the root of a finished run ({ADAPTER}/)"
    raise InputError([Fault(setting, f"is not {kinds}", str(folder))])


def dataset_files(folder: Path, setting: str) -> dict[str, Path]:
    """All files of a dataset, hidden ones left out.

    Raises:
        InputError: it is no folder.
    """
    if not look.is_dir(folder):
        raise InputError([Fault(setting, "is no folder; give a hub id, or a folder", str(folder))])
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if look.is_file(path)}
    return {
        name.as_posix(): path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)
    }


def base_of(folder: Path) -> str | None:
    """The base of an adapter, or of a run's, as far as it names one; None of a checkpoint too."""
    if look.is_file(folder / CONFIG):
        return None
    record = (_json(folder / MANIFEST).get("base") or {}).get("name")
    inside = folder / ADAPTER if look.is_file(folder / ADAPTER / ADAPTER_CONFIG) else folder
    named = record or _json(inside / ADAPTER_CONFIG).get("base_model_name_or_path")
    return str(named) if named else None


def is_local(name: str | None) -> bool:
    """Whether a model's name means a folder of this machine."""
    return bool(name) and not is_stored(str(name)) and is_folder(str(name))


def lends_rows(run: Path) -> bool:
    """Whether the held-out clips of a run can be heard elsewhere: they lay in storage when it was made."""
    source = ((_json(run / MANIFEST).get("data") or {}).get("val") or {}).get("source", "")
    return is_stored(str(source)) and look.is_file(run / VAL)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
