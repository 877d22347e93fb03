"""The working directory of a job: this very code and the spec, so that the cluster runs what its user has here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from service.client.api import Api
from service.requirements import DISTRIBUTION

SPEC_FILE = "spec.json"
PACKAGES = ("service", "jobs")
SUFFIXES = (".py", ".json", ".css", ".html", ".js")
LEFT_OUT = ("jobs/demo/", "service/client/", "service/cli/", "service/kubernetes/")
"""What no job on a cluster needs: speech synthesis and a small Whisper, and this client."""

_SAME_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Package:
    """A working directory as one file.

    Attributes:
        name: by its content, so that the same one is brought once.
        content: a ZIP.
    """

    name: str
    content: bytes

    @property
    def uri(self) -> str:
        """For a runtime_env."""
        return f"gcs://{self.name}"


def make_package(spec: str | None) -> Package:
    """The code that is installed here, its metadata and, if there is one, a spec as JSON."""
    files: dict[str, bytes] = {} if spec is None else {SPEC_FILE: spec.encode()}
    for package in PACKAGES:
        found = find_spec(package)
        for place in (found.submodule_search_locations or []) if found else []:
            for path in sorted(Path(place).rglob("*")):
                name = f"{package}/{path.relative_to(place).as_posix()}"
                if path.is_file() and path.suffix in SUFFIXES and not name.startswith(LEFT_OUT):
                    files[name] = path.read_bytes()
    version = importlib.metadata.version(DISTRIBUTION)
    described = importlib.metadata.distribution(DISTRIBUTION).read_text("METADATA") or ""
    # With it the cluster knows the version that it runs, and which packages it wants.
    files[f"{DISTRIBUTION.replace('-', '_')}-{version}.dist-info/METADATA"] = described.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            info = zipfile.ZipInfo(name, _SAME_TIME)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, content)
    content = buffer.getvalue()
    return Package(f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip", content)


def bring(api: Api, package: Package) -> None:
    """Have the cluster hold a package."""
    if not api.has_package(package.name):
        api.put_package(package.name, package.content)
