"""What tests of the engine share: two small Whispers, recorded speech, and its manifest, each made once per session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run: a test fails because of a change, never by chance. Look for new ones with
# `pytest --hypothesis-profile default`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# No test may reach the hub, and a Ray that a test starts is its own. Set before transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models are small: more threads than one cost more than they give, most of all beside other processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("RAY_ADDRESS", None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Pass over what this machine lacks."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nano Whisper: trained weights, the real multilingual vocabulary, 30 s windows."""
    from jobs.demo.nano import write_nano_whisper

    folder: Path = tmp_path_factory.mktemp("nano") / "nano-whisper"
    write_nano_whisper(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, nano: Path) -> Path:
    """A Whisper of random weights that hears 2 s at a time, so that a whole run of the engine takes seconds."""
    from engine import write_tiny_whisper

    folder: Path = tmp_path_factory.mktemp("tiny") / "tiny-whisper"
    write_tiny_whisper(folder, nano)
    return folder


@pytest.fixture(scope="session")
def processor(nano: Path) -> Any:
    """Nano Whisper's processor: tokenizer of the multilingual vocabulary, and feature extractor."""
    from jobs.model import load_processor

    return load_processor(str(nano))


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 recordings with their transcripts as names, in several formats and rates."""
    from jobs.demo.make_speech import make_speech

    folder: Path = tmp_path_factory.mktemp("speech") / "recordings"
    make_speech(folder, clips=48, seed=3)
    return folder


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory, speech: Path) -> Path:
    """A folder with train.csv and val.csv for the recordings."""
    from jobs.manifest.build import build

    folder: Path = tmp_path_factory.mktemp("manifest")
    build(speech, folder, val_ratio=0.25)
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """An S3 server of its own, with authentication enforced: `objectstore.Server`."""
    from objectstore import moto_server

    with moto_server() as running:
        yield running


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv (13 rows) and val.csv (5 rows) of clips under 2 s, for `tiny`."""
    from engine import write_tones

    folder: Path = tmp_path_factory.mktemp("tones")
    write_tones(folder)
    return folder
