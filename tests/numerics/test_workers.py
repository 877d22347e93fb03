"""Two workers do what one does at the same effective batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine import job, prepared, run_engine, saved_adapter
from gloo import train_in_processes

from service.spec.job import JobSpec

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    # 13 rows in steps of 4: the last step of an epoch leaves the second worker without a row.
    "LoRA": {"per_dev_batch": 2, "epochs": 2},
    "DoRA": {"per_dev_batch": 2, "epochs": 2, "use_dora": True},
    # Steps of 8, 4 forward passes of 2; and of the last 5 rows some passes are short or empty.
    "accumulation": {"per_dev_batch": 2, "grad_accum": 2, "epochs": 2, "freeze_encoder": True},
    "embeddings in full": {"per_dev_batch": 2, "epochs": 1, "modules_to_save": ["embed_tokens"]},
}


def spec_of(tiny: Path, tones: Path, root: Path, workers: int, **settings: Any) -> JobSpec:
    settings["grad_accum"] = settings.get("grad_accum", 1) * 2 // workers
    sections = {"resources": {"workers": workers}}
    return job(tiny, tones, root, sections, lora_dropout=0.0, eval_steps=3, **settings)


@pytest.fixture(scope="module")
def pairs(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Per case: report and adapter of one worker, and of two."""
    folder = tmp_path_factory.mktemp("workers")
    tasks = [prepared(spec_of(tiny, tones, folder / f"two-{name}", 2, **case)) for name, case in CASES.items()]
    together = dict(zip(CASES, train_in_processes(tasks, 2), strict=True))
    found = {}
    for name, case in CASES.items():
        spec = spec_of(tiny, tones, folder / f"one-{name}", 1, **case)
        result, session = run_engine(spec)
        two = folder / f"two-{name}"
        found[name] = {
            "one": {"result": result, "events": session.events, "root": Path(spec.root)},
            "two": together[name] | {"root": two},
        }
    return found


def steps(report: dict[str, Any], value: str) -> list[float]:
    return [event[value] for event in report["events"] if event["event"] == "step"]


@pytest.mark.parametrize("name", CASES)
def test_two_workers_equal_one_at_the_same_effective_batch(pairs: dict[str, Any], name: str) -> None:
    one, two = pairs[name]["one"], pairs[name]["two"]
    assert "error" not in two, two.get("traceback")
    assert len(steps(one, "loss")) > 3
    assert steps(two, "loss") == pytest.approx(steps(one, "loss"), rel=1e-5)
    assert steps(two, "grad_norm") == pytest.approx(steps(one, "grad_norm"), rel=1e-4)
    last = max(int(path.name.split("-")[1]) for path in (one["root"] / "checkpoints").glob("checkpoint-*"))
    adapters = [saved_adapter(each["root"] / f"checkpoints/checkpoint-{last}/adapter") for each in (one, two)]
    assert adapters[0].keys() == adapters[1].keys()
    for key, tensor in adapters[0].items():
        assert float((tensor - adapters[1][key]).abs().max()) <= 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_two_workers_score_every_clip_once(pairs: dict[str, Any], name: str) -> None:
    one, two = pairs[name]["one"], pairs[name]["two"]
    assert two["result"]["base"] == one["result"]["base"]
    assert two["result"]["tuned"]["utterances"] == 5
    assert (two["root"] / "evaluation/base.jsonl").read_text() == (one["root"] / "evaluation/base.jsonl").read_text()


@pytest.mark.parametrize("name", CASES)
def test_workers_draw_different_random_numbers(pairs: dict[str, Any], name: str) -> None:
    first, second = pairs[name]["two"]["random"]
    assert first != second, "or their dropout would be the same"


def test_rank_0_alone_writes(pairs: dict[str, Any]) -> None:
    for case in pairs.values():
        written = sorted(path.name for path in case["two"]["root"].iterdir())
        expected = sorted(path.name for path in case["one"]["root"].iterdir())
        assert [name for name in written if not name.startswith("report-")] == expected
