"""From a file and flags to one checked `JobSpec`, or to one error that holds every fault.

Precedence: flag, file, `base`, default. A flat file (the old toolkit's form: settings of `training` at top level and no
section) is a train job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import Fault, SpecError
from service.spec import checks, look, paths, rewrites, words
from service.spec.base import parse_json_text
from service.spec.check_space import SPACE, dimension_findings, sound_part
from service.spec.flags import Override, Overrides, has_value
from service.spec.job import JobSpec
from service.spec.paths import MODELS, PATHS, is_uri
from service.spec.read import Document, KeyPath, read_document
from service.spec.settings import FLAT, find, nearest, sections, settings, suggest, suggest_section

__all__ = ["LoadedSpec", "Override", "Overrides", "load_spec"]

KINDS = tuple(checks.CHECKS)

LARGEST = 10**15
"""No setting has a use for a larger whole number; arithmetic beyond it stops being exact."""


@dataclass(frozen=True)
class LoadedSpec:
    """A checked spec and what its user should know.

    Attributes:
        spec: complete: every default written out, every path absolute.
        rewritten: what was read as something else (`o_proj` as `out_proj`); saved and loaded again, nothing is left.
        advice: what is allowed but probably not meant.
    """

    spec: JobSpec
    rewritten: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """All of it."""
        return self.rewritten + self.advice


def load_spec(
    source: Path | None,
    overrides: Overrides = (),
    *,
    base: Mapping[str, Any] | None = None,
    check_files: bool = True,
) -> LoadedSpec:
    """Read, merge, validate and check a job spec.

    Args:
        source: YAML or JSON file; None for flags alone.
        overrides: values that win over the file's, such as `flags.overrides_from` gives.
        base: sections or settings that only defaults yield to, such as `{"kind": "evaluate"}`.
        check_files: whether the CSVs and folders that it names must be there.

    Raises:
        SpecError: with every fault there is.
    """
    draft = _Draft(read_document(source) if source is not None else Document())
    draft.take(dict(base or {}))
    draft.read()
    for override in overrides:
        draft.override(override)
    spec = draft.validate()
    spec, rewritten = rewrites.rewrite(spec)
    spec = paths.absolute(spec)

    advice = []
    found = [
        finding
        for finding in checks.findings(spec, check_files=check_files)
        if not any(draft.is_faulty(path) for path in finding.settings)
    ]
    if draft.is_faulty(SPACE):
        found += dimension_findings(spec)
    for finding in found:
        fault = finding.fault(draft.where(finding.settings[0]))
        if note := draft.beside(finding.settings[0]):
            fault = replace(fault, message=f"{fault.message}; {note}")
        if finding.fatal:
            draft.faults.append(fault)
        else:
            advice.append(str(fault))
    if draft.faults:
        raise SpecError(draft.faults)
    return LoadedSpec(spec, [f"{draft.where(path)}: {text}" for path, text in rewritten], advice)


class _Draft:
    """A spec in the making: its values so far, where each came from, and the faults found."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.tree: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.faults: list[Fault] = []
        self._faulty: set[str] = set()
        self._faulty_inside: dict[str, set[str]] = {}  # keys of settings that are objects
        self._meant: set[str] = set()  # by an unknown key: whether it is missing cannot be told
        top = set(document.content)
        self.is_flat = not top & set(sections()) and any(f"{FLAT}.{key}" in settings() for key in top)

    def where(self, path: str) -> str:
        """What an error calls a setting: its flag, its place in the file, or how it could be given."""
        if path in self.sources:
            return self.sources[path]
        if self.document.name:
            return self.document.where(self._place(path))
        found = find(path)
        return found[0].flag or f"--set {path}" if found else path

    def beside(self, path: str) -> str:
        """A word on a path of the file that does not exist from the current folder on, but beside the file."""
        value = self._get(path)
        of_file = self.sources.get(path) == self.document.where(self._place(path)) if self.document.name else False
        if path not in PATHS + MODELS or not of_file or not isinstance(value, str):
            return ""
        there = Path(self.document.name).parent / value
        if is_uri(value) or look.exists(look.absolute(value)) or not look.exists(there):
            return ""
        return f"{there} is there, but relative paths start at the current folder, not at the spec's"

    def _place(self, path: str) -> KeyPath:
        """Where a setting stands in the file."""
        written = path.removeprefix(f"{FLAT}.") if self.is_flat else path
        return tuple(written.split(".", 1))

    def is_faulty(self, path: str) -> bool:
        """Whether a setting, or the section that it belongs to, has a fault already."""
        doubtful = self._faulty | self._meant
        if path == "kind" and self._has("kind"):  # it was told what is meant
            return False
        return path in doubtful or path.split(".", 1)[0] in doubtful

    def fault(self, path: str, fault: Fault) -> None:
        """Note a fault of a setting."""
        self.faults.append(fault)
        self._faulty.add(path)

    def take(self, content: Mapping[str, Any]) -> None:
        """Lay values that are known to be well-formed under all others."""
        for name, value in content.items():
            self.tree[name] = dict(value) if isinstance(value, Mapping) else value

    def read(self) -> None:
        """Take the file's values, each under its section."""
        for key, value in self.document.content.items():
            if key == "$schema":  # an editor's note
                continue
            if self.is_flat and f"{FLAT}.{key}" in settings():
                self._set((FLAT, key), value, self.document.where((key,)))
            elif key in sections():
                self._read_section(key, value)
            elif key in settings():
                self._set((key,), value, self.document.where((key,)))
            else:
                self._unknown(self.document.where((key,)), key, "")

    def _read_section(self, section: str, value: Any) -> None:
        if value is None:  # a section whose settings are all commented out
            return
        if not isinstance(value, dict):
            example = next(path for path in settings() if path.startswith(f"{section}."))
            where = self.document.where((section,))
            self.fault(section, Fault(where, f"is not a section; give settings below it, such as {example}", value))
            return
        for name, below in value.items():
            where = self.document.where((section, name))
            if f"{section}.{name}" in settings():
                self._set((section, name), below, where)
            else:
                self._unknown(where, name, section)

    def override(self, override: Override) -> None:
        """Take a flag's value in place of the file's."""
        path, value, label = override.path, override.value, override.label
        if path not in settings():
            self._unknown_override(path, label)
        elif not has_value(override):
            self.fault(path, Fault(label, f"has no value; write --set {path}=VALUE"))
        elif self._is_contradiction(path, value):
            before = self.sources[path]
            text = f"contradicts {before}" if before != label else f"is given as {self._get(path)!r} too"
            self.fault(path, Fault(label, f"{text}; give one of the two", value))
        else:
            self._set(tuple(path.split(".", 1)), value, label)

    def _unknown_override(self, path: str, label: str) -> None:
        section, _, name = path.rpartition(".")
        parent = next((known for known in settings() if path.startswith(f"{known}.")), None)
        found = [] if section else find(name)
        if len(found) > 1 and path not in sections():
            paths_of = " or ".join(setting.path for setting in found)
            self._meant.update(setting.path for setting in found)
            self.faults.append(Fault(label, f"is a setting of several sections; write {paths_of}"))
        elif path in sections():
            example = next(known for known in settings() if known.startswith(f"{path}."))
            self.fault(path, Fault(label, f"is a section; set one of its settings, such as {example}"))
        elif parent:
            self.fault(parent, Fault(label, f"is below a setting; set {parent} as a whole, to a JSON object"))
        else:
            self._unknown(label, name, section, in_file=False)

    def _unknown(self, where: str, name: str, section: str, *, in_file: bool = True) -> None:
        """Note a key that is no setting, with the setting or section that is most likely meant."""
        close = suggest(name, section)
        here = section or (FLAT if self.is_flat and in_file else "")
        if not section and (known := suggest_section(name, close)):
            self.faults.append(Fault(where, f"is no section; did you mean `{known}`?"))
            self._meant.add(known)
            return
        if not close:
            self.faults.append(Fault(where, "is no setting; `whisper-jobs explain` lists all"))
            return
        best = close[0]
        self._meant.update(setting.path for setting in close)
        if best.name == name and in_file and best.section:
            self.faults.append(Fault(where, f"belongs under `{best.section}:`; move it there"))
            return
        written = best.name if best.section == here and in_file else best.path
        self.faults.append(Fault(where, f"is no setting; did you mean `{written}`?"))

    def _is_contradiction(self, path: str, value: Any) -> bool:
        """Whether flags, or one flag that stands twice, give a setting two values."""
        return self.sources.get(path, "").startswith("--") and self._get(path) != value

    def _has(self, path: str) -> bool:
        return self._get(path) is not None

    def _get(self, path: str) -> Any:
        section, _, name = path.rpartition(".")
        branch = self.tree.get(section, {}) if section else self.tree
        return branch.get(name)

    def _set(self, path: KeyPath, value: Any, source: str) -> None:
        branch = self.tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
        self.sources[".".join(path)] = source

    def _drop(self, path: str) -> None:
        section, _, name = path.rpartition(".")
        branch = self.tree.get(section, {}) if section else self.tree
        branch.pop(name, None)

    def validate(self) -> JobSpec:
        """Validate what is there; settings with faults are noted and left out, so that the rest can be checked."""
        for path, value in list(self._values()):
            if _is_out_of_bounds(value):
                self.fault(path, Fault(self.where(path), "is out of all bounds; give a smaller number", value))
                self._drop(path)
        try:
            return JobSpec.model_validate(self.tree)
        except ValidationError as error:
            for entry in error.errors(include_url=False):
                self._note(entry)
        for path in self._faulty:
            self._mend(path)
        return JobSpec.model_validate(self.tree)

    def _mend(self, path: str) -> None:
        """Take a setting with a fault out, but for what can be told of it all the same."""
        value = self._get(path)
        self._drop(path)
        if path == "kind" and isinstance(value, str) and (meant := nearest(value.lower(), KINDS)):
            self.tree["kind"] = meant[0]
        if path == SPACE and (faulty := self._faulty_inside.get(path)):
            self.tree["search"]["space"] = sound_part(parse_json_text(value), faulty)

    def _note(self, entry: Mapping[str, Any]) -> None:
        location = [str(part) for part in entry["loc"]]
        depth = 2 if location[0] in sections() else 1
        path, inside = ".".join(location[:depth]), location[depth:]
        if path in self._faulty and not inside:
            return
        where = self.where(path) + "".join(f"[{part}]" for part in inside)
        if inside:
            self._faulty_inside.setdefault(path, set()).add(inside[0])
        if entry["type"] in ("extra_forbidden", "missing"):  # inside a setting that is an object
            self.fault(path, Fault(where, words.message(entry)))
            return
        self.fault(path, Fault(where, words.message(entry), entry["input"]))

    def _values(self) -> Iterator[tuple[str, Any]]:
        for name, value in self.tree.items():
            if name in sections():
                yield from ((f"{name}.{below}", deep) for below, deep in value.items())
            else:
                yield name, value


def _is_out_of_bounds(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(_is_out_of_bounds(below) for below in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) > LARGEST
