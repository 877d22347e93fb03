"""What the tests on clusters of separate processes share: their job, and what it gives when nobody disturbs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_days import spec_of, started
from engine import prepared
from gloo import train_in_processes
from planning import Faults


@pytest.fixture(scope="session")
def undisturbed(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run of the engine, with two workers and without Ray."""
    spec = spec_of(tiny, tones, tmp_path_factory.mktemp("undisturbed") / "run")
    (report,) = train_in_processes([prepared(spec)], 2)
    assert "error" not in report, report["traceback"]
    return Path(spec.root)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """Where faults are planned for the processes of the module's cluster."""
    return Faults(tmp_path_factory.mktemp("faults"), "")


@pytest.fixture(autouse=True)
def _nothing_of_before(faults: Faults) -> Iterator[None]:
    """No fault of the test before, and no job of it."""
    faults.clear()
    yield
    while started:
        started.pop().kill()
