"""Looking at paths that come from users: where a path cannot even be asked for, the answer is no."""

from __future__ import annotations

import os
from pathlib import Path

# pathlib raises on a name that is too long or holds NUL; os.path says that there is no such file.


def exists(path: str | Path) -> bool:
    """Whether there is a file or folder of that name."""
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: str | Path) -> bool:
    """Whether there is a file of that name."""
    return os.path.isfile(path)  # noqa: PTH113


def is_dir(path: str | Path) -> bool:
    """Whether there is a folder of that name."""
    return os.path.isdir(path)  # noqa: PTH112


def real(path: str | Path) -> Path:
    """The path without links, as far as they can be followed."""
    return Path(os.path.realpath(path))


def absolute(path: str) -> str:
    """The path from the root on, `~` resolved, links kept."""
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111
