"""Reading a spec file: YAML or JSON in, plain values and the line of every key out. PyYAML is imported on use."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from service.errors import Fault, SpecError
from service.spec import look
from service.spec.utf8 import WAY_OUT

KeyPath = tuple[str, ...]

MAX_BYTES = 4 << 20
MAX_VALUES = 100_000
"""A spec is written by hand; more than this is another file, or a YAML bomb."""


@dataclass
class Document:
    """A spec file's content.

    Attributes:
        name: the file as the user wrote it; empty when there is none.
        lines: line of each key, by its path.
    """

    name: str = ""
    content: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """What an error calls that place: `train.yaml:3: training.lora_r`."""
        written = ".".join(path)
        if not self.name:
            return written
        line = self.lines.get(path)
        return f"{self.name}:{line}: {written}" if line else f"{self.name}: {written}" if written else self.name


def read_document(source: Path) -> Document:
    """Read a spec file.

    Raises:
        SpecError: it cannot be read, is no YAML or JSON, repeats a key, or holds no mapping.
    """
    name = str(source)
    text = _text(source, name)
    is_json = source.suffix.lower() == ".json"
    if is_json or (source.suffix.lower() not in {".yaml", ".yml"} and text.lstrip().startswith("{")):
        content = _json(text, name)
    else:
        content = _yaml(text, name)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise _fault(name, f"holds {_kind(content)} at its top; a spec is a mapping of settings such as `lora_r: 16`")
    return Document(name, content, _key_lines(text))


def _text(source: Path, name: str) -> str:
    try:
        if look.is_dir(source):
            raise _fault(name, "is a folder; give a YAML or JSON file")
        with open(source, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        if "://" in name or ":/" in name:  # pathlib has made one slash of two
            raise _fault(name, "is a URI; a spec is read from this machine: give a YAML or JSON file") from None
        raise _fault(name, "there is no such file; `whisper-jobs explain` lists what a spec may hold") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise _fault(name, f"cannot be read ({str(reason).lower()}); give a YAML or JSON file") from None
    if len(raw) > MAX_BYTES:
        raise _fault(name, f"is larger than {MAX_BYTES >> 20} MiB, so it is no spec; give a YAML or JSON file")
    if b"\0" in raw and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _fault(name, "is a binary file; give a YAML or JSON file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _fault(f"{name}:{line}", f"is not UTF-8; {WAY_OUT}") from None


class _RepeatedKeyError(Exception):
    """A key stands twice in one mapping: the second would silently win."""


def _json(text: str, name: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
        return content

    if not text.strip():
        return None
    try:
        return _plain(json.loads(text, object_pairs_hook=mapping), name)
    except _RepeatedKeyError as error:
        raise _repeated(str(error), name, _occurrence(text, str(error), 2)) from None
    except json.JSONDecodeError as error:
        hint = ""
        rest = text[error.pos :].lstrip()
        if rest.startswith(("//", "#", "/*")):
            hint = "; JSON has no comments: take them out, or write YAML in a .yaml file"
        elif rest.startswith(("}", "]")):
            hint = "; is there a comma too many before it?"
        elif not text.lstrip().startswith(("{", "[")):
            hint = "; if it is YAML, name the file .yaml"
        raise _fault(f"{name}:{error.lineno}:{error.colno}", f"is not valid JSON: {_lower(error.msg)}{hint}") from None
    except (ValueError, RecursionError):
        raise _fault(name, "is no JSON that can be read: a number or its nesting is out of all bounds") from None


def _yaml(text: str, name: str) -> Any:
    import yaml

    try:
        return _plain(yaml.load(text, Loader=_loader()), name)
    except _RepeatedKeyError as error:
        key, line = error.args
        raise _repeated(key, name, line) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        hint = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        raise _fault(place, f"is not valid YAML: {_lower(error.problem or error.context or 'a fault')}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _fault(f"{name}:{line}", "is not valid YAML: it holds a control character; take it out") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise _fault(name, "is no YAML that can be read: a value or its nesting is out of all bounds") from None


def read_flow(text: str) -> Any:
    """The value of a list or object in YAML's flow style, which a shell has passed on as text: `[hf, ggml]`.

    Raises:
        ValueError: it is none.
    """
    try:
        return _yaml(text, "")
    except SpecError as error:
        raise ValueError(str(error)) from None


@cache
def _loader() -> Any:
    """A SafeLoader by YAML 1.2's rules: `no` is Norwegian and not false, `5e-5` a number, `010` ten; no dates."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class-level table

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
                key = key_node.value if isinstance(key_node.value, str) else None
                if key is not None and key != "<<" and key in seen:
                    raise _RepeatedKeyError(key, key_node.start_mark.line + 1)
                seen.add(key)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

        def construct_yaml_int(self, node: Any) -> int:
            return int(node.value, 0) if node.value.startswith(("0o", "0x")) else int(node.value)

    def resolve(tag: str, pattern: str, first: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))

    resolve("null", r"^(?:~|null|Null|NULL|)$", "~nN")
    Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile("^$")))
    resolve("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
    resolve("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789")
    resolve("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789")
    resolve("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+.")
    resolve("merge", r"^<<$", "<")
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    return Loader


def _plain(value: Any, name: str) -> Any:
    """A copy that holds JSON's types only: no shared or endless structures, no dates, no numbers as keys."""
    count = 0

    def copy(value: Any, path: KeyPath) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES or len(path) > 50:
            raise _fault(name, "holds far more than a spec does; give a YAML or JSON file with settings")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    place = ".".join((*path, str(key)))
                    raise _fault(f"{name}: {place}", f"has {_kind(key)} as a key; keys are names: put it in quotes")
                _check_text(key, (*path, key), name)
            return {key: copy(below, (*path, key)) for key, below in value.items()}
        if isinstance(value, list):
            return [copy(below, (*path, str(index))) for index, below in enumerate(value)]
        if isinstance(value, str):
            _check_text(value, path, name)
        elif not (value is None or isinstance(value, bool | int | float)):
            raise _fault(f"{name}: {'.'.join(path)}", "is of a type that JSON does not have; write it as plain text")
        return value

    return copy(value, ())


def _check_text(text: str, path: KeyPath, name: str) -> None:
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        place = ascii(".".join(path)).strip("'")
        raise _fault(f"{name}: {place}", "holds a character that no text may hold (NUL or half a surrogate pair)")


def _key_lines(text: str) -> dict[KeyPath, int]:
    """The line of every key. JSON is read as the YAML that it nearly always is; where it is not, there are no lines."""
    import yaml

    lines: dict[KeyPath, int] = {}

    def walk(node: Any, path: KeyPath) -> None:
        if not isinstance(node, yaml.MappingNode) or len(path) > 3:
            return
        for key, below in node.value:
            if isinstance(key.value, str):
                lines[(*path, key.value)] = key.start_mark.line + 1
                walk(below, (*path, key.value))

    try:
        walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return lines


def _repeated(key: str, name: str, line: int | None) -> SpecError:
    return _fault(f"{name}:{line}: {key}" if line else f"{name}: {key}", "stands twice in one mapping; keep one")


def _occurrence(text: str, key: str, number: int) -> int | None:
    found = list(re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text))
    return text.count("\n", 0, found[number - 1].start()) + 1 if len(found) >= number else None


def _kind(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "plain text", bool: "true or false", int: "a number"}
    return kinds.get(type(value), "a number" if isinstance(value, float) else "null" if value is None else "a value")


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _fault(where: str, message: str) -> SpecError:
    return SpecError([Fault(where, message)])
