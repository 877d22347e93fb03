"""A folder that a job could start in."""

import pytest


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder: it holds train.csv and val.csv, and no hub cache is near."""
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text("path,text\na.wav,hello there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub-cache"))
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path
