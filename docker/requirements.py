"""Print what pyproject.toml asks for, with extras: the packages have a layer of their own, that our code is not in."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extras: list[str]) -> Iterator[str]:
    """The requirements of extras; those that name the project itself are followed."""
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            if own := re.fullmatch(rf"{PROJECT['name']}\[(.+)\]", line):
                yield from requirements(own[1].split(","))
            else:
                yield line


if __name__ == "__main__":
    print("\n".join(sorted({*PROJECT["dependencies"], *requirements(sys.argv[1:])})))
