"""SIGKILL while an export is written or heard: the task is done again, and nothing half-made is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports import merged_run
from planning import Faults

from service.artifacts import verify
from service.spec.job import JobSpec
from service.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.mark.parametrize("action", ["kill this process", "kill the driver"])
@pytest.mark.parametrize("point", ["before an export is published", "in the proof of an export"])
def test_an_export_killed_at_any_moment_ends_as_one_left_alone(
    faults: Faults, nano: Path, manifest: Path, tmp_path: Path, point: str, action: str
) -> None:
    merged_run(nano, manifest, tmp_path / "trained")
    spec = JobSpec.model_validate(
        {
            "kind": "export",
            "training": {"outdir": str(tmp_path / "run")},
            "evaluation": {"csv": str(manifest / "val.csv"), "max_new_tokens": 40},
            "export": {
                "source": str(tmp_path / "trained/adapter"),
                "formats": ["ggml-f16"],
                "proof_clips": 4,
                "max_wer_increase": 0.2,
            },
        }
    )
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json())
    arguments = ("--config", path, "-o", "json")
    faults.plan(point, action)
    finished = faults.run(*arguments)
    assert faults.fired, finished.stderr
    if action == "kill the driver":
        assert finished.code == -9
        assert not (tmp_path / "run/manifest.json").exists()
        finished = faults.run(*arguments)
    entry = finished.json()["artifacts"]["ggml-f16"]
    assert "refused" not in entry
    assert verify(Storage(str(tmp_path / "run"))).problems == []
    assert list((tmp_path / "run").rglob(".wj-*")) == []
    assert sorted(file.name for file in (tmp_path / "run/exports/ggml-f16").iterdir()) == [
        "README.md",
        "ggml-model-f16.bin",
    ]
