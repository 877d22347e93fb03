"""Rows with segments, without speech, under text rules: as they are stored, and as they are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from engine import job, run_engine, tone, write_csv

from jobs import tasks
from jobs.batches import Loader
from jobs.manifest.from_spec import build_from_dataset
from jobs.model import load_prompter
from jobs.prepare import fetch_rows, prepare, split_file
from service.errors import ManifestError
from service.storage import Storage

COLUMNS = ("path", "text", "language", "start_s", "end_s", "segments", "no_speech")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recording of 70 s with segments, a part of it, silence, and a clip with mark-up in its text."""
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", 0.1 * generator.standard_normal(70 * 16_000), 16_000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000, np.float32), 16_000)
    soundfile.write(tmp_path / "short.wav", tone(1.0), 16_000)
    segments = json.dumps([[1, 20, "[Cough] One"], [21, 29, "Two"], [40, 60, "Three"]])
    rows: list[tuple[Any, ...]] = [
        ("long.wav", "", "en", "", "", segments, ""),
        ("long.wav", "Four", "en", "60.5", "62", "", ""),
        ("silence.wav", "", "en", "", "", "", "true"),
        ("short.wav", "Hello, [noise] YOU", "en", "", "", "", ""),
    ]
    write_csv(tmp_path / "train.csv", rows, COLUMNS)
    write_csv(tmp_path / "val.csv", rows[2:], COLUMNS)
    return tmp_path


def stored(nano: Path, data: Path, **settings: Any) -> list[dict[str, Any]]:
    spec = job(nano, data, data / "root", {"data": settings})
    prepare(spec, spec.root, {"train": str(spec.training.train_csv)}, str(nano))
    return list(Dataset.from_file(f"{spec.root}/{split_file('train')}"))


def test_a_long_recording_is_stored_as_windows_with_times_of_their_own(nano: Path, data: Path) -> None:
    rows = stored(nano, data)
    assert [row["text"] for row in rows] == ["[Cough] One Two", "Three", "Four", "", "Hello, [noise] YOU"]
    assert [(row["start_s"], row["end_s"]) for row in rows[:3]] == [(0.8, 29.2), (39.8, 60.2), (60.5, 62.0)]
    assert [row["duration_s"] for row in rows[:3]] == pytest.approx([28.4, 20.4, 1.5])
    assert json.loads(rows[1]["segments"]) == [[0.2, 20.2, "Three"]]
    assert [row["no_speech"] for row in rows] == [False, False, False, True, False]


def test_windows_are_heard_and_trained_with_their_times(nano: Path, data: Path, processor: Any) -> None:
    rows = stored(nano, data)
    prompter = load_prompter(str(nano))
    loader = Loader(rows, processor.feature_extractor, prompter, threads=1, prefetch=1)
    batch = loader.make([1, 3])
    samples, _ = soundfile.read(data / "long.wav", dtype="float32")
    part = samples[round(39.8 * 16_000) : round(60.2 * 16_000)]
    expected = processor.feature_extractor([part], sampling_rate=16_000, return_tensors="pt").input_features
    np.testing.assert_allclose(batch.features_BMF[0], expected[0], atol=1e-5)
    text = processor.tokenizer.decode(
        prompter.encode_row(rows[1], timestamps=True).inputs[3:], decode_with_timestamps=True
    )
    assert text == "<|0.20|> Three<|20.20|>"
    assert rows[0]["tokens"] == len(prompter.encode_row(rows[0], timestamps=True).inputs)


def test_text_rules_reach_texts_and_segments(nano: Path, data: Path) -> None:
    rows = stored(nano, data, text={"brackets": "remove", "case": "lower", "punctuation": "remove"})
    assert [row["text"] for row in rows] == ["one two", "three", "four", "", "hello you"]
    assert [segment[2] for segment in json.loads(rows[0]["segments"])] == ["one", "two"]


def test_a_text_that_the_rules_leave_nothing_of_is_a_bad_row(nano: Path, data: Path) -> None:
    write_csv(data / "train.csv", [("short.wav", "[noise]", "en")], COLUMNS[:3])
    with pytest.raises(ManifestError, match="text is empty"):
        stored(nano, data, text={"brackets": "remove"})


def test_the_full_check_finds_what_headers_hide(nano: Path, data: Path) -> None:
    soundfile.write(data / "cut.flac", tone(3.0), 16_000)
    content = (data / "cut.flac").read_bytes()
    (data / "cut.flac").write_bytes(content[: len(content) // 2])
    soundfile.write(data / "mute.wav", np.zeros(16_000, np.float32), 16_000)
    rows = [("cut.flac", "one", "en"), ("mute.wav", "two", "en"), ("short.wav", "three", "en")]
    write_csv(data / "train.csv", rows, COLUMNS[:3])
    assert len(stored(nano, data, check="header")) == 3
    with pytest.raises(ManifestError) as caught:
        stored(nano, data)
    assert ["cut off" in str(fault) or "silent" in str(fault) for fault in caught.value.faults] == [True, True, False]
    assert len(stored(nano, data, bad_rows="reject")) == 1
    assert "truncated" in (data / "root/rejects.csv").read_text()


def test_a_training_runs_on_all_of_it_and_counts_what_is_heard_in_silence(tiny: Path, tmp_path: Path) -> None:
    segments = json.dumps([[0, 0.5, "open"], [0.5, 1.0, "the window"]])
    for number in range(8):
        soundfile.write(tmp_path / f"{number}.wav", tone(1.2, 200 + 90 * number), 16_000)
    rows: list[tuple[Any, ...]] = [
        (
            f"{number}.wav",
            *([("", "en", "", "", "", "true"), ("open the window", "en", "", "", segments, "")][number % 2]),
        )
        for number in range(8)
    ]
    write_csv(tmp_path / "train.csv", rows, COLUMNS)
    write_csv(tmp_path / "val.csv", rows[:3], COLUMNS)
    augment = {"mask_time_prob": 0.05, "speed": [0.9, 1.1], "noise_prob": 0.5, "gain_db": [-3, 3]}
    reports = []
    for name in ("one", "two"):
        spec = job(tiny, tmp_path, tmp_path / name, {"augment": augment, "data": {"timestamps": 1.0}}, merge_lora=False)
        reports.append(run_engine(spec)[0])
    assert reports[0]["tuned"] == reports[1]["tuned"]
    assert reports[0]["base"]["utterances"] == 3
    assert reports[0]["base"]["words"] == 3, "rows without speech have no words to hear"
    lines = [json.loads(line) for line in (tmp_path / "one/evaluation/base.jsonl").read_text().splitlines()]
    for line in lines:
        if not line["reference"]:
            assert line["words_raw"]["insertions"] == len(line["hypothesis"].split())


def test_a_dataset_takes_the_place_of_the_manifests(nano: Path, tmp_path: Path) -> None:
    for number in range(30):
        path = tmp_path / f"data/{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone(0.4, 200 + 90 * number), 16_000)
    import datasets

    table = {"path": [str(tmp_path / f"data/{number}.wav") for number in range(30)]}
    table |= {"sentence": [f"sentence {number}" for number in range(30)], "who": [f"s{n % 10}" for n in range(30)]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "set")
    spec = job(
        nano,
        tmp_path,
        tmp_path / "root",
        {"data": {"dataset": str(tmp_path / "set"), "val_ratio": 0.3, "group": "who"}},
    )
    built = build_from_dataset(spec, tmp_path / "root/data/dataset", lambda rows: None)
    assert built["report"]["train"] + built["report"]["val"] == 30
    result = prepare(spec, str(tmp_path / "root"), built["manifests"], str(nano))
    assert result["sentences_in_both"] == 0
    assert result["train"]["rows"] + result["val"]["rows"] == 30


def test_a_dataset_for_a_remote_root_can_be_read_from_there(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "cache"))
    for number in range(20):
        soundfile.write(tmp_path / f"{number}.wav", tone(0.4, 200 + 90 * number), 16_000)
    inside = [{"path": None, "bytes": (tmp_path / f"{number}.wav").read_bytes()} for number in range(20)]
    outside = [str(tmp_path / f"{number}.wav") for number in range(20)]
    for column, clips in (("audio", inside), ("path", outside)):
        table = {column: clips, "sentence": [f"sentence {number}" for number in range(20)]}
        datasets.Dataset.from_dict(table).save_to_disk(tmp_path / column)
        root = f"memory://{tmp_path}/{column}"
        spec = job(nano, tmp_path, tmp_path / "root", {"data": {"dataset": str(tmp_path / column), "val_ratio": 0.3}})
        log = SimpleNamespace(emit=SimpleNamespace(remote=lambda event: None))
        built = tasks.build_dataset(spec.to_json(), root, log)
        assert built["manifests"] == {"train": "data/dataset/train.csv", "val": "data/dataset/val.csv"}
        data = tasks.prepare_data(spec.to_json(), root, built["manifests"], str(nano), log)
        assert data["train"]["rows"] + data["val"]["rows"] == 20
        for split in ("train", "val"):
            paths = [row["path"] for row in Dataset.from_file(fetch_rows(Storage(root), split))]
            assert all(Path(path).is_file() for path in paths)
            assert all(("cache" in path) == (column == "audio") for path in paths)
