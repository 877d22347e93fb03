"""Objects through any fsspec file system that is not S3: Google Cloud Storage by gcsfs, memory in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from service.storage.objects import Found
from service.storage.retry import Caller
from service.storage.transfer import in_parallel


class GenericObjects:
    """See Objects. No hash is written down with an object here, and an upload that is cut off begins anew.

    Args:
        fs: the fsspec file system.
        root: the root's path in it.
        call: makes calls until they succeed.
    """

    def __init__(self, fs: Any, root: str, call: Caller) -> None:
        self._fs, self._root, self._call = fs, root, call

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _found(self, info: dict[str, Any]) -> Found:
        mark = next((info[key] for key in ("etag", "ETag", "generation", "created") if info.get(key)), "")
        # Of one and the same time, a list may have the text and a look the value.
        return Found(int(info["size"]), str(mark.timestamp()) if isinstance(mark, datetime) else str(mark))

    def listed(self, below: str = "") -> dict[str, Found]:
        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return dict(self._fs.find(self._path(below), detail=True))

        try:
            found = self._call("ListObjects", find)
        except FileNotFoundError:
            return {}
        names = {path[len(self._root) :].lstrip("/"): info for path, info in found.items()}
        # `find` of an object finds that object; only what lies below it is asked for.
        return {name: self._found(names[name]) for name in sorted(names) if name != below}

    def folders(self, below: str) -> list[str]:
        names = (name.removeprefix(f"{below}/" if below else "") for name in self.listed(below))
        return sorted({name.split("/")[0] for name in names if "/" in name})

    def look(self, name: str) -> Found | None:
        def info() -> dict[str, Any]:
            self._fs.invalidate_cache()
            return dict(self._fs.info(self._path(name)))

        try:
            found = self._call("GetObject", info)
        except FileNotFoundError:
            return None
        return self._found(found) if found["type"] == "file" else None

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        if etag is not None:
            present = self.look(name)
            if present is not None and present.etag != etag:
                raise FileExistsError(name)
        end = None if length is None else start + length
        content: bytes = self._call("GetObject", lambda: self._fs.cat_file(self._path(name), start=start, end=end))
        return content

    def put(self, name: str, content: bytes, sha256: str, *, only_new: bool = False, instead_of: str = "") -> str:
        if instead_of:
            # No call of fsspec's compares and writes at once.
            present = self.look(name)
            if present is None or present.etag != instead_of:
                raise FileExistsError(name)
        mode = {"mode": "create"} if only_new else {}
        try:
            self._call("PutObject", lambda: self._fs.pipe_file(self._path(name), content, **mode))
        except FileExistsError:
            # The answer to a call of ours that did succeed may have been lost on its way.
            if self.read(name) != content:
                raise
        present = self.look(name)
        return present.etag if present else ""

    def upload(self, name: str, path: Path, sha256: str, advance: Callable[[int], None]) -> None:
        self._call("PutObject", lambda: self._fs.put_file(str(path), self._path(name)))
        advance(path.stat().st_size)

    def remove(self, names: Iterable[str]) -> None:
        def remove(name: str) -> None:
            try:
                self._call("DeleteObject", lambda: self._fs.rm_file(self._path(name)))
            except FileNotFoundError:
                return

        in_parallel(remove, list(names))

    def abandon(self, below: str = "") -> None:
        """Nothing to do: fsspec's uploads are not gone on with, and the store itself deletes what they leave."""
