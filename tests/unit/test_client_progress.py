"""A log's lines say again what the job has told: the reporter writes them, the client reads them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from jobs.kinds.exports import MERGING
from jobs.progress import Reporter
from service.client.progress import Progress, advance, read_line


def lines(*events: dict[str, Any], every_s: float = 0.0) -> list[str]:
    """What a reporter on a cluster, where no terminal is, writes of events."""
    written = io.StringIO()
    reporter = Reporter(Console(file=written, highlight=False, soft_wrap=True), every_s=every_s)
    for event in events:
        reporter.show(event)
    reporter.close()
    return written.getvalue().splitlines()


def after(*events: dict[str, Any]) -> Progress:
    progress = Progress()
    for line in lines(*events):
        progress = advance(progress, line)
    return progress


def stage(name: str, text: str = "does it") -> dict[str, Any]:
    return {"event": "stage", "stage": name, "status": "started", "text": text}


STAGES = (
    "dataset",
    "prepare",
    "describe",
    "train",
    "evaluate",
    "search",
    "train-t012",
    "winner",
    "merge",
    "guard",
    "export-hf",
    "export-ctranslate2-int8_float16",
)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_known_by_its_line(name: str) -> None:
    assert after(stage(name)).stage == name
    (line,) = lines({"event": "stage", "stage": name, "status": "skipped"})
    assert read_line(line) == {"elapsed": "0:00", "event": "stage", "stage": name, "text": "done before"}


def test_a_step_has_its_loss_and_the_time_left() -> None:
    said = [{"event": "step", "step": step, "steps": 234, "loss": 4.5 / step, "lr": 1e-3} for step in (10, 20)]
    first, second = lines(stage("train"), *said)[1:]
    assert read_line(first) == {
        "elapsed": "0:00", "event": "progress", "what": "step", "done": 10, "total": 234, "eta": None,
        "loss": 0.45, "lr": 1e-3,
    }  # fmt: skip
    told = read_line(second)
    assert told is not None
    assert (told["done"], told["loss"], told["eta"]) == (20, 0.225, "0:00")
    assert after(stage("train"), *said).words().startswith("train  step 20/234  loss 0.225  eta ")


def test_rates_of_base_and_tuned_model_are_kept_apart() -> None:
    base = {"event": "evaluation", "what": "base", "wer": 0.595, "cer": 0.51}
    during = {"event": "evaluation", "step": 78, "wer": 0.23, "cer": 0.2}
    tuned = {"event": "evaluation", "what": "tuned", "wer": 0.063, "cer": 0.058}
    assert (after(base).base_wer, after(base).wer) == (0.595, None)
    assert (after(base, during).wer, after(base, during).wer_step) == (0.23, 78)
    done = after(stage("train"), base, during, tuned)
    assert (done.base_wer, done.wer, done.wer_step) == (0.595, 0.063, None)
    assert done.words() == "train  WER 59.5% -> 6.3%"


def test_what_is_counted_ends_with_its_stage() -> None:
    heard = {"event": "transcribed", "what": "guard, base model", "done": 3, "total": 9}
    assert (after(stage("guard"), heard).what, after(stage("guard"), heard).done) == (
        "transcribing (guard, base model)",
        3,
    )
    assert after(stage("guard"), heard, stage("merge", MERGING)).words() == "merge"


def test_a_search_counts_its_trials() -> None:
    row = {"event": "trial", "settings": {"lora_r": 4}, "cause": None, "share": 1.0, "metric": "wer", "planned": 16}
    best = {"best": "t000", "best_score": 0.21}
    begins = row | {"id": "t000", "status": "pending", "score": None, "done": 0, "best": None, "best_score": None}
    ends = row | {"id": "t000", "status": "finished", "score": 0.21, "done": 1} | best
    told = after(stage("search"), begins, ends)
    assert (told.stage, told.what, told.done, told.total) == ("search", "trials", 1, 16)
    assert told.words().startswith("search  trials 1/16")
    evaluated = ends | {"status": "running"}
    assert after(stage("search"), begins, ends, evaluated) == told, "one trial's WER is not the job's"


def test_the_root_is_known_by_its_line() -> None:
    event = {"event": "root", "job_id": "demo-068cd74e", "root": "s3://speech/my runs/demo"}
    assert after(event).root == "s3://speech/my runs/demo"


@pytest.mark.parametrize(
    "text",
    [
        "the cluster has no GPU: training on CPUs (resources.gpus_per_worker: 1 waits for GPUs)",
        "waiting for the cluster to offer 4 GPUs (there are 2), 300 s at most",
        "going on from step 5 of 10",
        "32 modules adapted; 90,112 of 3,705,152 parameters are trained (2.43%); float32 on cpu (1 threads)",
        "the longest text has [8] tokens",
        "this job is complete already: /a/b/3/4",
    ],
)
@pytest.mark.parametrize("level", ["", "warning", "refused"])
def test_other_notices_change_nothing(text: str, level: str) -> None:
    (line,) = lines({"event": "notice", "level": level, "text": text})
    told = read_line(line)
    assert told is not None
    assert told["event"] == "notice"
    assert told["text"] == (f"{level}: {text}" if level else text), "brackets are text"
    assert advance(Progress(stage="train", done=3), line) == Progress(stage="train", done=3, elapsed="0:00")


@pytest.mark.parametrize(
    "line",
    [
        "", "demo-068cd74e  better: WER 59.5% -> 6.3%", "WER                      59.5%             6.3%       6.3%",
        "error: stopped at step 12 of 30; its checkpoint is kept", "hf  transformers  float32  20.4 MB",
        "2026-11-25 02:47:16,151 INFO job_manager.py:581 -- Runtime env is setting up.",
        "  time       3:36  (prepare 0:06, describe 0:00, train 2:41)",
        "Running entrypoint for job demo: python -m jobs.main --config spec.json",
    ],
)  # fmt: skip
def test_lines_of_others_are_none_of_progress(line: str) -> None:
    assert read_line(line) is None
