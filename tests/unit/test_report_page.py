"""The page of a run: what it says, that it stands alone, and that whatever is missing is left out."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from reports import (
    BASE,
    DATA,
    HOSTILE,
    TUNED,
    json_lines,
    make_search,
    many_utterances,
    metrics_of,
    rates,
    training_events,
    utterance,
    write_run,
)

from service import artifacts
from service.client.package import make_package
from service.errors import InputError, NotFoundError
from service.report.page import plotly_js, report_page, script_json
from service.storage import Storage


def shown(page: str, section: str = "main") -> str:
    """The words of a section, without markup and scripts."""
    body = re.search(rf'<(\w+) id="{section}".*?</\1>', page, re.DOTALL)
    assert body, f"there is no {section}"
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body.group())).split())


def data_of(page: str) -> Any:
    """What the page's script is given."""
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([\w-]+)"', page)


def test_the_verdict_comes_first_with_both_rates_and_the_interval_of_their_difference(tmp_path: Path) -> None:
    page = report_page(write_run(tmp_path))
    assert sections(page) == ["verdict", "training", "errors", "exports", "data", "settings"]
    text = shown(page, "verdict")
    assert text.startswith("Promoted base model, WER 45.5% 95 %: 40.9% to 50.0% → tuned model 36.4%")
    assert "5 word errors became 4, 20% fewer, in 11 words of 3 clips." in text
    assert "The difference is −9.1 points of WER" in text
    assert "2 clips got better, 1 worse, 0 stayed." in text
    assert "English 2 50.0% 12.5% −37.5" in text
    assert "<title>calls-nl-12345678: promoted</title>" in page


def test_why_a_model_was_not_promoted_is_said(tmp_path: Path) -> None:
    reasons = ["its WER, <b>60.0%</b>, is not below the base model's, 50.0%"]
    page = report_page(write_run(tmp_path, metrics=metrics_of(promoted=False, promotion_reasons=reasons)))
    assert "Not promoted" in shown(page, "verdict")
    assert "Its WER, <b>60.0%</b>, is not below the base model's, 50.0%." in shown(page, "verdict")
    assert "<b>60.0%" not in page


def test_exports_data_rejects_settings_and_versions_are_listed(tmp_path: Path) -> None:
    page = report_page(write_run(tmp_path, lora_r=7))
    assert "ggml-q8_0 pywhispercpp 1.5.1 q8_0 4.9 MB 40.0% – 50.0% – 0.030 refused: its WER is 30" in shown(
        page, "exports"
    )
    text = shown(page, "data")
    assert "training 309 9.0 min 1.7 s English (242 clips, 7.2 min), Spanish (67 clips, 1.8 min) 2" in text
    assert "silent 2 0 x.wav: its loudness is -71.0 dBFS" in text
    assert "unreadable 0 1 <b>z.wav: no such file" in text
    text = shown(page, "settings")
    assert "training.lora_r 7 default 16" in text
    assert "torch 2.13.0+cpu" in text
    assert "openai/whisper-tiny at c0ffee" in text


def test_the_page_asks_for_nothing_and_runs_its_own_scripts_alone(tmp_path: Path) -> None:
    page = report_page(write_run(tmp_path))
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#|data:)', markup)
    assert "@import" not in page[: page.index("<body>")]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    allowed = html.unescape(policy.group(1))
    assert re.findall(r"'sha256-([^']+)'", allowed) == hashes
    assert len(hashes) == 2
    assert allowed.startswith("default-src 'none'; ")
    assert "connect-src" not in allowed
    assert "</script" not in plotly_js().lower()
    assert len(page.encode()) < len(plotly_js().encode()) + 100_000


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    root = write_run(tmp_path)
    assert report_page(root) == report_page(root)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_transcript_is_data_and_nothing_else(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name]
    lines = [utterance(f"/data/{text[:40]}.wav", f"said {text}", f"heard {text}")]
    page = report_page(write_run(tmp_path, base=lines, tuned=lines, rejects=None))
    calm = report_page(write_run(tmp_path / "calm", base=BASE[:1], tuned=TUNED[:1], rejects=None))
    (clip,) = data_of(page)["utterances"]["clips"]
    assert clip["r"] == f"said {text}"
    assert clip["h"] == [f"heard {text}"] * 2
    assert len(re.findall("<script", page)) == len(re.findall("<script", calm))
    for tag in ("img", "li", "b"):
        assert len(re.findall(rf"<{tag}\b", _without_scripts(page))) == len(
            re.findall(rf"<{tag}\b", _without_scripts(calm))
        )
    page.encode("utf-8")


def _without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_json_in_a_page_holds_no_sign_that_html_or_javascript_would_read() -> None:
    text = "</script><!--&amp;\u2028\u2029\ud800"
    written = script_json({text: text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: text}


def test_a_search_shows_its_plots_and_its_table(tmp_path: Path) -> None:
    search = make_search()
    page = report_page(write_run(tmp_path, search=search))
    text = shown(page, "search")
    assert "40 trials of 40 planned" in text
    assert "26 finished, 12 stopped early, 2 failed" in text
    ids = {figure["id"] for figure in data_of(page)["figures"]}
    assert {"parallel-coordinates", "importance", "score-by-size", "best-by-time", "trials-by-time"} <= ids
    assert re.findall(r'<tr class="(\w+)" data-id="(\w+)"', page)[:3] == [
        ("untuned", "untuned"),
        ("defaults", "t000"),
        ("failed", "t001"),
    ]
    assert f"{search.winner} ★ winner" in text
    assert "the loss is nan at step 12; lower training.lr" in text
    assert f"{search.winner} is the best of 38 scored trials." in shown(page, "verdict")
    assert re.search(r"base model, WER .* → defaults \d+\.\d% trial t000 → tuned model", shown(page, "verdict"))


def test_a_search_under_way_shows_the_best_so_far(tmp_path: Path) -> None:
    search = make_search(trials=5, failed=2).model_copy(update={"winner": None, "verdict": None, "importance": {}})
    page = report_page(write_run(tmp_path, search=search, base=None, tuned=None, complete=False, rejects=None))
    text = shown(page, "verdict")
    assert "Not finished" in text
    assert re.search(r"untuned, WER 60\.0% → defaults [\d.]+% trial t000 → best so far [\d.]+%", text)


def test_a_trial_that_failed_after_a_good_score_is_not_the_best(tmp_path: Path) -> None:
    search = make_search(trials=5, failed=2).model_copy(update={"winner": None, "verdict": None})
    trials = [trial.model_copy(update={"score": 0.01}) if trial.id == "t001" else trial for trial in search.trials]
    search = search.model_copy(update={"trials": trials})
    page = report_page(write_run(tmp_path, search=search, base=None, tuned=None, complete=False))
    best = min(trial.score or 1 for trial in trials if trial.status != "failed")
    assert f"best so far {best:.1%}" in shown(page, "verdict")
    (figure,) = [one for one in data_of(page)["figures"] if one["id"] == "best-by-time"]
    assert min(figure["data"][1]["y"]) == best


@pytest.mark.parametrize("metric", ["wer", "loss"])
def test_a_search_without_a_finished_trial_has_its_table_and_no_plots(tmp_path: Path, metric: str) -> None:
    search = make_search(trials=3, failed=3, metric=metric)
    trials = [trial for trial in search.trials if trial.id != "t000"]
    search = search.model_copy(update={"trials": trials, "winner": None, "importance": {}})
    page = report_page(write_run(tmp_path, search=search, base=None, tuned=None, complete=False, events=[]))
    assert data_of(page)["figures"] == []
    assert plotly_js() not in page
    assert "t001" in shown(page, "search")


MISSING = {
    "exports": {"metrics": metrics_of(artifacts={})},
    "utterances": {"base": None, "tuned": None, "metrics": metrics_of()},
    "tuned utterances": {"tuned": None, "metrics": metrics_of()},
    "rejects": {"rejects": None},
    "events": {"events": []},
    "merge": {"metrics": {key: value for key, value in metrics_of().items() if key != "merge"}},
    "seconds": {"metrics": {key: value for key, value in metrics_of().items() if key != "seconds"}},
    "adapter": {"metrics": {key: value for key, value in metrics_of().items() if key not in ("adapter", "training")}},
    "intervals": {"metrics": metrics_of() | {"tuned": {k: v for k, v in rates(TUNED).items() if k != "wer_interval"}}},
    "everything but the spec": {"base": None, "tuned": None, "rejects": None, "events": [], "complete": False},
}


@pytest.mark.parametrize("missing", MISSING)
def test_what_is_missing_is_left_out(tmp_path: Path, missing: str) -> None:
    page = report_page(write_run(tmp_path, **MISSING[missing]))
    assert {"verdict", "settings"} <= set(sections(page))
    for name in ("exports", "errors", "training"):
        gone = {"exports": "exports", "utterances": "errors", "events": "training"}.get(missing) == name
        assert (name not in sections(page)) == (gone or missing == "everything but the spec"), name
    assert all(f'href="#{name}"' in page for name in sections(page))


def test_a_run_under_way_shows_what_there_is(tmp_path: Path) -> None:
    root = write_run(tmp_path, tuned=None, complete=False)
    root.write_json("stages/prepare.json", {"seconds": 1, "result": DATA})
    page = report_page(root)
    assert "Not finished" in shown(page, "verdict")
    assert sections(page) == ["verdict", "training", "errors", "data", "settings"]
    assert data_of(page)["utterances"]["sides"] == ["base"]


def test_other_kinds_of_job_have_their_score(tmp_path: Path) -> None:
    scored = {"job_id": "tiny-evaluate-1", "model": rates(TUNED), "seconds": {"evaluate": 3.0, "total": 3.0}}
    root = write_run(tmp_path, base=None, tuned=None, metrics=scored, events=[], spec={"kind": "evaluate"})
    root.write_bytes(artifacts.MODEL_LINES, json_lines(TUNED))
    page = report_page(root)
    assert shown(page, "verdict").startswith("Scored model, WER 36.4% 95 %: 32.7% to 40.0%")
    assert data_of(page)["utterances"]["sides"] == ["model"]
    assert sections(page) == ["verdict", "errors", "data", "settings"]

    exported = metrics_of() | {"model": rates(TUNED)}
    for key in ("base", "tuned", "promoted", "training", "adapter"):
        del exported[key]
    root = write_run(tmp_path / "export", base=None, tuned=None, metrics=exported, events=[], spec={"kind": "export"})
    root.write_bytes(artifacts.MERGED_LINES, json_lines(TUNED))
    page = report_page(root)
    assert shown(page, "verdict").startswith("Exported model, WER 36.4%")
    assert "exports" in sections(page)


def test_a_guard_that_failed_is_shown_with_its_clips(tmp_path: Path) -> None:
    side = {"wer": 0.2, "languages": {"en": 0.2}, "text_on_silence": 0, "loops": 0, "bad_timestamps": 1}
    failed = {
        "path": "/g/quiet.wav",
        "kind": "text_on_silence",
        "detail": "3 words",
        "text": "<i>thanks</i> for watching",
    }
    guard = {
        "utterances": 12,
        "base": side,
        "tuned": side | {"wer": 0.3, "text_on_silence": 1},
        "regressions": [failed],
        "reasons": ["x"],
    }
    text = shown(report_page(write_run(tmp_path, metrics=metrics_of(guard=guard))), "guard")
    assert "12 clips of other kinds" in text
    assert "clips with text on silence 0 1" in text
    assert "quiet.wav text on silence 3 words <i>thanks</i> for watching" in text


def test_lengths_of_an_older_run_come_from_its_utterances(tmp_path: Path) -> None:
    root = write_run(tmp_path)
    manifest = root.read_json(artifacts.MANIFEST)
    for name in ("train", "val"):
        del manifest["data"][name]["lengths"], manifest["data"][name]["language_hours"]
    root.write_json(artifacts.MANIFEST, manifest)
    page = report_page(root)
    (figure,) = [one for one in data_of(page)["figures"] if one["id"] == "clip-lengths"]
    assert [trace["name"] for trace in figure["data"]] == ["validation"]
    assert "English (242 clips), Spanish (67 clips)" in shown(page, "data")


def test_more_utterances_than_a_page_carries_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.report.utterances.collect.__kwdefaults__", {"most": 20})
    lines = many_utterances(50)
    page = report_page(write_run(tmp_path, base=lines, tuned=lines))
    assert "Of 50 utterances this page holds the 20 with the most errors" in shown(page, "errors")
    assert len(data_of(page)["utterances"]["clips"]) == 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (artifacts.REJECTS, b"split,path,kind,reason\n\xff\xfe"),
        (artifacts.METRICS, b"{"),
        (artifacts.METRICS, b"[]"),
        (artifacts.BASE_LINES, b'{"path": "a"}\n'),
        (artifacts.EVENTS, b"nonsense\n{}\n"),
        (artifacts.TRIALS, b'{"format": 2}'),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    root = write_run(tmp_path)
    root.write_bytes(name, content)
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))}/{re.escape(name)}: cannot be read"):
        report_page(root)


def test_what_is_no_run_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        report_page(Storage(str(tmp_path / "nothing")))
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(NotFoundError, match=r"no spec\.json: this is not the root of a run"):
        report_page(Storage(str(tmp_path)))


def test_steps_before_a_run_was_resumed_are_told_of(tmp_path: Path) -> None:
    events = [*training_events(20), {"event": "model", "resumed_from_step": 10}, *training_events(40)[6:]]
    assert "gone on with from step 10" in shown(report_page(write_run(tmp_path, events=events)), "training")


def test_what_the_job_warned_of_is_said_once_and_as_text(tmp_path: Path) -> None:
    warning = {"event": "notice", "level": "warning", "text": "2 sentences <b> are in [both] splits"}
    before = {"event": "notice", "text": "[yellow]warning[/yellow]: 2 sentences <b> are in \\[both] splits"}
    old = {"event": "notice", "level": "warning", "text": "there is no report.html: InputError"}
    other = {"event": "notice", "text": "this is no warning"}
    page = report_page(write_run(tmp_path, events=[warning, other, *training_events(), before, warning, old]))
    assert shown(page, "verdict").count("The job warned: ") == 1
    assert "The job warned: 2 sentences <b> are in [both] splits." in shown(page, "verdict")


def test_the_code_that_is_sent_to_a_cluster_can_make_the_page(tmp_path: Path) -> None:
    """Its templates go along, which are no Python files."""
    zipfile.ZipFile(io.BytesIO(make_package(None).content)).extractall(tmp_path / "code")
    write_run(tmp_path / "run")
    code = (
        "from service.report.page import report_page; from service.storage import Storage; import service.report; "
        "print(service.report.__file__, len(report_page(Storage('run'))))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "code")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    place, size = result.stdout.split()
    assert place.startswith(str(tmp_path / "code"))
    assert int(size) > 1_000_000
