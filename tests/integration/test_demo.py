"""`make demo`, line by line, and what it promises: a model that hears new voices badly hears them well afterwards."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine import environment

from service.artifacts import verify
from service.storage import Storage

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def demo_commands() -> list[str]:
    """The lines of the Makefile's target that do something, after those of the target that it rests on."""
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: demo-data$", makefile, re.MULTILINE)
    recipes = [re.search(rf"^{name}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE) for name in ("demo-data", "demo")]
    lines = [line.strip().lstrip("@") for recipe in recipes if recipe for line in recipe[1].splitlines()]
    return [line for line in lines if not line.startswith("echo")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run, from nothing."""
    folder: Path = tmp_path_factory.mktemp("demo")
    (folder / "configs").symlink_to(ROOT / "configs")
    installed = str(Path(sys.executable).parent)
    for line in demo_commands():
        command = line.replace("$(BIN)", installed).split()
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    return folder / "demo"


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def metrics(demo: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((demo / "run/metrics.json").read_text())
    return found


def test_the_base_model_fails_and_the_tuned_one_does_not(demo: Path) -> None:
    found = metrics(demo)
    assert found["base"]["wer"] > 0.30
    assert found["tuned"]["wer"] < 0.10
    assert found["artifacts"]["hf"]["wer"] == pytest.approx(found["tuned"]["wer"], abs=0.01)
    assert found["promoted"] is True


def test_it_ends_with_every_format_proven_in_its_own_runtime(demo: Path) -> None:
    found = metrics(demo)["artifacts"]
    assert list(found) == ["hf", "ggml-f16", "ggml-q8_0", "ctranslate2-int8", "openai"]
    for name, entry in found.items():
        assert "refused" not in entry, name
        assert entry["wer"] < 0.10, name
        # In 8 bits a word or two of the 25 clips may fall the other way; the product's own bar for them is 70 %.
        assert entry["identical"] >= (0.8 if "8" in name.split("-")[-1] else 0.9), name
        assert entry["wer_default"] < 0.15, name
    card = (demo / "run/README.md").read_text()
    assert all(f"| {name} | {entry['runtime']} |" in card for name, entry in found.items())


def test_it_is_measured_on_enough_clips_that_training_has_not_seen(demo: Path) -> None:
    train, val = rows(demo / "manifest/train.csv"), rows(demo / "manifest/val.csv")
    assert len(train) >= 200
    assert len(val) >= 80
    assert metrics(demo)["tuned"]["utterances"] == len(val)
    for column in ("path", "text"):
        assert not {row[column] for row in train} & {row[column] for row in val}


def test_every_file_is_as_published(demo: Path) -> None:
    assert verify(Storage(str(demo / "run"))).problems == []
