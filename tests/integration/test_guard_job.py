"""A whole job with a guard: what it finds refuses the tuned model, and stands in all that the run leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from engine import job, read_lines, write_csv
from running import run, write

from jobs.audio import SAMPLE_RATE_HZ, read_audio
from jobs.guard.hear import Listener
from jobs.model import load_whisper
from service.artifacts import read_manifest, verify
from service.spec.sections import EvaluationConfig
from service.storage import Storage

pytestmark = pytest.mark.slow


@pytest.mark.setting("guard.csv", "guard.max_wer_increase")
def test_a_guard_refuses_a_model_that_has_lost_what_the_base_could(
    tiny: Path, tones: Path, tmp_path: Path, cluster: str
) -> None:
    paths = [str(tones / f"{number:02}.wav") for number in range(6)]
    soundfile.write(tmp_path / "long.wav", np.concatenate([read_audio(path) for path in paths]), SAMPLE_RATE_HZ)
    soundfile.write(tmp_path / "silence.wav", np.zeros(SAMPLE_RATE_HZ), SAMPLE_RATE_HZ)
    paths.append(str(tmp_path / "long.wav"))
    clips = [{"path": path, "language": "en", "duration_s": soundfile.info(path).duration} for path in paths]
    whisper = load_whisper(str(tiny))
    settings = EvaluationConfig(max_new_tokens=6)
    heard = Listener(whisper.model, whisper.processor, settings, multilingual=True).hear(Dataset.from_list(clips))
    # What the base model says is taken for right: whatever it unlearns is then a loss.
    rows = [(path, item.text, "en", "") for path, item in zip(paths, heard, strict=True)]
    columns = ("path", "text", "language", "no_speech")
    write_csv(tmp_path / "guard.csv", [*rows, ("silence.wav", "", "en", "true")], columns)
    guard = {"csv": str(tmp_path / "guard.csv"), "max_wer_increase": 0.001}
    sections = {"guard": guard, "resources": {"workers": 0}}
    spec = job(tiny, tones, tmp_path / "run", sections, per_dev_batch=4, epochs=3, lr=0.05)

    finished = run("--config", write(spec, tmp_path), "-o", "json", cluster=cluster)

    metrics, storage = finished.json(), Storage(spec.root)
    guarded = metrics["guard"]
    assert guarded["utterances"] == 8  # one of them longer than the model's window
    assert guarded["base"]["wer"] == 0
    assert guarded["tuned"]["wer"] > 0.001
    assert metrics["promoted"] is False
    assert "its WER on the guard's clips" in guarded["reasons"][0]
    assert metrics["promotion_reasons"][-len(guarded["reasons"]) :] == guarded["reasons"]
    assert "  guard  transcribing the guard's clips" in finished.stderr

    found = read_manifest(storage)
    assert found.promoted is False
    assert found.data["guard"]["rows"] == 8
    assert {"data/guard.arrow", "evaluation/guard_base.jsonl", "evaluation/guard_tuned.jsonl"} <= {
        record.path for record in found.files
    }
    assert verify(storage).problems == []
    assert len(read_lines(Path(spec.root) / "evaluation/guard_tuned.jsonl")) == 8
    for folder in ("", "adapter/", "merged/"):
        card = storage.read_bytes(f"{folder}README.md").decode()
        assert "## What it must not forget" in card
        assert all(reason in card for reason in guarded["reasons"])
