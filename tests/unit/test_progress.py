"""What a person sees of a job: lines in plain words, at most one every ten seconds for what only counts up."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import jobs
from jobs.progress import Reporter, seconds_text
from jobs.summary import print_summary
from service.storage import Storage

RATES = {"wer": 0.5, "wer_raw": 0.6, "cer": 0.25, "cer_raw": 0.3, "utterances": 80, "wer_interval": [0.4, 0.6]}
COUNTS = {"substitutions": 1200, "deletions": 3, "insertions": 4}
LANGUAGES = {"languages": {"en": RATES, "es": RATES | {"wer": 0.75}}}


class Screen:
    """A reporter and what it has written."""

    def __init__(self, *, terminal: bool = False) -> None:
        self._file = io.StringIO()
        console = Console(file=self._file, width=200, force_terminal=terminal, highlight=False, color_system=None)
        self.reporter = Reporter(console)

    def show(self, event: str, **content: Any) -> None:
        self.reporter.show({"event": event} | content)

    @property
    def lines(self) -> list[str]:
        return [line[7:].strip() for line in self._file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_stages_are_named_with_what_they_do_and_what_was_done_before() -> None:
    screen = Screen()
    screen.show("stage", stage="prepare", status="skipped")
    screen.show("stage", stage="train", status="started", text="2 workers")
    screen.show("stage", stage="train", status="done", seconds=1.0)
    assert screen.lines == ["prepare  done before", "train  2 workers"]


def test_the_trained_share_and_the_way_on_are_said() -> None:
    screen = Screen()
    model = {"modules": 32, "trainable_parameters": 90112, "parameters": 3795264, "precision": "no", "device": "cpu"}
    screen.show("model", **model, resumed_from_step=0, steps=14)
    screen.show("model", **model, resumed_from_step=5, steps=14)
    expected = "32 modules adapted; 90,112 of 3,795,264 parameters are trained (2.37%); float32 on cpu"
    assert screen.lines == [expected, expected, "going on from step 5 of 14"]


def test_evaluations_are_said_with_their_step_or_subject() -> None:
    screen = Screen()
    screen.show("evaluation", what="base", wer=0.5, cer=0.251)
    screen.show("evaluation", step=5, wer=1.5, cer=0.0)
    assert screen.lines == ["base WER 50.0%, CER 25.1%", "WER 150.0%, CER 0.0% at step 5"]


def test_steps_are_said_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen = Screen()
    screen.show("stage", stage="train", status="started", text="")
    for step in range(1, 31):
        now += 1
        screen.show("step", step=step, steps=30, loss=1.0, lr=5e-5)
    said = [line for line in screen.lines if line.startswith("step")]
    assert [line.split()[1] for line in said] == ["10/30", "20/30", "30/30"]
    assert said[1] == "step 20/30  loss 1.000  lr 5.0e-05  eta 0:10"


def test_unknown_events_are_passed_over_and_a_terminal_gets_a_bar() -> None:
    screen = Screen(terminal=True)
    screen.show("checkpoint", step=5)
    screen.show("traceback", text="Traceback")
    for step in (1, 2):
        screen.show("step", step=step, steps=2, loss=1.0, lr=5e-5)
    screen.reporter.files(1, 2)
    screen.reporter.close()
    screen.reporter.close()
    assert "Traceback" not in "".join(screen.lines)


def test_brackets_in_a_path_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.show("stage", stage="evaluate", status="started", text="transcribing with /data/[old]/[/new]")
    assert screen.lines == ["evaluate  transcribing with /data/[old]/[/new]"]
    print_summary(Storage(f"{tmp_path}/[old]/[/new]"), {"job_id": "tiny-12345678", "model": RATES | COUNTS | LANGUAGES})
    assert f"verify '{tmp_path}/[old]/[/new]'" in capsys.readouterr().out


def metrics(**changes: Any) -> dict[str, Any]:
    return {
        "job_id": "tiny-lora-12345678",
        "base": RATES | COUNTS | LANGUAGES,
        "tuned": RATES | COUNTS | LANGUAGES | {"wer": 0.1},
        "adapter": {"modules": 32},
        "merge": {"max_logit_difference": 2.3e-6},
        "artifacts": {"hf": {"wer": 0.1, "cer": 0.05, "identical": 1.0, "utterances": 80}},
        "promoted": True,
        "promotion_reasons": [],
        "seconds": {"prepare": 1.0, "train": 75.4, "total": 76.4},
    } | changes


def test_the_summary_holds_rates_proofs_times_and_places(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(Storage("/runs/one"), metrics())
    text = capsys.readouterr().out
    for expected in (
        "tiny-lora-12345678  better: WER 50.0% -> 10.0%",
        "/runs/one/adapter  (all 32 adapted modules changed)",
        "logits within 2e-06 of the adapter's; PEFT's own weights to the last bit; 100.0%",
        "1:16  (prepare 0:01, train 1:15)",
        "whisper-jobs verify /runs/one\n",
    ):
        assert expected in text
    rows = [line.split() for line in text.splitlines()]
    assert ["WER", "50.0%", "10.0%", "10.0%"] in rows
    assert ["WER", "es", "75.0%", "75.0%"] in rows
    assert ["substituted", "1,200", "1,200"] in rows


def test_the_summary_says_whether_a_gain_may_be_chance(capsys: pytest.CaptureFixture[str]) -> None:
    for bounds, end in (([-0.06, -0.02], ")"), ([-0.06, 0.01], "), which may be chance")):
        found = {"wer": -0.04, "wer_interval": bounds, "better": 9, "worse": 2}
        print_summary(Storage("/runs/one"), metrics(difference=found))
        (said,) = [line for line in capsys.readouterr().out.splitlines() if "better:" in line]
        assert "WER 50.0% -> 10.0%, −4.0 points of WER (95 % interval −6.0 to " in said
        assert said.endswith(f"paired by clip{end}")


def test_of_a_checkpoint_without_an_adapter_nothing_is_said_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(Storage("/runs/one"), metrics(source={"adapter": None}))
    text = capsys.readouterr().out
    assert "(100.0% of the transcripts identical)" in text
    assert "PEFT" not in text


@pytest.mark.parametrize(
    ("folder", "shown"), [("", ".venv/bin/whisper-jobs"), ("elsewhere", "{}/.venv/bin/whisper-jobs")]
)
def test_the_last_line_works_as_it_is_printed_where_the_command_is_not_on_the_path(
    folder: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands, here = tmp_path / ".venv/bin", tmp_path / folder
    commands.mkdir(parents=True)
    here.mkdir(exist_ok=True)
    for name in ("whisper-jobs", "python"):
        (commands / name).write_text("#!/bin/sh\necho ran $0 $@\n")
        (commands / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(commands / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(here)

    print_summary(Storage("runs/my run"), metrics())

    line = capsys.readouterr().out.splitlines()[-1].removeprefix("  Check it at any time: ")
    root = f"{here}/runs/my run"
    assert line == f"{shown.format(tmp_path)} verify '{root}'"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert ran.stdout == f"ran {shown.format(tmp_path)} verify {root}\n"

    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    print_summary(Storage("runs/my run"), metrics())
    assert capsys.readouterr().out.endswith(f" whisper-jobs verify '{root}'\n")


def test_a_model_that_is_no_better_is_said_to_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(Storage("/runs/one"), metrics(promoted=False, promotion_reasons=["its WER is not below"], merge=None))
    text = capsys.readouterr().out
    assert "not promoted: its WER is not below" in text
    assert "logits" not in text


def trial(number: int, status: str, score: float | None = None, done: int = 0, **more: Any) -> dict[str, Any]:
    """A trial's event."""
    settings = {"lora_r": 4 * (number + 1), "use_dora": True, "lr": 0.0003}
    event = {"id": f"t{number:03}", "settings": settings, "status": status, "score": score, "cause": None, "share": 0.5}
    best = {"best": "t001" if done else None, "best_score": 0.2 if done else None}
    return event | {"metric": "wer", "done": done, "planned": 30} | best | more


def test_each_news_of_a_trial_is_a_line() -> None:
    screen = Screen()
    screen.show("trial", **trial(0, "pending"))
    screen.show("trial", **trial(0, "running"))
    screen.show("trial", **trial(0, "running", 0.5))
    screen.show("trial", **trial(0, "stopped", 0.5, 1, cause="asha: at 50%"))
    screen.show("trial", **trial(1, "failed", None, 2, cause="the loss is [nan]"))
    screen.show("trial", **trial(2, "finished", 3.2, 3, metric="loss", best_score=1.25))
    lines = [line.split("  eta")[0] for line in screen.lines]
    assert lines == [
        "t000 begins: lora_r 4, use_dora true, lr 0.0003",
        "t000 at 50%  WER 50.0%",
        "t000 stopped (asha: at 50%)  WER 50.0%",
        "trials 1/30  best t001: WER 20.0%",
        "t001 failed (the loss is [nan])",
        "trials 2/30  best t001: WER 20.0%",
        "t002 finished  loss 3.200",
        "trials 3/30  best t001: loss 1.250",
    ]


def test_what_is_left_of_a_search_counts_trials_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four trials of eight at once, which say now and then how far they are; a long silence is broken."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    screen = Screen()
    for number in range(4):
        screen.show("trial", **trial(number, "running", share=0.0, planned=8))
    now[0] += 20
    screen.show("trial_step", id="t000", share=0.5)
    assert screen.lines == [], "the silence is not long yet"
    now[0] += 40
    screen.show("trial_step", id="t001", share=0.5)  # 2 * 0.5 of 8 in a minute
    assert screen.lines == ["trials 0/8  4 under way  eta 7:00"]
    screen.show("trial", **trial(2, "stopped", 0.4, 1, share=0.5, planned=8))  # 2 * 0.5 + 1 of 8 in a minute
    assert screen.lines[-1].endswith("eta 3:00")
    screen.show("trial_step", id="t002", share=0.7)  # said before it ended, and come late
    screen.show("trial_step", id="t009", share=0.7)  # of an attempt before this one
    now[0] += 30
    screen.show("trial_step", id="t003", share=1.0)
    assert screen.lines[-1] == "trials 1/8  best t001: WER 20.0%  eta 2:30"


def test_the_best_that_is_told_is_the_latest_and_what_is_left_counts_what_was_done_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    screen = Screen()
    screen.show("trial", **trial(6, "running", 0.9, 6, share=0.0, planned=8, best="t006", best_score=0.9))
    screen.show("trial", **trial(7, "running", 0.5, 6, share=0.0, planned=8, best="t007", best_score=0.5))
    now[0] += 60
    screen.show("trial_step", id="t006", share=0.5)  # 0.5 of the two that were left
    assert screen.lines[-1] == "trials 6/8  best t007: WER 50.0%  eta 3:00"


def test_on_a_terminal_trials_are_a_table_that_stays() -> None:
    screen = Screen(terminal=True)
    for number in range(20):
        screen.show("trial", **trial(number, "finished" if number < 18 else "running", 0.9 - 0.03 * number, number))
    screen.show("stage", stage="train-t017", status="started", text="taking t017 to the end")
    shown = screen._file.getvalue().split("trials done")[-1]
    assert shown.index("t018") < shown.index("t017") < shown.index("t016"), "those under way, then the best"
    assert "and 4 more" in shown
    assert "t000" not in shown
    assert shown.index("taking t017 to the end") > shown.index("and 4 more")


def test_what_a_winners_training_said_is_not_said_again() -> None:
    screen = Screen()
    screen.show("evaluation", step=3, wer=0.5, cer=0.2, trial="t003")
    screen.show("evaluation", step=3, loss=2.5)
    assert screen.lines == ["validation loss 2.500 at step 3"]


def test_only_what_prints_knows_marks_for_a_terminal() -> None:
    """What goes to events.jsonl is plain text."""
    folder = Path(jobs.__file__).parent
    marked = {
        path.name for path in folder.rglob("*.py") if re.search(r"\[/(yellow|red|green|bold|dim)\]", path.read_text())
    }

    assert marked <= {"progress.py", "summary.py", "trials_shown.py"}
