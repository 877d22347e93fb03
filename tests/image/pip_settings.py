"""pip's configuration of this machine, in the form in which docker/build.sh takes it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

PLANTED = "planted-secret-of-the-build-7f3a"
"""Stands in pip's configuration and in the authority's file: nothing of it may be found in the image."""

_OF_THE_INDEX = ("index-url", "extra-index-url", "trusted-host", "timeout", "default-timeout", "retries", "proxy")


@dataclass
class PipSettings:
    """What a build needs to reach the packages that this machine reaches."""

    conf: Path
    ca: Path
    wheels: Path | None
    torch_index: str | None

    def arguments(self) -> list[str]:
        """The options of docker/build.sh."""
        found = [f"--pip-conf={self.conf}", f"--ca={self.ca}"]
        if self.wheels:
            found.append(f"--wheels={self.wheels}")
        if self.torch_index:
            found.append(f"--torch-index={self.torch_index}")
        return found


def of_this_machine(folder: Path) -> PipSettings:
    """Gather it from pip itself, whose variables, files and defaults are its own affair.

    A file that pip's configuration names does not exist in a build: the authority goes as a file, wheels as a folder,
    an index on this disk is left out. TORCH_INDEX names the index of torch, as for the Makefile.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    values: dict[str, str] = {}
    for line in listed.splitlines():  # files first, variables last, which win
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            values[key] = str(ast.literal_eval(value))
    kept = {}
    for key in _OF_THE_INDEX:
        if words := [word for word in values.get(key, "").split() if urlsplit(word).scheme != "file"]:
            kept["timeout" if key == "default-timeout" else key] = " ".join(words)
    conf, ca = folder / "pip.conf", folder / "ca.pem"
    conf.write_text(
        f"# {PLANTED}\n[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items()), encoding="utf-8"
    )
    authority = values.get("cert") or os.environ.get("SSL_CERT_FILE") or _usual_authorities()
    ca.write_text(f"{PLANTED}\n{Path(authority).read_text(encoding='utf-8')}", encoding="utf-8")
    return PipSettings(conf, ca, _wheels(values.get("find-links", ""), folder), os.environ.get("TORCH_INDEX") or None)


def _usual_authorities() -> str:
    import certifi

    return certifi.where()


def _wheels(find_links: str, folder: Path) -> Path | None:
    """The folders of wheels that pip looks into, as one."""
    folders = [Path(urlsplit(word).path) for word in find_links.split() if urlsplit(word).scheme in ("", "file")]
    folders = [one for one in folders if one.is_dir()]
    if len(folders) < 2:
        return folders[0] if folders else None
    together = folder / "wheels"
    together.mkdir()
    for wheel in (wheel for one in folders for wheel in one.glob("*.whl")):
        shutil.copy(wheel, together)
    return together
