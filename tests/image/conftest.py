"""What the tests of the image share: an engine, the image, a cluster of containers, and a report of sizes and times."""

from __future__ import annotations

import os
import time

import pip_settings
import pytest
from engines import Engine, EngineError
from pip_settings import PipSettings

IMAGE = "localhost/whisper-jobs:test"
FIGURES: dict[str, str] = {}
"""What was measured, told at the end."""


@pytest.fixture(scope="session")
def engine() -> Engine:
    """docker or podman, with the base of the image."""
    try:
        return Engine.find()
    except EngineError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="session")
def pip(tmp_path_factory: pytest.TempPathFactory) -> PipSettings:
    """pip's configuration of this machine with a secret in it."""
    return pip_settings.of_this_machine(tmp_path_factory.mktemp("pip"))


@pytest.fixture(scope="session")
def image(engine: Engine, pip: PipSettings) -> str:
    """The name of the CPU image, built from this checkout; WHISPER_JOBS_IMAGE names one that is there already."""
    name = os.environ.get("WHISPER_JOBS_IMAGE", IMAGE)
    if "WHISPER_JOBS_IMAGE" not in os.environ:
        started = time.monotonic()
        engine.build(IMAGE, pip, "--target=cpu")
        FIGURES["build"] = f"{time.monotonic() - started:.0f} s (layers that did not change are used again)"
    layers = engine.layers(name)
    FIGURES["size"] = f"{sum(size for size, _ in layers) / 1e9:.2f} GB"
    for size, step in layers:
        FIGURES[f"  {size / 1e6:8.1f} MB"] = " ".join(step.removeprefix("/bin/sh -c ").split())[:80]
    return name


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured."""
    if FIGURES:
        terminalreporter.section("image")
        for name, value in FIGURES.items():
            terminalreporter.write_line(f"{name:16} {value}")
