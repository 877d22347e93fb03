"""`whisper-jobs report` and `compare`: what they print, write and refuse."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from disks import small_disk
from reports import BASE, HOSTILE, TUNED, make_search, many_utterances, metrics_of, utterance, write_run

from service.artifacts import verify
from service.cli.main import cli
from service.report.compare import compare
from service.report.run import read_run
from service.storage import Storage


def call(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_the_report_of_a_run_is_written_here_and_the_run_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = call("report", "run")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path}/report.html  (4.")
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert verify(root).problems == []


def test_the_report_goes_where_it_is_asked_to_and_json_says_where(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    target = tmp_path / "new" / "page.html"
    found = json.loads(call("report", tmp_path / "run", "--out", target, "-o", "json").stdout)
    assert found == {"root": f"{tmp_path}/run", "report": str(target), "size_bytes": target.stat().st_size}


def test_the_report_is_opened_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the desktop's own program, in whose place stands one that notes what it was given."""
    write_run(tmp_path / "run")
    program = tmp_path / "bin" / "xdg-open"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert call("report", tmp_path / "run", "--out", tmp_path / "page.html", "--open").exit_code == 0
    opened, deadline = tmp_path / "opened", time.monotonic() + 10
    while not (opened.exists() and opened.read_text()):
        assert time.monotonic() < deadline
    assert opened.read_text().strip() == f"{tmp_path}/page.html"


def test_a_remote_run_has_its_report_made_here(tmp_path: Path) -> None:
    local, remote = write_run(tmp_path / "run"), Storage(f"memory://{tmp_path}/run")
    for name, _ in local.files():
        remote.write_bytes(name, local.read_bytes(name))
    result = call("report", remote.uri, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "tuned model" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.parametrize("out", ["run/report.html", "run/deep/er.html", "link/x.html"])
def test_nothing_is_written_into_the_root_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = call("report", "run", "--out", out)
    assert result.exit_code == 2
    assert "lies in the run's root" in result.stderr
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize("command", [("report",), ("compare", "run")])
def test_a_root_that_is_none_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    result = call(*command, "nowhere")
    assert result.exit_code == 5
    assert result.stderr == "error: nowhere: no such folder; give the root of a run\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_page_that_cannot_be_written_is_an_error_of_input(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    result = call("report", tmp_path / "run", "--out", tmp_path / "file" / "page.html")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_a_full_disk_is_a_matter_of_storage(tmp_path: Path) -> None:
    first, second = two_runs(tmp_path)
    with small_disk(tmp_path / "disk", "4k"):
        for words in (["report", first, "--out"], ["compare", first, second, "--html"]):
            result = call(*words, tmp_path / "disk/page.html")
            assert result.exit_code == 11
            assert "page.html: cannot be written (No space left on device); make room" in result.stderr


WORSE = (BASE[0], TUNED[1], utterance("/elsewhere/c.wav", "Abre la puerta", "abre la puerta", "es", 2.1))
"""Against TUNED: the first clip got worse, the third better, and lay in another folder."""


def two_runs(folder: Path, **changes: Any) -> tuple[Path, Path]:
    write_run(folder / "one", lora_r=16, lr=1e-4)
    metrics = metrics_of(BASE, WORSE, job_id="calls-nl-87654321", promoted=False)
    write_run(folder / "two", tuned=WORSE, metrics=metrics, lora_r=4, use_dora=True, outdir="/x/two", **changes)
    return folder / "one", folder / "two"


def test_settings_that_differ_are_listed_but_for_places(tmp_path: Path) -> None:
    found = json.loads(call("compare", *two_runs(tmp_path), "-o", "json").stdout)
    assert found["settings"] == {
        "training.lr": [1e-4, 5e-5],
        "training.lora_r": [16, 4],
        "training.use_dora": [False, True],
    }


def test_figures_stand_side_by_side(tmp_path: Path) -> None:
    found = json.loads(call("compare", *two_runs(tmp_path), "-o", "json").stdout)
    assert found["metrics"]["WER"] == [pytest.approx(4 / 11), pytest.approx(3 / 11)]
    assert found["metrics"]["promoted"] == [True, False]
    assert found["metrics"]["WER of ggml-q8_0"][0] == {"wer": 0.4, "refused": "its WER is 30 points above that of hf"}
    assert found["metrics"]["trainable parameters"] == [90_112, 90_112]
    assert found["metrics"]["WER, Spanish"] == [1.0, 0.0]


def test_utterances_that_got_better_and_worse_are_found_by_name_and_reference(tmp_path: Path) -> None:
    (pair,) = json.loads(call("compare", *two_runs(tmp_path), "-o", "json").stdout)["pairs"]
    assert (pair["clips"], pair["better"], pair["worse"]) == (3, 1, 1)
    assert pair["got_better"][0]["hypotheses"] == ["abre una puerta ahora ya", "abre la puerta"]
    assert pair["got_worse"][0]["errors"] == [0, 2]
    low, high = pair["wer_difference_interval"]
    assert pair["wer_difference"] == pytest.approx(-1 / 11)
    assert low < pair["wer_difference"] < high


def test_runs_that_were_scored_on_other_clips_are_compared_on_the_common_ones(tmp_path: Path) -> None:
    one, two = two_runs(tmp_path)
    write_run(tmp_path / "three", tuned=[*TUNED[:2], utterance("/data/z.wav", "new", "new")])
    found = json.loads(call("compare", one, tmp_path / "three", two, "-o", "json").stdout)
    pair, other = found["pairs"]
    assert (pair["clips"], pair["only_first"], pair["only_other"]) == (2, 1, 1)
    assert other["clips"] == 3
    (note,) = found["notes"]
    assert "were not scored on the same clips: 2 clips in common, 1 of the first alone, 1 of the other" in note
    assert len({run["name"] for run in found["runs"]}) == 3, "two of the jobs have one name"


def test_runs_without_common_clips_are_compared_by_their_figures(tmp_path: Path) -> None:
    one, _ = two_runs(tmp_path)
    write_run(tmp_path / "other", base=None, tuned=None, metrics=metrics_of())
    result = call("compare", one, tmp_path / "other")
    assert result.exit_code == 0, result.output
    assert "They have no clips in common." in result.stdout


def test_the_winner_of_a_search_is_compared_by_its_own_settings(tmp_path: Path) -> None:
    search = make_search(trials=6, failed=0)
    write_run(tmp_path / "one", lora_r=16)
    write_run(tmp_path / "two", search=search)
    rows = compare([read_run(Storage(str(tmp_path / name))) for name in ("one", "two")]).settings
    won = next(trial.settings for trial in search.trials if trial.id == search.winner)
    found = {row.label: row.values[1] for row in rows}
    assert {path: value for path, value in found.items() if path in won} == {
        path: value for path, value in won.items() if path in found
    }
    assert found["training.lr"] == won["training.lr"]
    assert found["kind"] == "search"


def test_a_terminal_does_not_obey_a_transcript(tmp_path: Path) -> None:
    text = HOSTILE["escapes"] + HOSTILE["direction"]
    calm = [utterance("/d/a.wav", f"said {text}", "said")]
    wild = [utterance("/d/a.wav", f"said {text}", f"said {text}")]
    write_run(tmp_path / "one", base=calm, tuned=calm)
    write_run(tmp_path / "two", base=calm, tuned=wild)
    result = call("compare", tmp_path / "one", tmp_path / "two")
    assert result.exit_code == 0, result.output
    assert not set(result.stdout) & set("\x1b\x07\x9b\u202e\u2066")
    assert "\\x1b[2J\\x1b]0;owned\\x07 \\x9b31m [bold red]markup[/] :smile:\\u202e" in result.stdout


def test_the_text_tells_the_difference_and_shows_both_hypotheses(tmp_path: Path) -> None:
    result = call("compare", *two_runs(tmp_path), "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "On 3 common clips the WER goes from 36.36% to 27.27%: −9.1 points of WER (95 % interval" in result.stdout
    assert "which may be chance" in result.stdout
    lines = [line.split(maxsplit=1) for line in result.stdout.split("\n") if line.startswith("    ")]
    assert ["calls-nl-87654321", "abre la puerta"] in lines
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "plotly.js v" not in page
    assert "use_dora" in page
    assert len(page) < 60_000


def test_one_root_is_not_enough(tmp_path: Path) -> None:
    result = call("compare", write_run(tmp_path).uri)
    assert result.exit_code == 2
    assert "give two roots or more" in result.stderr


def test_thousands_of_utterances_are_compared_in_seconds(tmp_path: Path) -> None:
    for name, rate in (("one", 0.3), ("two", 0.1)):
        lines = many_utterances(3000, error_rate=rate)
        write_run(tmp_path / name, base=lines, tuned=lines)
    started = time.monotonic()
    runs = [read_run(Storage(str(tmp_path / name))) for name in ("one", "two")]
    (pair,) = compare(runs).pairs
    assert time.monotonic() - started < 20
    assert pair.difference is not None
    assert pair.difference.bounds[1] < -0.1
