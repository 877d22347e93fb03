"""A whole job from a dataset: no CSV is written by hand, and rows of every form are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import soundfile
from engine import job, tone
from running import run

from service.artifacts import DATASET, verify
from service.spec.job import JobSpec
from service.storage import Storage

pytestmark = pytest.mark.slow


@pytest.mark.setting("merge_lora")
def test_a_dataset_is_split_trained_on_and_scored(tiny: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(24):
        paths.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(paths[-1], tone(0.6 + number / 50, 200 + 60 * number), 16_000)
    table = {"path": paths, "sentence": [f"Open door {number}" for number in range(24)]}
    table["speaker"] = [f"s{number % 12}" for number in range(24)]
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "set")
    sections = {
        "data": {"dataset": str(tmp_path / "set"), "group": "speaker", "val_ratio": 0.3, "text": {"case": "lower"}},
        "augment": {"mask_time_prob": 0.05, "speed": [0.9, 1.1]},
    }
    plain = job(tiny, tmp_path, tmp_path / "run", sections, merge_lora=False).model_dump()
    plain["training"] |= {"train_csv": None, "val_csv": None}
    spec = JobSpec.model_validate(plain)
    (tmp_path / "spec.json").write_text(spec.to_json())

    metrics = run("--config", tmp_path / "spec.json", "-o", "json").json()

    storage = Storage(str(tmp_path / "run"))
    built = storage.read_json("stages/dataset.json")["result"]["report"]
    assert built["train"] + built["val"] == 24
    assert metrics["tuned"]["utterances"] == built["val"]
    lines = [json.loads(line) for line in (tmp_path / "run/evaluation/tuned.jsonl").read_text().splitlines()]
    assert all(line["reference"].startswith("open door") for line in lines)
    assert all(line["hypothesis"] == line["hypothesis"].lower() for line in lines)
    assert (tmp_path / "run" / DATASET / "train.csv").is_file()
    assert verify(storage).problems == []
    assert (tmp_path / "run/adapter").is_dir()
    assert not (tmp_path / "run/merged").exists(), "merge_lora is off"
    assert metrics["artifacts"] == {}
