"""What this version of whisper-jobs asks for of other packages, as its own metadata says."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import Requirement

DISTRIBUTION = "whisper-jobs"


def requirement(package: str) -> Requirement | None:
    """What is asked for of a package, in whichever extra; None: nothing."""
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        wanted = Requirement(line)
        if wanted.name == package:
            return wanted
    return None


def oldest(package: str) -> str:
    """The oldest version that fits, in three parts: `ray>=2.60,<2.61` gives 2.60.0."""
    wanted = requirement(package)
    assert wanted, package
    parts = next(one.version for one in wanted.specifier if one.operator in (">=", "==")).split(".")
    return ".".join([*parts, "0", "0"][:3])
