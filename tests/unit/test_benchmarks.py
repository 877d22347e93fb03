"""What the benchmarks of the fast engine are measured by, and that they still find what they call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.manifest.rows import read_rows
from jobs.model import load_whisper
from service.spec.sections import EvaluationConfig


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their folder, to import from."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


@pytest.mark.parametrize(("steps", "first"), [(2, 1), (16, 4), (96, 8)])
def test_the_first_steps_of_a_training_do_not_count(monkeypatch: pytest.MonkeyPatch, steps: int, first: int) -> None:
    import measured

    clock = 0.0
    monkeypatch.setattr(measured.time, "perf_counter", lambda: clock)
    pace = measured.Pace()
    for step in range(1, steps + 1):
        clock += 100 if step <= first else 3
        pace.tell(step, steps)
    assert pace.step_seconds == 3
    clock += 100  # for what comes after the last step
    assert pace.step_seconds == 3


def test_one_step_has_no_time_of_its_own() -> None:
    import measured

    pace = measured.Pace()
    pace.tell(1, 1)
    assert pace.step_seconds is None


def test_turns_are_averaged_by_run_and_by_step() -> None:
    import measured

    turns = [{"seconds": 4.0, "step_seconds": 1.0, "loss": 2.0}, {"seconds": 6.0, "step_seconds": 2.0, "loss": 3.0}]
    expected = {"seconds": 5.0, "step_seconds": 1.5, "loss": 3.0, "seconds_of_turns": [4.0, 6.0]}
    assert measured.averaged(turns) == expected


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("NVIDIA H100 80GB HBM3", 0.508),
        ("NVIDIA H100 PCIe", 0.664),
        ("NVIDIA H100 NVL", 0.601),
        ("NVIDIA H200", 0.508),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L4", None),
    ],
)
def test_the_share_of_a_gpus_peak_is_of_that_very_card(
    monkeypatch: pytest.MonkeyPatch, name: str, share: float | None
) -> None:
    import measured

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert measured.mfu("turbo", "lora", 100.0) == share


def test_our_side_of_the_evaluation_hears_and_scores(nano: Path, manifest: Path) -> None:
    import evaluation

    rows = list(read_rows(str(manifest / "val.csv"), "en"))[:2]
    clips = evaluation.Rows([(row.path, row.text, row.language) for row in rows], 3.0)
    made, utterances = evaluation._ours(load_whisper(str(nano)), clips, EvaluationConfig(max_new_tokens=8), None)
    assert made["wer"] >= 0
    assert [utterance.reference for utterance in utterances] == [row.text for row in rows]
