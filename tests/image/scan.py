"""What may not be in an image: looked for in every layer of it, in its history and in its configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from engines import BASE, ROOT, Engine

_SECRET_FILES = re.compile(
    r"(^|/)(pip\.conf|\.netrc|\.pypirc|\.env|auth_token|id_(rsa|ed25519|ecdsa)|\.aws/credentials|run/secrets/.+)$"
)
_BUILD_TOOLS = re.compile(r"(^|/)(gcc|g\+\+|cc|make|ld|cmake|ninja|cargo|rustc|git|curl|wget)$")
_CACHES = re.compile(r"(^|/)(root/\.cache/.+|home/[^/]+/\.cache/.+|var/lib/apt/lists/.+|var/cache/apt/.+\.(deb|bin))$")


@dataclass(frozen=True)
class Found:
    """Something that may not be there."""

    kind: str
    where: str
    layer: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer as far as it is looked at."""

    name: str
    files: int
    size_bytes: int


def scan(engine: Engine, image: str, secrets: tuple[str, ...]) -> tuple[list[Found], list[Layer]]:
    """Look through what `save` gives: every layer, also what a later one has deleted or covered.

    Args:
        secrets: texts that must not be found anywhere, in names or contents.

    Of the base's own layers only the secrets count.
    """
    of_base = len(engine.inspect(BASE)["RootFS"]["Layers"])
    order: list[str] = []
    wanted = [secret.encode() for secret in secrets]
    found: list[Found] = []
    layers: list[Layer] = []
    options = ("--format=docker-archive",) if engine.name == "podman" else ()
    saved = subprocess.Popen(
        [engine.name, "save", *options, image],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **engine.variables},
        cwd=ROOT,
    )
    assert saved.stdout
    with tarfile.open(fileobj=saved.stdout, mode="r|") as archive:
        for member in archive:
            if not member.isfile():
                continue
            inside = archive.extractfile(member)
            assert inside
            start = inside.read(512)
            if len(start) == 512 and start[257:262] == b"ustar":
                found += _in_layer(_Rewound(start, inside), member.name, wanted, layers)
            else:  # the configuration, with the history
                text = start + inside.read()
                if member.name == "manifest.json":
                    order = json.loads(text)[0]["Layers"]
                found += [Found("secret", member.name) for secret in wanted if secret in text]
    saved.stdout.close()
    assert saved.wait() == 0
    assert len(layers) >= len(order) > of_base, "not all layers were looked at"
    base = set(order[:of_base])
    found = [one for one in found if one.kind == "secret" or one.layer not in base]
    return found, layers


class _Rewound:
    """A file whose beginning has been read already."""

    def __init__(self, start: bytes, rest: IO[bytes]) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int = -1) -> bytes:
        if self._start:
            taken, self._start = self._start[:size], self._start[size:]
            return taken if len(taken) == size else taken + self._rest.read(size - len(taken))
        return bytes(self._rest.read(size))


def _in_layer(file: Any, layer: str, wanted: list[bytes], layers: list[Layer]) -> Iterator[Found]:
    files = size_bytes = 0
    with tarfile.open(fileobj=file, mode="r|") as content:
        for member in content:
            name, where = member.name.removeprefix("./"), member.name
            files += 1
            size_bytes += member.size
            yield from (Found(kind, where, layer) for kind in _of_member(member, name))
            if any(secret in where.encode() or secret in member.linkname.encode() for secret in wanted):
                yield Found("secret", where, layer)
            if member.isfile():
                inside = content.extractfile(member)
                assert inside
                if _holds(inside, wanted):
                    yield Found("secret", where, layer)
    layers.append(Layer(layer, files, size_bytes))


def _of_member(member: tarfile.TarInfo, name: str) -> Iterator[str]:
    if _SECRET_FILES.search(name) and member.size:
        yield "secret file"
    if member.isfile() and _CACHES.search(name):
        yield "cache"
    if member.isfile() and member.mode & 0o002:
        yield "world-writable"
    if member.isdir() and member.mode & 0o002 and name.rstrip("/") not in ("tmp", "var/tmp"):
        yield "world-writable"
    if member.isfile() and member.mode & 0o111 and _BUILD_TOOLS.search(name):
        yield "build tool"


def _holds(file: IO[bytes], wanted: list[bytes]) -> bool:
    """Whether one of some texts is in a file, read piece by piece."""
    overlap = max(map(len, wanted), default=1)
    before = b""
    while piece := file.read(1 << 22):
        text = before + piece
        if any(secret in text for secret in wanted):
            return True
        before = text[-overlap:]
    return False


def kinds(found: list[Found]) -> Mapping[str, list[str]]:
    """What was found, by kind."""
    by_kind: dict[str, list[str]] = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append(one.where)
    return by_kind
